"""The start-up comparison: a layout is used only if it gives the log-probs of the model's own logits.

Wrong shared prompts are silent (the chosen completion is right, the rejected one is nats off), so every model is
compared before it is trusted: shared against plain logits, else unshared, else the model is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.attention import Backend, attention
from prefopt.attention.choice import backends
from prefopt.batching import RaggedBatch, make_batch
from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, Layout, Scorer, autocast, compute_dtype, plain_attention
from prefopt.recipe import Recipe
from prefopt_losses.logps import token_logps_from_logits

PROBE_TOKENS = 200
"""A group for the start-up comparison has at least so many tokens where there is one: enough to show a mistake, and two
blocks of queries (`prefopt.attention.products`)."""


@torch.no_grad()
def plain_logps(model: PreTrainedModel, group: PromptGroup) -> Tensor:
    """(completions,) summed log-probs by the model's own forward pass, one sequence at a time: the yardstick."""
    sums = []
    with attention(model, plain_attention(model)):
        for completion in group.completions:
            ids = torch.tensor([*group.prompt, *completion], device=model.device)[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            sums.append(token_logps_from_logits(logits, ids[0, len(group.prompt) :]).sum())
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


@torch.no_grad()
def choose_layout(
    scorer: Scorer,
    group: PromptGroup,
    *,
    wanted: str = "auto",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    precision: str = "fp32",
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

    Raises:
        ModelError: no layout agrees with the model's own logits, or the wanted one does not.
    """
    model = scorer.language_model
    device = next(model.parameters()).device
    was_training = scorer.training
    scorer.eval()
    groups = [group, _other_way_round(group)]
    expected = torch.cat([plain_logps(model, one) for one in groups])
    if not bool(expected.isfinite().all()):
        raise ModelError(
            Problem("model", "finite log-probs", f"the untouched model gives {expected.tolist()}",
                    "its weights hold NaN or infinities, or its dtype overflows: load it in another model.dtype")
        )  # fmt: skip
    batch = make_batch(groups).to(device)
    tokens = max(len(completion) for completion in group.completions)
    limit = TOLERANCE[dtype] * tokens**0.5
    reason = "as model.attention or dropout asks"
    try:
        if wanted != "unshared":
            able, reasons = backends(model, _multiplied_in(dtype, precision), wanted=backend)
            _refuse_missing_backend(backend, able, reasons)
            passed_over = ""
            for name in able:
                run = precision if name == "varlen" else "fp32"
                allowed = TOLERANCE[_multiplied_in(dtype, run)] * tokens**0.5
                difference, reason = _shared_difference(scorer, batch, expected, name, run)
                if difference <= allowed:
                    agrees = f"agrees with the model's plain logits{passed_over}"
                    return LayoutChoice("shared", difference, agrees, name)
                passed_over += f"; {name} was not taken: {reason}"
            if wanted == "shared":
                raise ModelError(
                    Problem("model.attention", "shared prompts to give the model's own log-probs", reason,
                            "use model.attention=auto or unshared")
                )  # fmt: skip
        scorer.set_layout("unshared")
        difference = float((scorer(batch).sums - expected).abs().max())
        if not difference <= limit:
            raise ModelError(
                Problem(
                    "model",
                    f"log-probs equal to the model's own logits within {limit:.3g} nats",
                    f"a difference of {difference:.3g} nats even with one row per completion",
                    "this architecture's head is not supported; please report it with its config.json",
                )
            )
        return LayoutChoice("unshared", difference, reason)
    finally:
        scorer.train(was_training)


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
    scorer: Scorer, batch: RaggedBatch, expected: Tensor, backend: Backend, precision: str
) -> tuple[float, str]:
    """Largest difference of the shared layout, infinite where it cannot run, with the reason in words."""
    scorer.set_layout("shared", backend)
    try:
        with autocast(batch.input_ids.device, precision):
            difference = float((scorer(batch).sums - expected).abs().max())
    except (KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        return float("inf"), f"shared prompts do not run here ({type(error).__name__}: {error})"
    layers = getattr(scorer.language_model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and scorer.attention_calls != layers:
        return (
            float("inf"),
            f"only {scorer.attention_calls} of {layers} layers call the registered attention function",
        )
    if difference != difference:
        return float("inf"), "shared prompts give NaN"
    return difference, f"shared prompts differ by {difference:.3g} nats from the model's plain logits"


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
    return choose_layout(scorer, probe, wanted=wanted, dtype=dtype, backend=chosen, precision=recipe.train.precision)


def probe_group(dataset: GroupDataset) -> PromptGroup:
    """Return a short group of at least `PROBE_TOKENS` tokens with two completions, as far as there is one."""

    def merit(index: int) -> tuple[bool, bool, int]:
        lengths = dataset.completion_lengths(index)
        size = int(dataset.prompt_lengths[index]) + int(lengths.sum())
        enough = size >= PROBE_TOKENS
        return len(lengths) > 1, enough, -size if enough else size

    return dataset[max(range(min(64, len(dataset))), key=merit)]
