"""What is logged about a batch: pure functions of tensors, one value per example.

Averages are the caller's, weighted by examples. Everything here ranks by the margin of the loss itself, so an
accuracy of ipo is one of per-token means and not of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt_losses.inputs import LogProbs
from prefopt_losses.loss import Loss


def logratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return log pi(y) - log pi_ref(y), (batch,), nats, unscaled: the one number all losses share."""
    return logps - ref_logps


def logratios_per_token(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
    """Return the drift from the reference per scored token, (batch,), nats per token."""
    return logratios(logps, ref_logps) / lengths


def accuracies(margins: Tensor) -> Tensor:
    """Return 1 where the chosen completion wins, 0 where it loses, 1/2 where the margin is exactly 0.

    Ties count half, so that a policy equal to its reference scores chance and not zero (TRL counts them 0).
    """
    return (torch.sign(margins) + 1) / 2


def likelihood_displacement(chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
    """Return 1 where both completions became less likely although the margin grew, else 0; (batch,).

    The pair looks learned while probability moves to completions that nobody compared.
    """
    both_fall = (chosen_logratios < 0) & (rejected_logratios < 0)
    return (both_fall & (chosen_logratios > rejected_logratios)).to(chosen_logratios.dtype)


def loss_metrics(loss: Loss, record: LogProbs) -> dict[str, Tensor]:
    """Return what the record lets one say about the loss: name -> (batch,), detached.

    Keys are the field's: rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}, and with a
    reference logratios/{chosen,rejected}, displacement, and with lengths logratios_per_token/{...}.
    """
    with torch.no_grad():
        metrics = _sides("logps", record.chosen_logps, record.rejected_logps)
        if _can_rank(loss, record):
            chosen, rejected = loss.rewards(record)
            margins = chosen - rejected
            metrics |= _sides("rewards", chosen, rejected)
            metrics |= {"rewards/margins": margins, "rewards/accuracies": accuracies(margins)}
        drift = {
            "chosen": _difference(record.chosen_logps, record.ref_chosen_logps),
            "rejected": _difference(record.rejected_logps, record.ref_rejected_logps),
        }
        metrics |= _sides("logratios", drift["chosen"], drift["rejected"])
        metrics |= _sides(
            "logratios_per_token",
            _quotient(drift["chosen"], record.chosen_lengths),
            _quotient(drift["rejected"], record.rejected_lengths),
        )
        if drift["chosen"] is not None and drift["rejected"] is not None:
            metrics["displacement"] = likelihood_displacement(drift["chosen"], drift["rejected"])
    return metrics


def _can_rank(loss: Loss, record: LogProbs) -> bool:
    reads = loss.ranking_reads
    return all(getattr(record, name) is not None for name in reads)


def _sides(name: str, chosen: Tensor | None, rejected: Tensor | None) -> dict[str, Tensor]:
    both = {f"{name}/chosen": chosen, f"{name}/rejected": rejected}
    return {key: value.detach() for key, value in both.items() if value is not None}


def _difference(logps: Tensor | None, ref_logps: Tensor | None) -> Tensor | None:
    return None if logps is None or ref_logps is None else logratios(logps, ref_logps)


def _quotient(value: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    return None if value is None or lengths is None else value / lengths
