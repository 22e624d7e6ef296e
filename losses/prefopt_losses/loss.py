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
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from prefopt_losses.errors import LossError
from prefopt_losses.inputs import TENSORS, LogProbs, UnpairedLogProbs, require
from prefopt_losses.terms import PAIR, FromRecord, Term, function_name


@dataclass(frozen=True)
class Needs:
    """What a loss reads, and whether it compares two completions."""

    tensors: tuple[str, ...]
    """Fields of `LogProbs` that must be there."""
    pairs: bool
    """True: it contrasts chosen with rejected and cannot be used on unpaired feedback."""
    step_tokens: bool
    """True: it holds a token mean, which decomposes over micro-batches only with `tokens_per_example`."""

    @property
    def reference(self) -> bool:
        """Whether reference log-probs are needed."""
        return "ref_chosen_logps" in self.tensors or "ref_rejected_logps" in self.tensors

    @property
    def chosen(self) -> bool:
        """Whether chosen completions are needed."""
        return "chosen_logps" in self.tensors

    @property
    def rejected(self) -> bool:
        """Whether rejected completions are needed."""
        return "rejected_logps" in self.tensors

    @property
    def lengths(self) -> bool:
        """Whether completion lengths are needed, of either side."""
        return "chosen_lengths" in self.tensors or "rejected_lengths" in self.tensors

    @property
    def preference_probability(self) -> bool:
        """Whether soft labels are needed."""
        return "preference_probability" in self.tensors


@dataclass(frozen=True)
class Loss:
    """A preference loss: of one published method, or a weighted sum of several."""

    name: str
    terms: tuple[Term, ...]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Every hyper-parameter, defaults included; of a sum: by the name of the part, with its weight."""
    note: str = ""
    """What the method's hyper-parameters mean here, and where other tools differ."""
    parts: tuple[tuple[float, Loss], ...] = ()
    """Of a sum: weights and methods. Empty for one method."""

    def __call__(self, record: LogProbs, *, check: bool = True) -> Tensor:
        """Return one value per example, shape (batch,), unreduced and differentiable.

        `check=False` skips the look for NaN and empty completions (one device synchronisation). Under
        torch.compile it is skipped anyway.

        Raises LossError when the record lacks a tensor the loss needs or holds unusable values.
        """
        require(record, self.needs.tensors, self.name, check=check)
        return self._evaluate(record)

    def unpaired(self, record: UnpairedLogProbs, *, check: bool = True) -> Tensor:
        """Return one value per completion, shape (batch,): desirable ones take the chosen terms.

        Undesirable completions take the rejected terms; a side without terms (sft: rejected) is worth 0.

        Raises LossError for a loss that contrasts two completions, and as `__call__` does.
        """
        if self.needs.pairs:
            raise LossError(
                f"{self.name}: contrasts chosen with rejected completions, so unpaired feedback will not do. "
                "Use a loss of single completions (bco_pair, nca_pair, sppo_hard, apo_zero, sft), or pairs."
            )
        both = record.both_sides()
        require(both, self.needs.tensors, self.name, check=check)
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
        names = term.reads_of("chosen", "rejected")
        ordered = tuple(name for name in TENSORS if name in names)
        require(record, ordered, f"the margin of {self.name}", check=False)
        return term.beta * term.score_chosen(record), term.beta * term.score_rejected(record)

    @property
    def ranking_term(self) -> Term:
        """The term whose score and beta define rewards and margins."""
        return next((term for term in self.terms if term.contrast == PAIR), self.terms[0])

    @property
    def needs(self) -> Needs:
        """What the record must hold."""
        reads = frozenset().union(*(term.reads for term in self.terms))
        return Needs(
            tensors=tuple(name for name in TENSORS if name in reads),
            pairs=any(all(term.contrast) for term in self.terms),
            step_tokens=any(term.unit == "token" for term in self.terms),
        )

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
        return _conventions(self)

    def __add__(self, other: Loss) -> Loss:
        return _sum(self._as_parts() + other._as_parts()) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, weight: float) -> Loss:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            return NotImplemented
        if not (math.isfinite(weight) and weight >= 0):
            raise LossError(f"weight of {self.name}: expected a finite number >= 0, given {weight}")
        return _sum(tuple((float(weight) * inner, part) for inner, part in self._as_parts()))

    __rmul__ = __mul__

    def _as_parts(self) -> tuple[tuple[float, Loss], ...]:
        return self.parts or ((1.0, self),)

    def _evaluate(self, record: LogProbs) -> Tensor:
        if self.parts:
            return _added([weight * part._evaluate(record) for weight, part in self.parts])
        return _added([term(record) for term in self.terms])

    def _side(self, side: int, record: LogProbs) -> Tensor:
        values = [term(record) for term in self.terms if term.contrast[side]]
        return _added(values) if values else torch.zeros_like(self.terms[0](record))


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


def _conventions(loss: Loss) -> dict[str, str]:
    """Spell out the conventions of one method, from the term that ranks."""
    term = loss.ranking_term
    per_token = term.score.aggregate == "mean"
    link = function_name(term.score.link)
    spelled = {
        "function": ", ".join(dict.fromkeys(function_name(each.f) for each in loss.terms)),
        "aggregate": f"{'mean' if per_token else 'sum'} over completion tokens",
        "reference": "policy minus reference" if term.score.reference else "none",
        "beta": f"{_spelled_beta(loss, term)} per nat{' per token' if per_token else ''}",
        "margin": "beta * (s_chosen - s_rejected), before any shift",
        "label": term.q.name if isinstance(term.q, FromRecord) else f"q = {term.q:g}",
        "reduction": "none: one value per example; take the mean over the examples of the optimizer step",
    }
    if link != "identity":
        spelled["aggregate"] = f"{link} of the {spelled['aggregate']}"
    if "beta" not in loss.hyperparameters and term.beta == 1:
        spelled["beta"] = "1: the method has none"
    if term.shift != 0.0:
        spelled["shift"] = f"{term.coordinates()['shift']} in the unit of the score"
    if loss.needs.step_tokens:
        spelled["nll"] = "token mean over the optimizer step; over the batch given without tokens_per_example"
    return spelled | ({"note": loss.note} if loss.note else {})


def _spelled_beta(loss: Loss, term: Term) -> str:
    """The method's own beta, and where it differs (ipo, sppo) the GPO beta that multiplies the contrast."""
    own = loss.hyperparameters.get("beta")
    gpo = f"{term.beta:g}"
    return gpo if own is None or f"{own:g}" == gpo else f"{own:g} (f sees {gpo})"
