"""A batch through a model -> log-probs of its completions.

The whole forward pass is one `nn.Module` from batch to log-probs: it is what accelerate wraps, so that hooks fire
and sharded weights are gathered where they are used.

Two layouts, with equal results:

    shared      one row of prompt trees, a prompt is computed once (models whose layers call a registered
                attention function)
    unshared    one row per completion with the model's own attention (everything else: ALiBi, linear attention,
                state space), completions of like lengths together

`prefopt.layout` compares both with the model's plain logits at start and says which one it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.activations import decoder_layers
from prefopt.attention import ARGUMENT, NAME, AttentionPlan, Backend
from prefopt.batching import RaggedBatch
from prefopt.errors import ModelError, Problem
from prefopt.kept_gradients import KeptGradients
from prefopt.last_layer import LastLayer
from prefopt.lean_layers import keep_less
from prefopt.linear_layers import multiply_faster
from prefopt.memory import Trimmer
from prefopt.passes import TreePass, frequency_limits, in_order, padded_passes, tree_passes
from prefopt.shared_casts import share_casts
from prefopt_losses import workspace
from prefopt_losses.distributions import relative_token_logps_from_hidden, sequential_kl_from_hidden
from prefopt_losses.head import Head
from prefopt_losses.logps import token_logps_from_hidden, token_logps_from_logits

Layout = Literal["shared", "unshared"]
Settled = tuple[Layout, Backend]
"""What the start-up comparison came to."""

FACTORS = ("logit_scale", "lm_head_multiplier")
"""Names under which configurations keep a factor on the logits; ``logits_scaling`` divides them."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which they keep the cap of z = cap tanh(z / cap)."""

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
    tokens: Tensor | None
    """(scored,) fp32, nats, per token; None of a cached reference that was not asked for them."""
    relative: Tensor | None = None
    """(completions,) fp32, nats: log-probs less log sum_v p(v)^2 of each position, summed; without gradient."""
    sequential_kl: Tensor | None = None
    """(completions,) fp32, nats: KL(reference || policy) over the vocabulary, summed over positions."""
    distribution: Distribution | None = None
    """What the next-token distributions are made of."""
    values: Tensor | None = None
    """(completions,) fp32, what the value head expects of their prompts, in the unit of the data's scores."""


@dataclass(frozen=True)
class Distribution:
    """The next-token distributions of a batch's scored positions, as what they are computed from."""

    hidden: Tensor
    """(scored, hidden)"""
    head: Head


class ReferenceLogps(Protocol):
    """Reference log-probs of a batch's completions."""

    def __call__(self, batch: RaggedBatch) -> CompletionLogProbs:
        """Return them on the batch's device, without gradient."""
        ...


class Scorer(nn.Module):
    """A causal language model as a function from a batch to completion log-probs.

    It hooks the model's last layer, which computes what is read of a row of shared prompts (`prefopt.last_layer`), and
    its linear layers, which share the casts of what they read (`prefopt.shared_casts`) and multiply as is fastest here
    (`prefopt.linear_layers`); its norms and gated MLPs keep less for the backward pass (`prefopt.lean_layers`).
    """

    def __init__(self, model: nn.Module, *, layout: Layout = "shared") -> None:
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None
        self.attention_calls = 0
        self.attention_windows: set[int | None] = set()
        self.frequency_limits = frequency_limits(self.language_model.config)
        self.kept: KeptGradients | None = None
        self.last_layer = LastLayer(self.language_model)
        keep_less(self.language_model)
        share_casts(decoder_layers(self.language_model))
        multiply_faster(decoder_layers(self.language_model))
        self.set_layout(layout)

    def set_layout(self, layout: Layout, backend: Backend = "sdpa") -> None:
        """Choose the layout and what computes the attention of shared prompts.

        The model keeps its attention from then on (checkpointed layers run again later).
        """
        self.layout, self.backend = layout, backend
        model = self.language_model
        model.set_attn_implementation(NAME if layout == "shared" else plain_attention(model))

    def learn_values(self) -> None:
        """Add a value head: V(x) as a linear function of the hidden state that ends the prompt, zero at first.

        It reads that state and does not move it: no gradient flows from the value into the policy.
        """
        layer = self.language_model.get_output_embeddings()
        head = nn.Linear(layer.in_features, 1, device=layer.weight.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.value_head = head

    def keep_gradients(self) -> None:
        """Let head and embedding add their gradients to some that stay; `kept` sets them to zero."""
        self.kept = KeptGradients(self.language_model)

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model inside an adapter, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self,
        batch: RaggedBatch,
        *,
        relative: bool = False,
        against: Distribution | None = None,
        distribution: bool = False,
    ) -> CompletionLogProbs:
        """Score every completion of the batch.

        Args:
            batch: the batch.
            relative: also give log-probs relative to log sum_v p(v)^2.
            against: also give the sequential KL from this distribution, the reference's.
            distribution: also give the distribution itself, for another scorer's `against`.
        """
        hidden = self._shared(batch) if self.layout == "shared" else self._unshared(batch)
        tokens = self._token_logps(hidden, batch.targets)
        relative_logps = kl = None
        if relative:
            relative_logps = _per_completion(batch, _relative(hidden, batch.targets, self.head))
        if against is not None:
            kl = _per_completion(batch, _sequential_kl(hidden, self.head, against))
        return CompletionLogProbs(
            sums=_per_completion(batch, tokens),
            lengths=batch.completion_lengths,
            tokens=tokens,
            relative=relative_logps,
            sequential_kl=kl,
            distribution=Distribution(hidden, self.head) if distribution else None,
            values=None if self.value_head is None else _values(self.value_head, hidden, batch),
        )

    @property
    def head(self) -> Head:
        """The head as plain numbers.

        Raises:
            ModelError: it is not a plain linear layer, so its distributions cannot be had tile by tile.
        """
        layer = self.language_model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise ModelError(
                Problem("model", "a plain linear head: this loss reads the whole distribution over the vocabulary",
                        f"a head of type {type(layer).__name__}",
                        "leave the head out of the adapter and of the quantization, or choose another loss")
            )  # fmt: skip
        return Head(layer.weight, layer.bias, *self._scale_and_cap())

    def _scale_and_cap(self) -> tuple[float, float | None]:
        config = self.language_model.config.get_text_config()
        scale = next((factor for name in FACTORS if (factor := getattr(config, name, None))), None)
        if scale is None:
            divisor = getattr(config, "logits_scaling", None) or 1.0
            scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor  # the one that multiplies by it
        return scale, next((cap for name in SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)

    def _decoder(self) -> nn.Module:
        model = self.language_model
        for name in (model.base_model_prefix, "model"):  # Llama 4 names another part than it has
            if isinstance(inner := getattr(model, name, None), nn.Module):
                return inner
        found: nn.Module = model.get_decoder()
        return found

    def _shared(self, batch: RaggedBatch) -> Tensor:
        """Hidden states (scored, hidden) of one row of prompt trees."""
        passes = tree_passes(batch, self.frequency_limits)
        return in_order([self._one_row(one) for one in passes], passes)

    def _one_row(self, one: TreePass) -> Tensor:
        plan = AttentionPlan(one.trees, one.input_ids.device, backend=self.backend)
        output = self._decoder()(
            input_ids=one.input_ids[None],
            position_ids=one.position_ids[None],
            use_cache=False,
            **{ARGUMENT: plan},
        )
        self.attention_calls, self.attention_windows = plan.calls, plan.windows
        return output.last_hidden_state[0, one.predict_index]

    def _unshared(self, batch: RaggedBatch) -> Tensor:
        """Hidden states (scored, hidden) with one padded row per completion."""
        passes = padded_passes(batch, self.frequency_limits)
        hidden = []
        for one in passes:
            # No mask: causality hides the padding, which is at the end, and a mask would be made of it for every layer.
            output = self._decoder()(input_ids=one.input_ids, use_cache=False)
            hidden.append(output.last_hidden_state[one.predict])
        return in_order(hidden, passes)

    def _token_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Token log-probs (scored,) from hidden states, with the model's scale, bias and soft-cap."""
        layer = self.language_model.get_output_embeddings()
        scale, softcap = self._scale_and_cap()
        if type(layer) is nn.Linear:
            return token_logps_from_hidden(
                hidden, layer.weight, targets, bias=layer.bias, scale=scale, softcap=softcap,
                weight_grad=None if self.kept is None else self.kept.of(layer.weight),
            )  # fmt: skip
        logits = layer(hidden).float() * scale  # an adapted or quantized head: its own forward, logits held once
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return token_logps_from_logits(logits, targets)


def _per_completion(batch: RaggedBatch, tokens: Tensor) -> Tensor:
    """Sum values of scored tokens (scored,) over each completion: (completions,)."""
    return tokens.new_zeros(len(batch.completion_lengths)).index_add(0, batch.completion_index, tokens)


def _values(head: nn.Linear, hidden: Tensor, batch: RaggedBatch) -> Tensor:
    """Values (completions,) from the state that predicts each completion's first token: the last one of the prompt."""
    first = batch.completion_lengths.cumsum(0) - batch.completion_lengths
    with torch.autocast(hidden.device.type, enabled=False):
        values: Tensor = head(hidden[first].detach().float())
    return values.squeeze(-1)


def _relative(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    with torch.no_grad():
        return relative_token_logps_from_hidden(
            hidden, head.weight, targets, bias=head.bias, scale=head.scale, softcap=head.softcap
        )


def _sequential_kl(hidden: Tensor, head: Head, reference: Distribution) -> Tensor:
    return sequential_kl_from_hidden(
        hidden, head.weight, reference.hidden, reference.head.weight,
        bias=head.bias, ref_bias=reference.head.bias, scale=head.scale, ref_scale=reference.head.scale,
        softcap=head.softcap, ref_softcap=reference.head.softcap,
    )  # fmt: skip


def plain_attention(model: PreTrainedModel) -> str:
    """Name of the model's own attention: SDPA, or eager where a soft-cap or the architecture asks for it."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not capped else "eager"


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Autocast for ``bf16``; nothing for ``fp32`` and ``bf16-pure``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype in which a precision multiplies matrices."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@contextmanager
def evaluating(scorer: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode and without gradients."""
    was_training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        scorer.train(was_training)


def score(
    scorer: nn.Module, batches: Iterable[RaggedBatch], *, precision: str
) -> Iterator[tuple[RaggedBatch, CompletionLogProbs]]:
    """Score batches in eval mode without gradients; yields each (on its device) with its log-probs."""
    device = next(scorer.parameters()).device
    trimmer = Trimmer(device)
    try:
        with evaluating(scorer):
            for batch in batches:
                moved = batch.to(device)
                with autocast(device, precision):
                    result = scorer(moved)
                yield moved, result
                del moved, result
                trimmer.after_step()
    finally:
        workspace.free()  # of batches larger than those of a step
