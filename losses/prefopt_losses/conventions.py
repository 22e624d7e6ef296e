"""How the numbers of a loss are to be read: sum or mean, reference or none, the unit of beta, the label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt_losses.list_terms import ListTerm
from prefopt_losses.terms import FromRecord, Term, function_name

if TYPE_CHECKING:
    from prefopt_losses.loss import Loss

AGGREGATES = {"sum": "sum over completion tokens", "mean": "mean over completion tokens"}


def conventions_of(loss: Loss) -> dict[str, str]:
    """Spell out the conventions of one method, from the term that ranks."""
    term = loss.ranking_term
    per_token = term.score.aggregate == "mean"
    link = function_name(term.score.link)
    name = term.score.aggregate_name
    aggregate = AGGREGATES.get(name, f"{name}: weighted sum over completion tokens")
    spelled = {
        "function": ", ".join(dict.fromkeys(_function(each) for each in loss.terms)),
        "aggregate": aggregate if link == "identity" else f"{link} of the {aggregate}",
        "reference": "policy minus reference" if term.score.reference else "none",
        "beta": f"{_spelled_beta(loss, term)} per nat{' per token' if per_token else ''}",
        "margin": "beta * (s_chosen - s_rejected), before any shift",
        **_of_term(term),
        "reduction": f"none: one value per {'list' if loss.needs.lists else 'example'}; take the mean over those "
        "of the optimizer step",
    }
    if "beta" not in loss.hyperparameters and term.beta == 1:
        spelled["beta"] = "1: the method has none"
    if loss.needs.step_tokens:
        spelled["nll"] = "token mean over the optimizer step; over the batch given without tokens_per_example"
    if loss.needs.batch:
        spelled["batch"] = f"{', '.join(loss.needs.batch)}: taken over the whole optimizer step"
    if loss.needs.state:
        spelled["state"] = f"{', '.join(loss.needs.state)}: carried from step to step, not moved by evaluation"
    return spelled | ({"note": loss.note} if loss.note else {})


def _of_term(term: Term | ListTerm) -> dict[str, str]:
    if isinstance(term, ListTerm):
        return {}
    label = {"label": term.q.name if isinstance(term.q, FromRecord) else f"q = {term.q:g}"}
    if isinstance(term.shift, FromRecord) or term.shift != 0.0:
        label["shift"] = f"{term.coordinates()['shift']} in the unit of the score"
    return label


def _function(term: Term | ListTerm) -> str:
    return function_name(term.reduce if isinstance(term, ListTerm) else term.f)


def _spelled_beta(loss: Loss, term: Term | ListTerm) -> str:
    """The method's own beta, and where it differs (ipo, sppo) the GPO beta that multiplies the contrast."""
    own = loss.hyperparameters.get("beta")
    if isinstance(term.beta, FromRecord):
        return f"{own:g} at rest, {term.beta.name} in training" if own is not None else term.beta.name
    gpo = f"{term.beta:g}"
    return gpo if own is None or f"{own:g}" == gpo else f"{own:g} (f sees {gpo})"
