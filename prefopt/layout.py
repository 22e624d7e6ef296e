"""The start-up comparison: a layout is used only if it gives the log-probs of the model's own logits.

Wrong shared prompts are silent (the chosen completion is right, the rejected one is nats off), so every model is
compared before it is trusted: shared against plain logits, else unshared, else the model is refused. Three things are
asked of shared prompts:

    the log-probs of plain logits, in rows beyond its windows where the data have such
    that nothing changes for anybody where one completion's tokens do: in 16 bit rounding could hide a leak
    that every layer attends by the registered function, with the window that its configuration names
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.attention import Backend, attention
from prefopt.attention.choice import backends
from prefopt.batching import RaggedBatch, make_batch
from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, Layout, Scorer, autocast, compute_dtype, evaluating, plain_attention
from prefopt.recipe import Recipe
from prefopt_losses.logps import token_logps_from_logits

PROBE_TOKENS = 200
"""A group for the start-up comparison has at least so many tokens where there is one: enough to show a mistake, and two
blocks of queries (`prefopt.attention.products`)."""
BEYOND = 32
"""Tokens that a prompt is longer than what a model's windows or chunks hold, where the data have such rows."""
LEAK = 1 / 100
"""Of what rounding may be off, what one completion may move another by: nothing, but that experts multiply their tokens
together, in batches of another size then."""


@torch.no_grad()
def plain_logps(model: PreTrainedModel, group: PromptGroup) -> Tensor:
    """(completions,) summed log-probs by the model's own forward pass, one sequence at a time: the yardstick."""
    sums = []
    with attention(model, plain_attention(model)):
        for completion in group.completions:
            ids = torch.tensor([*group.prompt, *completion], device=model.device)
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(group.prompt) - 1 :]
            sums.append(token_logps_from_logits(logits, ids[len(group.prompt) :]).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class LayoutChoice:
    """Which layout a model runs in, and what the start-up comparison showed."""

    layout: Layout
    max_difference: float
    """Nats, of the layout taken, against the model's plain logits."""
    reason: str
    backend: Backend = "sdpa"
    """What computes the attention of shared prompts."""


@dataclass(frozen=True)
class _Probe:
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


def choose_layout(
    scorer: Scorer,
    group: PromptGroup,
    *,
    wanted: str = "auto",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    precision: str = "fp32",
    longest: int = 0,
) -> LayoutChoice:
    """Compare the layouts with the model's plain logits on a row of two groups and set the scorer's layout.

    Args:
        scorer: the model; its layout is set.
        group: a group with at least one completion; the more completions, the sharper the comparison. The other one
            is made of it.
        wanted: ``auto`` falls back to unshared when shared disagrees; ``shared`` refuses instead.
        dtype: compute dtype, which sets the tolerance.
        backend: what computes the attention of shared prompts; ``auto`` tries what the device has, one after another.
        precision: of the run, in which back ends for 16 bit are compared.
        longest: tokens of the longest row that the data may have: windows that are shorter are looked at.

    Raises:
        ModelError: no layout agrees with the model's own logits, or the wanted one does not.
    """
    with evaluating(scorer):
        probe = _probe(scorer.language_model, beyond_windows(scorer.language_model, group, longest), longest)
        if wanted == "unshared":
            return _unshared_or_refused(scorer, probe, dtype, "as model.attention or dropout asks")
        able, reasons = backends(scorer.language_model, _multiplied_in(dtype, precision), wanted=backend)
        _refuse_missing_backend(backend, able, reasons)
        passed_over, reason = "", _counts_rows(scorer.language_model)
        for name in [] if reason else able:
            run = precision if name == "varlen" else "fp32"
            difference, reason = _shared_difference(scorer, probe, _multiplied_in(dtype, run), name, run)
            if not reason:
                return LayoutChoice("shared", difference, f"agrees with the model's plain logits{passed_over}", name)
            passed_over += f"; {name} was not taken: {reason}"
        if wanted == "shared":
            raise ModelError(
                Problem("model.attention", "shared prompts to give the model's own log-probs", reason,
                        "use model.attention=auto or unshared")
            )  # fmt: skip
        return _unshared_or_refused(scorer, probe, dtype, reason)


def _probe(model: PreTrainedModel, group: PromptGroup, longest: int) -> _Probe:
    groups = [group, _other_way_round(group)]
    expected = torch.cat([plain_logps(model, one) for one in groups])
    if not bool(expected.isfinite().all()):
        raise ModelError(
            Problem("model", "finite log-probs", f"the untouched model gives {expected.tolist()}",
                    "its weights hold NaN or infinities, or its dtype overflows: load it in another model.dtype")
        )  # fmt: skip
    batch = make_batch(groups).to(expected.device)
    tokens = max(len(completion) for completion in group.completions)
    return _Probe(batch, _with_another_completion(batch), expected, tokens**0.5, longest)


def _unshared_or_refused(scorer: Scorer, probe: _Probe, dtype: torch.dtype, reason: str) -> LayoutChoice:
    """Take one row per completion, if that agrees with the plain logits."""
    limit = probe.allowed(dtype)
    difference = _unshared_difference(scorer, probe)
    if not difference <= limit:
        raise ModelError(
            Problem("model", f"log-probs equal to the model's own logits within {limit:.3g} nats",
                    f"a difference of {difference:.3g} nats with one row per completion; shared prompts: {reason}",
                    "this architecture cannot be computed here; please report it with its config.json")
        )  # fmt: skip
    return LayoutChoice("unshared", difference, reason)


def _unshared_difference(scorer: Scorer, probe: _Probe) -> float:
    scorer.set_layout("unshared")
    return float((scorer(probe.batch).sums - probe.expected).abs().max())


def _with_another_completion(batch: RaggedBatch) -> RaggedBatch:
    """Return the row with another token for each of its first completion's."""
    begin, count = batch.trees[0].branches[0]
    ids, known = batch.input_ids.clone(), batch.input_ids.unique()
    own = slice(begin, begin + count)
    ids[own] = known[(torch.searchsorted(known, ids[own]) + 1) % len(known)]
    return replace(batch, input_ids=ids)


def _window(config: Any, longest: int) -> int | None:
    """The sliding window that some of a model's layers have, if rows can be longer."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    return window if window is not None and sliding and window < longest else None


def _counts_rows(model: PreTrainedModel) -> str:
    """Why an architecture's rows cannot hold several trees, where a row as short as a probe does not show it."""
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        return "the temperature of its attention goes by the place in the row"
    return ""


def _other_way_round(group: PromptGroup) -> PromptGroup:
    """Return the group with every sequence reversed: as a second tree of the row it shows whether one sees another."""
    completions = tuple(np.ascontiguousarray(completion[::-1]) for completion in group.completions)
    return PromptGroup(np.ascontiguousarray(group.prompt[::-1]), completions, ())


def _multiplied_in(held_in: torch.dtype, precision: str) -> torch.dtype:
    """Return the dtype of products, with weights held in one and a precision of the run."""
    return compute_dtype(precision) if held_in == torch.float32 else held_in


def _refuse_missing_backend(wanted: str, able: list[Backend], reasons: dict[str, str]) -> None:
    if not able:
        raise ModelError(
            Problem("model.attention_backend", "a back end that this device, dtype and model can use",
                    f"{wanted}: {reasons[wanted]}", "model.attention_backend=auto takes the fastest that can be used")
        )  # fmt: skip


def _shared_difference(
    scorer: Scorer, probe: _Probe, dtype: torch.dtype, backend: Backend, precision: str
) -> tuple[float, str]:
    """Largest difference of the shared layout in nats, and why it cannot be taken; "" if it can."""
    model, device = scorer.language_model, probe.batch.input_ids.device
    try:
        with autocast(device, precision):
            rounding = _unshared_difference(scorer, probe)
            scorer.set_layout("shared", backend)
            sums = scorer(probe.batch).sums
            calls = scorer.attention_calls
            heard = float((scorer(probe.otherwise).sums - sums)[1:].abs().amax()) if len(sums) > 1 else 0.0
    except Exception as error:  # whatever an architecture makes of it, it has rows of its own
        return float("inf"), f"shared prompts do not run here ({type(error).__name__}: {error})"
    difference = float((sums - probe.expected).abs().max())
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and calls != layers:
        return difference, f"only {calls} of {layers} layers call the registered attention function"
    if not difference < float("inf"):
        return difference, "shared prompts give NaN or infinities"
    allowed = probe.allowed(dtype)
    if heard > LEAK * allowed:
        return difference, f"other tokens in one completion move another one's log-prob by {heard:.3g} nats"
    window = _window(model.config.get_text_config(), probe.longest)
    if window is not None and window not in scorer.attention_windows:
        return difference, f"its layers have their window of {window} tokens in their mask alone"
    if getattr(model.config.get_text_config(), "num_experts_per_tok", None) is None:
        # Rounding sends a token to other experts; without any, all layouts round alike.
        allowed = min(allowed, max(allowed / 4, 3 * rounding))
    if difference > allowed:
        return difference, f"shared prompts differ by {difference:.3g} nats from the model's plain logits"
    return difference, ""


def settle_layout(scorer: Scorer, recipe: Recipe, probe: PromptGroup) -> LayoutChoice:
    """Choose the layout for a model under a recipe, by the start-up comparison."""
    # A shared prompt would share its dropout mask between completions.
    drops = recipe.train.dropout or (recipe.adapter is not None and recipe.adapter.dropout > 0)
    wanted = "unshared" if drops else recipe.model.attention
    held_in = next(scorer.parameters()).dtype
    dtype = held_in if held_in in (torch.float16, torch.bfloat16) else compute_dtype("fp32")
    if getattr(scorer.language_model, "is_quantized", False):
        dtype = compute_dtype(recipe.train.precision)
    chosen = recipe.model.attention_backend
    taken = choose_layout(
        scorer, probe, wanted=wanted, dtype=dtype, backend=chosen, precision=recipe.train.precision,
        longest=recipe.data.max_length,
    )  # fmt: skip
    if scorer.training and not drops:
        _refuse_randomness(scorer, probe, TOLERANCE[dtype])
    return taken


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


@torch.no_grad()
def _refuse_randomness(scorer: Scorer, group: PromptGroup, tolerance: float) -> None:
    """Raise ModelError where a model does something at random while it trains that could not be switched off."""
    batch = make_batch([group, _other_way_round(group)]).to(next(scorer.parameters()).device)
    training = scorer(batch).sums
    with evaluating(scorer):
        difference = float((training - scorer(batch).sums).abs().max())
    limit = tolerance * max(len(completion) for completion in group.completions) ** 0.5
    if not difference <= limit:
        raise ModelError(
            Problem("model", "the same log-probs in training and evaluation mode, with its dropout set to zero",
                    f"they differ by {difference:.3g} nats: this architecture does something else at random",
                    "train.dropout=true accepts it, with a row for every completion; or take another model")
        )  # fmt: skip


def probe_group(dataset: GroupDataset) -> PromptGroup:
    """Return a short group of at least `PROBE_TOKENS` tokens with two completions, as far as there is one."""

    def merit(index: int) -> tuple[bool, bool, int]:
        lengths = dataset.completion_lengths(index)
        size = int(dataset.prompt_lengths[index]) + int(lengths.sum())
        enough = size >= PROBE_TOKENS
        return len(lengths) > 1, enough, -size if enough else size

    return dataset[max(range(min(64, len(dataset))), key=merit)]
