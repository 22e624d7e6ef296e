"""A loss: named terms with one contract, closed under sums and multiples.

    loss = get_loss("dpo", beta=0.1) + 0.5 * get_loss("sft")
    loss(record)             (batch,) one value per example, unreduced, differentiable
    loss.margin(record)      (batch,) the margin this very loss ranks by: accuracies are taken from it
    loss.needs               what the record must hold
    loss.config              what builds it again: loss_from_config(loss.config)

A published method brings its terms from the table; a loss of one's own is `Loss("mine", terms=(Term(...),))`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from prefopt_losses.conventions import conventions_of
from prefopt_losses.errors import LossError
from prefopt_losses.inputs import ListLogProbs, LogProbs, UnpairedLogProbs
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.needs import Needs, needs_of
from prefopt_losses.tensors import PAIR_TENSORS, require
from prefopt_losses.terms import PAIR, FromRecord, Running, Term


@dataclass(frozen=True, repr=False)
class Loss:
    """A preference loss: of one published method, or a weighted sum of several."""

    name: str
    terms: tuple[Term | ListTerm, ...]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Every hyper-parameter, defaults included; of a sum: by the name of the part, with its weight."""
    note: str = ""
    """What the method's hyper-parameters mean here, and where other tools differ."""
    parts: tuple[tuple[float, Loss], ...] = ()
    """Of a sum: weights and methods. Empty for one method."""

    def __post_init__(self) -> None:
        if len({isinstance(term, ListTerm) for term in self.terms}) > 1:
            raise LossError(
                f"{self.name}: a loss of lists and a loss of pairs cannot be added; they take other batches."
            )
        names = [number.name for number in self.running]
        if len(names) != len(set(names)):
            raise LossError(f"{self.name}: two parts carry a running {names[0]}; use the method once.")

    def __repr__(self) -> str:
        """Return the call, or the sum, that makes this loss."""
        if self.parts:
            return " + ".join(f"{weight:g} * {part!r}" if weight != 1 else repr(part) for weight, part in self.parts)
        return (
            ", ".join([f'Loss("{self.name}"', *(f"{key}={value!r}" for key, value in self.hyperparameters.items())])
            + ")"
        )

    def __call__(self, record: LogProbs | ListLogProbs, *, check: bool = True) -> Tensor:
        """Return one value per example, shape (batch,), unreduced and differentiable; of lists (lists,).

        `check=False` skips the look for NaN and empty completions (one device synchronisation). Under
        torch.compile it is skipped anyway.

        Raises LossError when the record lacks a tensor the loss needs or holds unusable values.
        """
        self._require(record, check=check)
        return self._evaluate(self._with_state(record) if isinstance(record, LogProbs) else record)

    def unpaired(self, record: UnpairedLogProbs, *, check: bool = True) -> Tensor:
        """Return one value per completion, shape (batch,): desirable ones take the chosen terms.

        Undesirable completions take the rejected terms; a side without terms (sft: rejected) is worth 0.

        Raises LossError for a loss that contrasts two completions, and as `__call__` does.
        """
        if self.needs.pairs or self.needs.lists:
            raise LossError(
                f"{self.name}: contrasts chosen with rejected completions, so unpaired feedback will not do. "
                "Use a loss of single completions (kto, bco, nca_pair, sppo_hard, apo_zero, sft), or pairs."
            )
        both = record.both_sides()
        if "preference_probability" in self.needs.tensors:
            raise LossError(
                f"{self.name}: reads preference_probability, which unpaired feedback does not have. "
                "Use a loss of hard labels (sppo_hard, kto)."
            )
        self._require(both, check=check)
        both = self._with_state(both)
        return torch.where(record.desirable, self._side(0, both), self._side(1, both))

    def margin(self, record: LogProbs) -> Tensor:
        """Return beta * (s_chosen - s_rejected) before any shift, shape (batch,).

        Score and beta are those of the first pair term, else of the first term; a loss without beta (sft,
        orpo) has beta = 1, so its margin is the plain difference of scores. The loss and the accuracy
        therefore always rank by the same number: per-token means for ipo and simpo, log-odds for orpo.
        """
        chosen, rejected = self.rewards(record)
        return chosen - rejected

    def rewards(self, record: LogProbs) -> tuple[Tensor, Tensor]:
        """Return beta * s of the chosen and of the rejected completions, each of shape (batch,)."""
        term = self.ranking_term
        require(record, in_order(self.ranking_reads), f"the margin of {self.name}", check=False)
        beta = term.scale(self._with_state(record))
        return beta * term.score_chosen(record), beta * term.score_rejected(record)

    def initial_state(self) -> dict[str, Tensor]:
        """Return the numbers that the loss carries from step to step, before the first one; fp64, on the CPU."""
        return {number.name: torch.tensor(number.start, dtype=torch.float64) for number in self.running}

    @torch.no_grad()
    def advance(
        self, record: LogProbs | UnpairedLogProbs | ListLogProbs, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the carried numbers after one more optimizer step; pure.

        Args:
            record: the whole step's, all micro-batches and processes; never one of evaluation.
            state: the numbers before it.
        """
        pairs = record.both_sides() if isinstance(record, UnpairedLogProbs) else record
        if not self.running or isinstance(pairs, ListLogProbs):
            return dict(state)
        with_state = replace(pairs, state=state)
        return {number.name: number.update(state[number.name], with_state) for number in self.running}

    @property
    def running(self) -> tuple[Running, ...]:
        """The numbers that the loss carries from step to step."""
        return tuple(dict.fromkeys(number for term in self.terms for number in term.running))

    @property
    def ranking_term(self) -> Term | ListTerm:
        """The term whose score and beta define rewards and margins."""
        return next((term for term in self.terms if term.contrast == PAIR), self._first_contrast)

    @property
    def ranking_reads(self) -> frozenset[str]:
        """The fields of `LogProbs` that rewards and margins need."""
        term = self.ranking_term
        beta = term.beta.reads if isinstance(term.beta, FromRecord) else ()
        return term.reads_of("chosen", "rejected").union(beta)

    @property
    def needs(self) -> Needs:
        """What the record must hold, and what else the loss asks of a training loop."""
        return needs_of(self.terms)

    @property
    def config(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What `loss_from_config` builds this loss from again."""
        if self.parts:
            return [{"name": p.name, "weight": weight, **p.hyperparameters} for weight, p in self.parts]
        return {"name": self.name, **self.hyperparameters}

    @property
    def conventions(self) -> dict[str, str]:
        """How its numbers are to be read, spelled out; of a sum: by part."""
        if self.parts:
            return {
                f"{key}: {name}": text
                for key, (_, part) in _keyed(self.parts).items()
                for name, text in part.conventions.items()
            }
        return conventions_of(self)

    def __add__(self, other: Loss) -> Loss:
        return _sum(self._as_parts() + other._as_parts()) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, weight: float) -> Loss:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            return NotImplemented
        if not (math.isfinite(weight) and weight >= 0):
            raise LossError(f"weight of {self.name}: expected a finite number >= 0, given {weight}")
        return _sum(tuple((float(weight) * inner, part) for inner, part in self._as_parts()))

    __rmul__ = __mul__

    @property
    def _first_contrast(self) -> Term | ListTerm:
        both = (term for term in self.terms if all(term.contrast))
        return next(both, next((term for term in self.terms if any(term.contrast)), self.terms[0]))

    def _as_parts(self) -> tuple[tuple[float, Loss], ...]:
        return self.parts or ((1.0, self),)

    def _require(self, record: LogProbs | ListLogProbs, *, check: bool) -> None:
        needs = self.needs
        if needs.lists != isinstance(record, ListLogProbs):
            wish = "ListLogProbs (all completions of each prompt)" if needs.lists else "LogProbs (pairs)"
            raise LossError(f"{self.name}: expected {wish}, given {type(record).__name__}.")
        require(record, needs.tensors, self.name, check=check)
        if isinstance(record, ListLogProbs) and check and not torch.compiler.is_compiling():
            record.check_numbers()
        size = next((len(getattr(record, name)) for name in needs.tensors), needs.minimum_batch)
        if size < needs.minimum_batch:
            reason = f", for {', '.join(needs.batch)} is taken over the batch" if needs.minimum_batch > 1 else ""
            raise LossError(
                f"{self.name}: expected at least {needs.minimum_batch} example{'s' if reason else ''}{reason}, "
                f"given {size}. {'Use a larger batch' if reason else 'Leave empty batches out'}."
            )

    def _with_state(self, record: LogProbs) -> LogProbs:
        """Return the record with the carried numbers in it: those of this batch alone where it brings none."""
        if record.state is not None or not self.running:
            return record
        return replace(record, state=self.advance(record, self.initial_state()))

    def _evaluate(self, record: LogProbs | ListLogProbs) -> Tensor:
        if self.parts:
            return _added([weight * part._evaluate(record) for weight, part in self.parts])
        return _added([term(record) for term in self.terms])  # type: ignore[arg-type]

    def _side(self, side: int, record: LogProbs) -> Tensor:
        values = [term(record) for term in self.terms if term.contrast[side]]  # type: ignore[arg-type]
        return _added(values) if values else torch.zeros_like(self.terms[0](record))  # type: ignore[arg-type]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of pair tensors in the order of their table."""
    wanted = frozenset(names)
    return tuple(name for name in PAIR_TENSORS if name in wanted)


def _added(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _sum(parts: tuple[tuple[float, Loss], ...]) -> Loss:
    keyed = _keyed(parts)
    return Loss(
        name="+".join(part.name if weight == 1.0 else f"{weight:g}*{part.name}" for weight, part in parts),
        terms=tuple(term.scaled(weight) for weight, part in parts for term in part.terms),
        hyperparameters={key: {"weight": weight, **part.hyperparameters} for key, (weight, part) in keyed.items()},
        parts=parts,
    )


def _keyed(parts: tuple[tuple[float, Loss], ...]) -> dict[str, tuple[float, Loss]]:
    """Name the parts; the second of two `dpo` is `dpo#2`."""
    keyed: dict[str, tuple[float, Loss]] = {}
    for weight, part in parts:
        same = sum(other.name == part.name for _, other in keyed.values())
        keyed[f"{part.name}#{same + 1}" if same else part.name] = (weight, part)
    return keyed
