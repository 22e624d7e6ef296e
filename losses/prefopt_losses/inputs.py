"""What a loss is given, and the checks that it can use it.

Two records: `LogProbs` (two completions of one prompt per example) and `UnpairedLogProbs` (one completion per
example, desirable or not). Shapes, dtypes and devices are checked when a record is made; values (NaN, empty
completions) when a loss reads them, with one device synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefopt_losses.errors import LossError

# What each tensor holds; error messages and the docstrings of the named losses are written from it.
_SUMMED = "log-probs of the {} completions, nats, summed over completion tokens"
_COUNTED = "scored tokens of the {} completions: the very tokens whose log-probs were summed"
TENSORS: dict[str, str] = {
    "chosen_logps": "policy " + _SUMMED.format("chosen"),
    "rejected_logps": "policy " + _SUMMED.format("rejected"),
    "ref_chosen_logps": "reference " + _SUMMED.format("chosen"),
    "ref_rejected_logps": "reference " + _SUMMED.format("rejected"),
    "chosen_lengths": _COUNTED.format("chosen"),
    "rejected_lengths": _COUNTED.format("rejected"),
    "preference_probability": "probability that the chosen completion is the better one, between 0 and 1",
}


@dataclass(frozen=True, eq=False)
class LogProbs:
    """A batch of comparisons: one chosen and one rejected completion per example; all tensors (batch,).

    Log-probs are in nats, summed over completion tokens (never averaged: losses that want means divide by
    the lengths themselves). A loss reads only what its `needs` name; the rest may be None.

    Raises LossError for tensors that are not (batch,), of different batch sizes or on different devices.
    """

    chosen_logps: Tensor | None = None
    rejected_logps: Tensor | None = None
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    preference_probability: Tensor | None = None
    tokens_per_example: float | Tensor | None = None
    """Mean chosen tokens per example over the whole optimizer step. With it a token-mean NLL decomposes
    over micro-batches and ranks; without it the mean is taken over this batch."""

    def __post_init__(self) -> None:
        _check_form(_tensors_of(self), TENSORS)
        step_tokens = self.tokens_per_example
        if isinstance(step_tokens, (int, float)) and not step_tokens > 0:
            raise LossError(f"tokens_per_example: expected a positive number, given {step_tokens}")
        if isinstance(step_tokens, Tensor) and step_tokens.ndim:
            raise LossError(f"tokens_per_example: expected one number, given {tuple(step_tokens.shape)}")


@dataclass(frozen=True, eq=False)
class UnpairedLogProbs:
    """A batch of single completions, each desirable or not; all tensors (batch,), units as in `LogProbs`.

    Raises LossError for tensors that are not (batch,), of different batch sizes or on different devices.
    """

    logps: Tensor
    desirable: Tensor
    """bool: True takes the chosen terms of the loss, False the rejected ones."""
    ref_logps: Tensor | None = None
    lengths: Tensor | None = None
    tokens_per_example: float | Tensor | None = None
    """Desirable tokens of the whole optimizer step / all its examples; see `LogProbs`."""

    def __post_init__(self) -> None:
        tensors = _tensors_of(self)
        _check_form(tensors, ("logps", "desirable", "ref_logps", "lengths"))
        if self.desirable.dtype != torch.bool:
            raise LossError(
                f"desirable: expected a bool tensor, given {self.desirable.dtype}. "
                "For labels of 1 and -1 (or 0) pass `labels > 0`."
            )

    def both_sides(self) -> LogProbs:
        """Return a record in which every completion stands on both sides; a loss then picks one per row."""
        step_tokens = self.tokens_per_example
        if step_tokens is None and self.lengths is not None:
            step_tokens = (self.lengths * self.desirable).sum() / self.desirable.numel()
        if step_tokens is not None:
            # A step without desirable tokens: the rows they would weigh are not selected, but 0 * inf is NaN.
            step_tokens = torch.as_tensor(step_tokens, device=self.logps.device).clamp(min=1e-6)
        return LogProbs(
            chosen_logps=self.logps,
            rejected_logps=self.logps,
            ref_chosen_logps=self.ref_logps,
            ref_rejected_logps=self.ref_logps,
            chosen_lengths=self.lengths,
            rejected_lengths=self.lengths,
            tokens_per_example=step_tokens,
        )


def require(record: LogProbs, names: tuple[str, ...], reader: str, *, check: bool = True) -> None:
    """Raise LossError unless every named tensor of the record is there and its values can be used.

    Log-probs must be finite, lengths at least 1, probabilities between 0 and 1. `check=False` skips the look
    at the values, which synchronises the device once.
    """
    missing = [name for name in names if getattr(record, name) is None]
    if missing:
        raise LossError(_missing(name, reader, record) for name in missing)
    if not check or torch.compiler.is_compiling():
        return
    tensors = {name: getattr(record, name).detach() for name in names}
    sound = torch.stack([_sound(name, tensor) for name, tensor in tensors.items()])
    if not bool(sound.all()):
        verdicts = zip(tensors.items(), sound)
        raise LossError(_unsound(name, tensor, rows) for (name, tensor), rows in verdicts if not rows.all())


def _tensors_of(record: object) -> dict[str, object]:
    named = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    return {name: value for name, value in named.items() if value is not None}


def _check_form(given: dict[str, object], names: dict[str, str] | tuple[str, ...]) -> None:
    problems = []
    first: tuple[str, Tensor] | None = None
    for name in names:
        if name not in given:
            continue
        value = given[name]
        if not isinstance(value, Tensor):
            problems.append(f"{name}: expected a tensor of shape (batch,), given {type(value).__name__}")
        elif value.ndim != 1:
            shape = tuple(value.shape)
            problems.append(f"{name}: expected shape (batch,), given {shape}. {_reshape_hint(name)}")
        elif "logps" in name and not value.is_floating_point():
            problems.append(f"{name}: expected floating-point log-probs in nats, given {value.dtype}")
        elif first is None:
            first = (name, value)
        elif value.shape != first[1].shape or value.device != first[1].device:
            problems.append(
                f"{name}: expected shape {tuple(first[1].shape)} on {first[1].device} like {first[0]}, "
                f"given {tuple(value.shape)} on {value.device}"
            )
    if problems:
        raise LossError(problems)


def _reshape_hint(name: str) -> str:
    if "logps" in name:
        return "Sum per-token log-probs over the completion mask first: (logps * mask).sum(-1)."
    return "One number per example is needed."


def _missing(name: str, reader: str, record: LogProbs) -> str:
    known = next((getattr(record, other) for other in TENSORS if getattr(record, other) is not None), None)
    shape = "(batch,)" if known is None else str(tuple(known.shape))
    return f"{name}: {reader} needs it and it is missing. Pass a tensor of shape {shape}: {TENSORS[name]}."


def _sound(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("lengths"):
        return tensor >= 1
    if name == "preference_probability":
        return (tensor >= 0) & (tensor <= 1)
    return tensor.isfinite()


def _unsound(name: str, tensor: Tensor, sound: Tensor) -> str:
    rows = (~sound).nonzero().flatten().tolist()
    shown = ", ".join(f"{row} ({tensor[row].item():g})" for row in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    if name.endswith("lengths"):
        wish = "expected at least one scored token; drop examples whose completion was truncated away"
    elif name == "preference_probability":
        wish = "expected probabilities between 0 and 1"
    else:
        wish = "expected finite log-probs; look at these examples and at the forward pass that scored them"
    return f"{name}: {wish}. Given, by row: {shown}{more} of shape {tuple(tensor.shape)}"
