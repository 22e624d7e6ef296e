"""What of TRL's options and data a loss of ours can use; everything else is refused, with the reason and a way out.

TRL's batches hold pairs, scored in full by the policy and as sums by the reference, and the columns of the data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from trl import DPOConfig

from prefopt.errors import DataError, Problem, UserError
from prefopt_losses import Loss

COLUMNS = ("preference_probability", "chosen_scores", "rejected_scores", "values")
"""What a loss may read from columns of the data set."""
_SIDES = ("chosen", "rejected")
_FROM_POLICY = {f"{side}_{what}" for side in _SIDES for what in ("logps", "token_logps", "relative_logps", "lengths")}
_FROM_REFERENCE = {f"ref_{side}_{what}" for side in _SIDES for what in ("logps", "token_logps")}

# Options of DPOConfig that belong to TRL's own losses, and what says the same here.
_OPTIONS_OF_TRL_LOSSES = {
    "loss_type": "pass it to the trainer: loss=...",
    "loss_weights": 'write a sum: loss="dpo+0.5*sft"',
    "label_smoothing": 'loss={"name": "cdpo", "label_smoothing": ...}, or robust_dpo',
    "f_divergence_type": "take a loss of another divergence, see `prefopt losses`",
    "f_alpha_divergence_coef": "take a loss of another divergence, see `prefopt losses`",
    "ld_alpha": "take a loss that weighs tokens, see `prefopt losses`",
    "use_weighting": "take a loss that weighs pairs, see `prefopt losses`",
    "discopop_tau": "take the loss itself, see `prefopt losses`",
}


def check_options(loss: Loss, args: DPOConfig, ref_model: nn.Module | None) -> None:
    """Raise UserError, with every reason, unless TRL can feed the loss and every option is read by somebody."""
    problems = [*unfed(loss, args), *unread(loss, args, ref_model)]
    if problems:
        raise UserError(problems)


def unfed(loss: Loss, args: DPOConfig) -> list[Problem]:
    """Say what the loss reads and TRL's data path cannot give."""
    reads = set(loss.needs.tensors)
    elsewhere = "`prefopt train` with this loss gives it"
    problems = [
        Problem(f"loss {loss.name}", f"reads {name}, which TRL's batches of pairs do not hold", fix=elsewhere)
        for name in sorted(reads - _FROM_POLICY - _FROM_REFERENCE - set(COLUMNS))
    ]
    if any(name.startswith("ref_") and "token" in name for name in reads) and args.precompute_ref_log_probs:
        problems.append(
            Problem(
                "args.precompute_ref_log_probs",
                f"{loss.name} weighs tokens, and TRL's precomputed columns hold only sums",
                "True",
                "leave it False, or use `prefopt train`, whose cache holds tokens",
            )
        )
    coupled = tuple(dict.fromkeys((*loss.needs.batch, *loss.needs.state)))
    cut = {"gradient_accumulation_steps": args.gradient_accumulation_steps, "processes": args.world_size}
    if coupled and max(cut.values()) > 1:
        given = ", ".join(f"{name}={value}" for name, value in cut.items())
        problems.append(
            Problem(
                f"loss {loss.name}",
                f"takes {', '.join(coupled)} over the whole optimizer step, and TRL shows it one micro-batch at a time",
                given,
                "one process with gradient_accumulation_steps=1, or `prefopt train`",
            )
        )
    if loss.needs.minimum_batch > 1 and not args.dataloader_drop_last:
        problems.append(
            Problem(
                "args.dataloader_drop_last",
                f"{loss.name} needs {loss.needs.minimum_batch} pairs in a batch, and an epoch's last may hold fewer",
                "False",
                "True",
            )
        )
    return problems


def unread(loss: Loss, args: DPOConfig, ref_model: nn.Module | None) -> list[Problem]:
    """Say which options this trainer would not read."""
    ours = "the loss is this trainer's `loss`; leave this option at its default"
    problems = [
        Problem(f"args.{name}", ours, repr(getattr(args, name)), fix)
        for name, fix in _OPTIONS_OF_TRL_LOSSES.items()
        if getattr(args, name) != _default(name)
    ]
    if args.beta not in (_default("beta"), loss.hyperparameters.get("beta")):
        problems.append(_unread_beta(loss, args.beta))
    if not loss.needs.reference:
        unused = {
            "ref_model": ref_model is not None,
            "args.precompute_ref_log_probs": args.precompute_ref_log_probs,
            "args.sync_ref_model": args.sync_ref_model,
        }
        fix = "leave it out, or take a loss with a reference"
        problems += [
            Problem(where, f"{loss.name} reads no reference", fix=fix) for where, given in unused.items() if given
        ]
    return problems


def _unread_beta(loss: Loss, given: float) -> Problem:
    own = loss.hyperparameters.get("beta")
    if loss.parts:
        expected, fix = "each part brings its own beta", "set it in the loss, leave this option out"
    elif own is None:
        expected, fix = "has no beta", "leave this option out"
    else:
        expected, fix = f"brings its own beta, {own!r}", f'loss={{"name": "{loss.name}", "beta": {given!r}}}'
    return Problem("args.beta", f"{loss.name}: {expected}", repr(given), fix)


def _default(option: str) -> Any:
    (field,) = (each for each in fields(DPOConfig) if each.name == option)
    return field.default_factory() if callable(field.default_factory) else field.default


def columns_of(loss: Loss, given: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that the loss reads, {its name: the data set's}."""
    wanted = [name for name in COLUMNS if name in loss.needs.tensors]
    idle = [name for name in given if name not in wanted]
    if idle:
        reads = ", ".join(wanted) or "none"
        raise UserError(
            [
                Problem(f"columns.{name}", f"{loss.name} reads no such column", given[name], f"it reads: {reads}")
                for name in idle
            ]
        )
    return {name: given.get(name, name) for name in wanted}


def look_for_columns(columns: Mapping[str, str], datasets: Mapping[str, Any]) -> None:
    """Raise DataError unless every data set holds every column that the loss reads.

    Args:
        columns: {name of the loss: column}.
        datasets: by argument of the trainer; one, several by name, or None.
    """
    problems = []
    for where, dataset in _each(datasets) if columns else ():
        there = list(next(iter(dataset), {}))
        problems += [
            missing_column(where, field, column, there) for field, column in columns.items() if column not in there
        ]
    if problems:
        raise DataError(problems)


def missing_column(where: str, field: str, column: str, there: list[str]) -> Problem:
    """Say which column is missing, and those that are there."""
    return Problem(
        where,
        f"the loss reads a column {column!r}",
        f"columns {', '.join(there)}",
        f'add it, or name the one that holds {field}: columns={{"{field}": ...}}',
    )


def _each(datasets: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for where, given in datasets.items():
        if isinstance(given, Mapping):
            yield from ((f"{where}[{name!r}]", dataset) for name, dataset in given.items())
        elif given is not None:
            yield where, given
