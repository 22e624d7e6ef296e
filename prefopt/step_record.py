"""The records of all micro-batches of an optimizer step as one, for losses that couple its examples.

A loss such as AOT (which sorts the batch) or KTO (whose z is a mean over it) is another loss on micro-batches than on
the step. But it is a function of a few numbers per example, the log-probs: with those of the whole step at hand, from
all micro-batches and processes, its gradient in each of them is exact, and the model is differentiated micro-batch by
micro-batch with that gradient fed in. The price is one more forward pass, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from prefopt.objective import Record, loss_values
from prefopt_losses import ListLogProbs, Loss

AnyRecord = TypeVar("AnyRecord", bound=Record)

OF_THE_POLICY = (
    *("logps", "chosen_logps", "rejected_logps", "gold_logps"),
    *("chosen_token_logps", "rejected_token_logps", "chosen_sequential_kl", "rejected_sequential_kl", "values"),
)
"""Fields of the records through which gradient reaches the policy."""


def joined(records: Sequence[AnyRecord]) -> AnyRecord:
    """Return one record with the examples of all, in order; what is no tensor is the first one's."""
    first = records[0]
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(first)):
        parts = [getattr(record, name) for record in records]
        if isinstance(parts[0], Tensor) and parts[0].ndim:
            width = max(part.shape[-1] for part in parts) if "token_logps" in name else None
            changes[name] = torch.cat([_widened(part, width) for part in parts])
    if isinstance(first, ListLogProbs):
        counts = [record.size for record in records]  # type: ignore[union-attr]
        offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
        numbered = [record.lists + offset for record, offset in zip(records, offsets)]  # type: ignore[union-attr]
        changes |= {"lists": torch.cat(numbered), "count": sum(counts)}
    return replace(first, **changes)


def from_all_processes(records: Sequence[AnyRecord], device: torch.device | str = "cpu") -> tuple[list[AnyRecord], int]:
    """Return the records of every process, in the order of their ranks, and where this one's begin.

    A process that has none this time passes an empty list; it still gets them on its device, so that what all
    compute of them is the same to the last bit.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return list(records), 0
    rank = torch.distributed.get_rank()
    sent = [(rank, place, _moved(record, "cpu")) for place, record in enumerate(records)]
    everyone = sorted(gather_object(sent), key=lambda item: item[:2])
    begin = sum(other < rank for other, _, _ in everyone)
    return [_moved(record, device) for _, _, record in everyone], begin


def step_gradients(
    loss: Loss, records: Sequence[AnyRecord], units: int, *, own: range, check: bool
) -> tuple[Tensor, list[dict[str, Tensor]], AnyRecord]:
    """Differentiate the mean loss of a whole step in the log-probs of this process's examples.

    Args:
        loss: the loss.
        records: of all micro-batches and processes.
        units: examples of the step, the denominator.
        own: which of the records are this process's.
        check: look for NaN.

    Returns:
        losses (units,) of the whole step; for each of the own records the gradient by field; the whole record.
    """
    leaves = [
        {
            name: value.detach().requires_grad_()
            for name in OF_THE_POLICY
            if isinstance(value := getattr(record, name, None), Tensor)
        }
        for record in records
    ]
    whole = joined([replace(record, **leaf) for record, leaf in zip(records, leaves)])
    losses = loss_values(loss, whole, check=check)
    wanted = [leaves[place][name] for place in own for name in leaves[place]]
    slopes = iter(torch.autograd.grad(losses.sum() / units, wanted, materialize_grads=True) if wanted else ())
    return losses.detach(), [{name: next(slopes) for name in leaves[place]} for place in own], whole


def without_effect(record: Record) -> Tensor:
    """Return zero, by way of all that reaches the policy: data-parallel wrappers wait for every trained parameter."""
    values = [getattr(record, name, None) for name in OF_THE_POLICY]
    return torch.stack([(value * 0.0).sum() for value in values if isinstance(value, Tensor)]).sum()


def fed_back(record: Record, slopes: dict[str, Tensor]) -> Tensor:
    """Return a number whose gradient in the policy is that of the step's loss, by way of this record."""
    given = {name: getattr(record, name) for name in slopes}
    return torch.stack([(given[name] * slope).sum() for name, slope in slopes.items()]).sum()


def _widened(part: Tensor, width: int | None) -> Tensor:
    return part if width is None else pad(part, (0, width - part.shape[-1]))


def _moved(record: AnyRecord, device: torch.device | str) -> AnyRecord:
    tensors = {name: value.detach().to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **tensors)
