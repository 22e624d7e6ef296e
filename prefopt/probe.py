"""What the start-up comparison looks at: a row of two groups, and what the model itself says of them.

The row is short, so that starting is; but where rows of the data can be longer than a model's windows, it is longer
than these too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.attention import attention
from prefopt.batching import RaggedBatch, make_batch
from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, plain_attention
from prefopt_losses.logps import token_logps_from_logits

PROBE_TOKENS = 200
"""A group for the start-up comparison has at least so many tokens where there is one: enough to show a mistake, and two
blocks of queries (`prefopt.attention.products`)."""
BEYOND = 32
"""Tokens that a prompt is longer than what a model's windows or chunks hold, where the data have such rows."""


@dataclass(frozen=True)
class ProbeText:
    """What the start-up comparison is made with."""

    group: PromptGroup
    """A group of the data."""
    longest: int
    """Tokens of the longest row in the data."""


def probe_group(dataset: GroupDataset, *others: GroupDataset | None) -> ProbeText:
    """Return a short group of at least `PROBE_TOKENS` tokens with two completions, as far as there is one.

    Args:
        dataset: where the group comes from.
        others: what else will be scored, if anything.
    """

    def merit(index: int) -> tuple[bool, bool, int]:
        lengths = dataset.completion_lengths(index)
        size = int(dataset.prompt_lengths[index]) + int(lengths.sum())
        enough = size >= PROBE_TOKENS
        return len(lengths) > 1, enough, -size if enough else size

    longest = max(groups.longest_row for groups in (dataset, *others) if groups is not None)
    return ProbeText(dataset[max(range(min(64, len(dataset))), key=merit)], longest)


@torch.no_grad()
def plain_logps(model: PreTrainedModel, group: PromptGroup) -> Tensor:
    """(completions,) summed log-probs by the model's own forward pass, one sequence at a time: the yardstick."""
    sums = []
    chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
    with attention(model, plain_attention(model)):
        for completion in group.completions:
            ids, scored = torch.tensor([*group.prompt, *completion], device=model.device), len(completion)
            kept = {"logits_to_keep": scored} if chooses else {}  # those of a long prompt would fill memory
            logits = model(input_ids=ids[None, :-1], use_cache=False, **kept).logits[0, -scored:]
            sums.append(token_logps_from_logits(logits, ids[-scored:]).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class Probe:
    """A row of two groups, and what the model itself says of it."""

    batch: RaggedBatch
    otherwise: RaggedBatch
    """The same row with other tokens in its first completion, which no other completion may notice."""
    expected: Tensor
    """(completions,) nats, by the model's own forward pass."""
    scale: float
    """Root of the tokens of the longest completion, with which rounding grows."""
    longest: int
    """Tokens of the longest row that the data may have."""

    def allowed(self, dtype: torch.dtype) -> float:
        """Nats that products in a dtype may be off."""
        return TOLERANCE[dtype] * self.scale


def make_probe(model: PreTrainedModel, group: PromptGroup, longest: int) -> Probe:
    """Lay the group and its reverse out in one row, and have the model say what it makes of them.

    Args:
        model: the model.
        group: the group.
        longest: tokens of the longest row that the data may have.

    Raises:
        ModelError: its log-probs are not finite.
    """
    group = beyond_windows(model, group, longest)
    groups = [group, other_way_round(group)]
    expected = torch.cat([plain_logps(model, one) for one in groups])
    if not bool(expected.isfinite().all()):
        raise ModelError(
            Problem("model", "finite log-probs", f"the untouched model gives {expected.tolist()}",
                    "its weights hold NaN or infinities, or its dtype overflows: load it in another model.dtype")
        )  # fmt: skip
    batch = make_batch(groups).to(expected.device)
    tokens = max(len(completion) for completion in group.completions)
    return Probe(batch, _with_another_completion(batch), expected, tokens**0.5, longest)


def beyond_windows(model: PreTrainedModel, group: PromptGroup, longest: int) -> PromptGroup:
    """Return the group behind a prompt that is longer than the model's windows and chunks, where rows can be so long.

    A layer that has its window in its mask alone gives right log-probs in rows that are shorter. What is put before
    the prompt are the group's own tokens, shuffled.

    Args:
        model: its configuration names windows and chunks, among others.
        group: the group.
        longest: tokens of the longest row that the data may have.
    """
    config = model.config.get_text_config()
    sizes = [size for name, size in vars(config).items() if "window" in name or "chunk" in name]
    inside = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and 0 < size < longest]
    room = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    room -= max(len(completion) for completion in group.completions)
    missing = min(max(inside, default=0) + BEYOND, room) - len(group.prompt)
    if missing <= 0:
        return group
    known = np.concatenate([group.prompt, *group.completions])
    before = np.random.default_rng(0).choice(known, missing).astype(group.prompt.dtype)
    return PromptGroup(np.concatenate([before, group.prompt]), group.completions, ())


def other_way_round(group: PromptGroup) -> PromptGroup:
    """Return the group with every sequence reversed: as a second tree of the row it shows whether one sees another."""
    completions = tuple(np.ascontiguousarray(completion[::-1]) for completion in group.completions)
    return PromptGroup(np.ascontiguousarray(group.prompt[::-1]), completions, ())


def _with_another_completion(batch: RaggedBatch) -> RaggedBatch:
    """Return the row with another token for each of its first completion's."""
    begin, count = batch.trees[0].branches[0]
    ids, known = batch.input_ids.clone(), batch.input_ids.unique()
    own = slice(begin, begin + count)
    ids[own] = known[(torch.searchsorted(known, ids[own]) + 1) % len(known)]
    return replace(batch, input_ids=ids)
