"""The start-up comparison: a layout is used only if it gives the log-probs of the model's own logits.

Wrong shared prompts are silent (the chosen completion is right, the rejected one is nats off), so every model is
compared before it is trusted: shared against plain logits, else unshared, else the model is refused. Three things are
asked of shared prompts:

    the log-probs of plain logits, in rows beyond its windows where the data have such
    that nothing changes for anybody where one completion's tokens do: in 16 bit rounding could hide a leak
    that every layer attends by the registered function, with the window that its configuration names
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.attention import Backend
from prefopt.attention.choice import backends
from prefopt.batching import make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, Layout, Scorer, autocast, compute_dtype, evaluating
from prefopt.probe import Probe, ProbeText, make_probe, other_way_round
from prefopt.recipe import Recipe

LEAK = 1 / 100
"""Of what rounding may be off, what may differ where the very same products are computed: nothing, it should be."""
LEAK_OF_EXPERTS = 1 / 10
"""The same with experts, who multiply tokens together: other tokens make batches of another size. Six layers of 32
moved others by up to 1.2e-4 nats in fp32, where rounding may be off by 0.016."""
LEAK_BETWEEN_KERNELS = 1 / 4
"""The same where training has kernels of its own; assumed, for no accelerator was at hand."""
LOOKS = 2
"""Passes in training mode: what is random shows in one of them."""


@dataclass(frozen=True)
class LayoutChoice:
    """Which layout a model runs in, and what the start-up comparison showed."""

    layout: Layout
    max_difference: float
    """Nats, of the layout taken, against the model's plain logits."""
    reason: str
    backend: Backend = "sdpa"
    """What computes the attention of shared prompts."""


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
        probe = make_probe(scorer.language_model, group, longest)
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


def _unshared_or_refused(scorer: Scorer, probe: Probe, dtype: torch.dtype, reason: str) -> LayoutChoice:
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


def _unshared_difference(scorer: Scorer, probe: Probe) -> float:
    scorer.set_layout("unshared")
    return _farthest(scorer(probe.batch).sums, probe.expected)


def _farthest(found: Tensor, expected: Tensor) -> float:
    """Largest difference in nats; 0 of nothing."""
    return float((found - expected).abs().max()) if len(found) else 0.0


def _window(config: Any, longest: int) -> int | None:
    """The sliding window that some of a model's layers have, if rows can be longer."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    declared = hasattr(type(config), "sliding_window")  # a key that was left over from another model means nothing
    sliding = declared and (kinds is None or "sliding_attention" in kinds)
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    return window if window is not None and sliding and window < longest else None


def _counts_rows(model: PreTrainedModel) -> str:
    """Why an architecture's rows cannot hold several trees, where a row as short as a probe does not show it."""
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        return "the temperature of its attention goes by the place in the row"
    return ""


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
    scorer: Scorer, probe: Probe, dtype: torch.dtype, backend: Backend, precision: str
) -> tuple[float, str]:
    """Largest difference of the shared layout in nats, and why it cannot be taken; "" if it can."""
    model, device = scorer.language_model, probe.batch.input_ids.device
    try:
        with autocast(device, precision):
            rounding = 0.0 if dtype == torch.float32 else _unshared_difference(scorer, probe)
            scorer.set_layout("shared", backend)
            sums = scorer(probe.batch).sums
            calls = scorer.attention_calls
            heard = _farthest(scorer(probe.otherwise).sums[1:], sums[1:])
            unsteady = 0.0
            if device.type != "cpu":  # kernels of an accelerator may add in any order
                unsteady = _farthest(scorer(probe.batch).sums, sums)
    except Exception as error:  # whatever an architecture makes of it, it has rows of its own
        return float("inf"), f"shared prompts do not run here ({type(error).__name__}: {error})"
    difference = _farthest(sums, probe.expected)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and calls != layers:
        return difference, f"only {calls} of {layers} layers call the registered attention function"
    if not difference < float("inf"):
        return difference, "shared prompts give NaN or infinities"
    allowed = probe.allowed(dtype)
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    if heard > (LEAK_OF_EXPERTS if experts else LEAK) * allowed + 3 * unsteady:
        return difference, f"other tokens in one completion move another one's log-prob by {heard:.3g} nats"
    window = _window(model.config.get_text_config(), probe.longest)
    # In 32 bit the log-probs beyond the window tell, and they alone.
    if window is not None and window not in scorer.attention_windows and dtype != torch.float32:
        return difference, f"its layers have their window of {window} tokens in their mask alone"
    if not experts and dtype != torch.float32:
        # Rounding sends a token to other experts; without any, all layouts round alike.
        allowed = min(allowed, max(allowed / 4, 3 * rounding))
    if difference > allowed:
        return difference, f"shared prompts differ by {difference:.3g} nats from the model's plain logits"
    return difference, ""


def settle_layout(scorer: Scorer, recipe: Recipe, probe: ProbeText) -> LayoutChoice:
    """Choose the layout for a model under a recipe, by the start-up comparison."""
    # A shared prompt would share its dropout mask between completions.
    drops = recipe.drops
    wanted = "unshared" if drops else recipe.model.attention
    held_in = next(scorer.parameters()).dtype
    dtype = held_in if held_in in (torch.float16, torch.bfloat16) else compute_dtype("fp32")
    if getattr(scorer.language_model, "is_quantized", False):
        dtype = compute_dtype(recipe.train.precision)
    chosen = recipe.model.attention_backend
    taken = choose_layout(
        scorer, probe.group, wanted=wanted, dtype=dtype, backend=chosen, precision=recipe.train.precision,
        longest=probe.longest,
    )  # fmt: skip
    if scorer.training and not drops:
        _refuse_another_training(scorer, probe.group, TOLERANCE[dtype])
    return taken


def _refuse_another_training(scorer: Scorer, group: PromptGroup, tolerance: float) -> None:
    """Raise ModelError where a model's log-probs are others while it trains.

    It may do something at random that could not be switched off; and what prefopt computes in its place, to keep less
    for the backward pass, is compared with the model's own code, which evaluation runs.
    """
    batch = make_batch([group, other_way_round(group)]).to(next(scorer.parameters()).device)
    with evaluating(scorer):
        evaluated = scorer(batch).sums
    difference = 0.0
    for _ in range(LOOKS):
        with torch.enable_grad():
            difference = max(difference, _farthest(scorer(batch).sums.detach(), evaluated))
    # A CPU computes the very same products; an accelerator may have other kernels where there is a gradient.
    share = LEAK if batch.input_ids.device.type == "cpu" else LEAK_BETWEEN_KERNELS
    limit = share * tolerance * max(len(completion) for completion in group.completions) ** 0.5
    if not difference <= limit:
        raise ModelError(
            Problem("model", "the same log-probs in training and evaluation mode, with its dropout set to zero",
                    f"they differ by {difference:.3g} nats: this architecture does something else at random",
                    "train.dropout=true accepts it, with a row for every completion; or take another model; where it "
                    "is nothing random, please report it with its config.json")
        )  # fmt: skip
