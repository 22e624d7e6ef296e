"""Every tensor a loss can read: what it holds, its shape, and what makes it unusable.

One table; records, signatures, docstrings and error messages are written from it. Form (shape, dtype, device) is
checked when a record is made, values (NaN, positive log-probs, empty completions) when a loss reads them, with one
device synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from prefopt_losses.errors import LossError

_SUMMED = "log-probs of the {} completions, nats, summed over completion tokens"
_COUNTED = "scored tokens of the {} completions: the very tokens whose log-probs were summed"
_TOKENS = "log-probs of the {} completions, nats, token t of a completion in column t, 0 beyond its length"
_SCORES = "scores that the data give the {} completions, such as a reward model's, in its own unit"
_RELATIVE = (
    "policy log-probs of the {} completions less log sum_v p(v)^2 of each position, nats, summed over completion tokens"
)
_SEQUENTIAL = "KL(reference || policy) over the vocabulary, summed over the positions of the {} completions, nats"
_MISMATCHED = "log-probs of completions of other prompts after these prompts, nats, summed over completion tokens"

PAIR_TENSORS: dict[str, str] = {
    "chosen_logps": "policy " + _SUMMED.format("chosen"),
    "rejected_logps": "policy " + _SUMMED.format("rejected"),
    "ref_chosen_logps": "reference " + _SUMMED.format("chosen"),
    "ref_rejected_logps": "reference " + _SUMMED.format("rejected"),
    "chosen_token_logps": "policy " + _TOKENS.format("chosen"),
    "rejected_token_logps": "policy " + _TOKENS.format("rejected"),
    "ref_chosen_token_logps": "reference " + _TOKENS.format("chosen"),
    "ref_rejected_token_logps": "reference " + _TOKENS.format("rejected"),
    "chosen_lengths": _COUNTED.format("chosen"),
    "rejected_lengths": _COUNTED.format("rejected"),
    "preference_probability": "probability that the chosen completion is the better one, between 0 and 1",
    "chosen_scores": _SCORES.format("chosen"),
    "rejected_scores": _SCORES.format("rejected"),
    "values": "expected score of each prompt, V(x), in the unit of the scores",
    "gold_logps": "policy " + _SUMMED.format("gold (third)"),
    "gold_lengths": _COUNTED.format("gold (third)"),
    "chosen_relative_logps": _RELATIVE.format("chosen"),
    "rejected_relative_logps": _RELATIVE.format("rejected"),
    "chosen_sequential_kl": _SEQUENTIAL.format("chosen"),
    "rejected_sequential_kl": _SEQUENTIAL.format("rejected"),
    "mismatched_logps": "policy " + _MISMATCHED,
    "ref_mismatched_logps": "reference " + _MISMATCHED,
}

LIST_TENSORS: dict[str, str] = {
    "logps": "policy log-probs of all completions, nats, summed over completion tokens",
    "ref_logps": "reference log-probs of all completions, nats, summed over completion tokens",
    "lengths": "scored tokens of all completions: the very tokens whose log-probs were summed",
    "scores": "scores of all completions, higher is better, in their own unit; minus the rank where there are ranks",
}

POSITIVE = 1e-3
"""Nats above 0 at which a log-prob is refused; rounding stays below (fp32 log-softmax: 1e-6 per token)."""


def shape_of(name: str) -> str:
    """Return the shape that a tensor must have, for people."""
    if name in LIST_TENSORS:
        return "(completions,)"
    if "token_logps" in name:
        return "(batch, tokens)"
    return "(batch,) or (batch, models)" if name.endswith("_scores") else "(batch,)"


def check_form(given: Mapping[str, object], names: Iterable[str]) -> None:
    """Raise LossError unless the tensors have the right number of axes, and one batch size and device."""
    problems = []
    first: tuple[str, Tensor] | None = None
    for name in names:
        if name not in given:
            continue
        value = given[name]
        if not isinstance(value, Tensor):
            problems.append(f"{name}: expected a tensor of shape {shape_of(name)}, given {type(value).__name__}")
        elif value.ndim not in _axes(name):
            shape = tuple(value.shape)
            problems.append(f"{name}: expected shape {shape_of(name)}, given {shape}. {_reshape_hint(name)}")
        elif "logps" in name and not value.is_floating_point():
            problems.append(f"{name}: expected floating-point log-probs in nats, given {value.dtype}")
        elif first is None:
            first = (name, value)
        elif value.shape[0] != first[1].shape[0] or value.device != first[1].device:
            problems.append(
                f"{name}: expected {first[1].shape[0]} rows on {first[1].device} like {first[0]}, "
                f"given shape {tuple(value.shape)} on {value.device}"
            )
    if problems:
        raise LossError(problems)


def require(record: object, names: tuple[str, ...], reader: str, *, check: bool = True) -> None:
    """Raise LossError unless every named tensor of the record is there and its values can be used.

    Log-probs must be finite and not positive, lengths at least 1, probabilities between 0 and 1, everything else
    finite. `check=False` skips the look at the values, which synchronises the device once.
    """
    missing = [name for name in names if getattr(record, name) is None]
    if missing:
        known = next((getattr(record, other) for other in names if getattr(record, other) is not None), None)
        raise LossError(_missing(name, reader, known) for name in missing)
    _require_columns(record, names)
    if not check or torch.compiler.is_compiling() or not names:
        return
    tensors = {name: getattr(record, name).detach() for name in names}
    sound = torch.stack([_sound(name, tensor, tensors) for name, tensor in tensors.items()])
    if not bool(sound.all()):
        verdicts = zip(tensors.items(), sound)
        raise LossError(_unsound(name, tensor, rows) for (name, tensor), rows in verdicts if not rows.all())


def _require_columns(record: object, names: tuple[str, ...]) -> None:
    """Raise LossError where token log-probs are wider or narrower than those of their reference."""
    problems = []
    for name in names:
        own, reference = getattr(record, name), getattr(record, f"ref_{name}", None)
        if "token_logps" in name and reference is not None and own.shape != reference.shape:
            given = f"{tuple(reference.shape)} against {tuple(own.shape)}"
            problems.append(f"ref_{name}: expected the shape of {name}, given {given}. Left-align both with one mask.")
    if problems:
        raise LossError(problems)


def _axes(name: str) -> tuple[int, ...]:
    if "token_logps" in name:
        return (2,)
    return (1, 2) if name.endswith("_scores") else (1,)


def _reshape_hint(name: str) -> str:
    if "token_logps" in name:
        return "Put the scored tokens of each completion first: prefopt_losses.left_aligned(logps, mask)."
    if "logps" in name:
        return "Sum per-token log-probs over the completion mask first: (logps * mask).sum(-1)."
    return "One number per example is needed."


def _missing(name: str, reader: str, known: Tensor | None) -> str:
    meaning = {**PAIR_TENSORS, **LIST_TENSORS}[name]
    one_axis = known is not None and len(_axes(name)) == 1 and _axes(name) == (1,)
    shape = f"({known.shape[0]},)" if known is not None and one_axis else shape_of(name)
    return f"{name}: {reader} needs it and it is missing. Pass a tensor of shape {shape}: {meaning}."


def _sound(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """Return (batch,) bool: which rows can be used."""
    if name.endswith("lengths"):
        tokens, counted = others.get(name.replace("lengths", "token_logps")), (tensor >= 1) & tensor.isfinite()
        return counted if tokens is None else counted & (tensor <= tokens.shape[1])
    if name == "preference_probability":
        return (tensor >= 0) & (tensor <= 1)
    sound = tensor.isfinite()
    if "logps" in name and "relative" not in name:
        sound = sound & (tensor <= POSITIVE)
    return sound.flatten(1).all(1) if tensor.ndim > 1 else sound


def _unsound(name: str, tensor: Tensor, sound: Tensor) -> str:
    rows = (~sound).nonzero().flatten().tolist()
    bad = [_worst(tensor[row]) for row in rows]
    shown = ", ".join(f"{row} ({value:g})" for row, value in zip(rows[:8], bad))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"{name}: {_wish(name, bad)}. Given, by row: {shown}{more} of shape {tuple(tensor.shape)}"


def _worst(row: Tensor) -> float:
    """Return the value of a row that cannot be used: not finite, else the largest."""
    broken = row[~row.isfinite()]
    return float(broken.flatten()[0] if broken.numel() else row.max())


def _wish(name: str, values: list[float]) -> str:
    if name.endswith("lengths"):
        if all(1 <= value < math.inf for value in values):
            return "expected at most as many tokens as the token log-probs have columns"
        return "expected at least one scored token; drop examples whose completion was truncated away"
    if name == "preference_probability":
        return "expected probabilities between 0 and 1"
    if "logps" in name and all(0 < value < float("inf") for value in values):
        return "expected log-probs, which are at most 0; pass the negative if these are negative log-likelihoods"
    kind = "log-probs" if "logps" in name else "numbers"
    return f"expected finite {kind}; look at these examples and at the forward pass that scored them"
