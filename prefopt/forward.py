"""A batch through a model -> log-probs of its completions.

The whole forward pass is one `nn.Module` from batch to log-probs: it is what accelerate wraps, so that hooks fire
and sharded weights are gathered where they are used.

Two layouts, with equal results:

    shared      one row of prompt trees, a prompt is computed once (models whose layers call a registered
                attention function)
    unshared    one row per completion with the model's own attention (everything else: ALiBi, linear attention,
                state space)

`prefopt.layout` compares both with the model's plain logits at start and says which one it took.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.attention import ARGUMENT, NAME, AttentionPlan
from prefopt.batching import RaggedBatch
from prefopt.memory import trim
from prefopt_losses.logps import token_logps_from_hidden, token_logps_from_logits

Layout = Literal["shared", "unshared"]

# Largest difference in a completion's log-prob, in nats per sqrt(token), at which two ways of computing it count
# as equal. Rounding errors of tokens are nearly independent, so a sum's error grows with the root of its length.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@dataclass(frozen=True)
class CompletionLogProbs:
    """Log-probs of the completions of one batch."""

    sums: Tensor
    """(completions,) fp32, nats, summed over completion tokens."""
    lengths: Tensor
    """(completions,) scored tokens."""
    tokens: Tensor
    """(scored,) fp32, nats, per token."""


class Scorer(nn.Module):
    """A causal language model as a function from a batch to completion log-probs."""

    def __init__(self, model: nn.Module, *, layout: Layout = "shared") -> None:
        super().__init__()
        self.model = model
        self.attention_calls = 0
        self.set_layout(layout)

    def set_layout(self, layout: Layout) -> None:
        """Choose the layout; the model keeps its attention from then on (checkpointed layers run again later)."""
        self.layout = layout
        model = self.language_model
        model.set_attn_implementation(NAME if layout == "shared" else plain_attention(model))

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model inside an adapter, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: RaggedBatch) -> CompletionLogProbs:
        """Score every completion of the batch."""
        hidden = self._shared(batch) if self.layout == "shared" else self._unshared(batch)
        tokens = self._head(hidden, batch.targets)
        sums = tokens.new_zeros(len(batch.completion_lengths)).index_add(0, batch.completion_index, tokens)
        return CompletionLogProbs(sums, batch.completion_lengths, tokens)

    def _decoder(self) -> nn.Module:
        model = self.language_model
        return getattr(model, model.base_model_prefix)

    def _shared(self, batch: RaggedBatch) -> Tensor:
        """Hidden states (scored, hidden) of one row of prompt trees."""
        plan = AttentionPlan(batch.trees, batch.input_ids.device)
        output = self._decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            **{ARGUMENT: plan},
        )
        self.attention_calls = plan.calls
        return output.last_hidden_state[0, batch.predict_index]

    def _unshared(self, batch: RaggedBatch) -> Tensor:
        """Hidden states (scored, hidden) with one padded row per completion; padding follows, so causality hides it."""
        index, mask = _rows_per_completion(batch)
        output = self._decoder()(input_ids=batch.input_ids[index] * mask, attention_mask=mask, use_cache=False)
        scored = _scored_positions(batch, index.device)
        return output.last_hidden_state[scored]

    def _head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Token log-probs (scored,) from hidden states, with the model's scale, bias and soft-cap."""
        model = self.language_model
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        if type(head) is nn.Linear:
            return token_logps_from_hidden(hidden, head.weight, targets, bias=head.bias, scale=scale, softcap=softcap)
        logits = head(hidden).float() * scale  # an adapted or quantized head: its own forward, logits held once
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return token_logps_from_logits(logits, targets)


def plain_attention(model: PreTrainedModel) -> str:
    """Name of the model's own attention: SDPA, or eager where a soft-cap or the architecture asks for it."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not capped else "eager"


def _rows_per_completion(batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Index (completions, longest) of each completion's prompt and own tokens in the row, and its 0/1 mask."""
    rows = [
        torch.cat((torch.arange(tree.start, tree.start + tree.prompt), torch.arange(begin, begin + count)))
        for tree in batch.trees
        for begin, count in tree.branches
    ]
    device = batch.input_ids.device
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(index.shape[1], device=device)[None] < lengths[:, None]).long()
    return index, mask


def _scored_positions(batch: RaggedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) of every scored token's predicting hidden state in the one-row-per-completion layout."""
    rows, columns = [], []
    completion = 0
    for tree in batch.trees:
        for _, count in tree.branches:
            rows.append(torch.full((count + 1,), completion))
            columns.append(torch.arange(tree.prompt - 1, tree.prompt + count))
            completion += 1
    return torch.cat(rows).to(device), torch.cat(columns).to(device)


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Autocast for ``bf16``; nothing for ``fp32`` and ``bf16-pure``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype in which a precision multiplies matrices."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@torch.no_grad()
def score(
    scorer: nn.Module, batches: Iterable[RaggedBatch], *, precision: str
) -> Iterable[tuple[RaggedBatch, CompletionLogProbs]]:
    """Score batches in eval mode without gradients; yields each (on its device) with its log-probs."""
    was_training = scorer.training
    scorer.eval()
    device = next(scorer.parameters()).device
    try:
        for batch in batches:
            moved = batch.to(device)
            with autocast(device, precision):
                result = scorer(moved)
            yield moved, result
            del moved, result
            trim(device)
    finally:
        scorer.train(was_training)
