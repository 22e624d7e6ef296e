"""Losses of a whole list: all scored completions of a prompt at once, K of them, K different from list to list.

A list of two is a pair, and there each of them is a pair loss: Plackett-Luce DPO and InfoNCA are dpo, NCA is
nca_pair. Every completion is compared with those of its own list by one (completions, completions) table: at the
hundred or so completions of a batch it is small beside a single row of logits, and nothing has to be sorted or
padded. Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_losses.hyperparameters import NonNegative, Positive
from prefopt_losses.inputs import ListLogProbs
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.method import Method
from prefopt_losses.score import LIKELIHOOD, LOG_RATIO, MEAN_LIKELIHOOD


def plackett_luce_dpo(*, beta: Positive = 0.1) -> tuple[ListTerm, ...]:
    """DPO of a ranking: each completion must be chosen from among those not better than it.

    Only the order of the scores counts. Completions of equal score stand in each other's way, so they are drawn
    together (Breslow's likelihood of ties).

    Args:
        beta: as in dpo.
    """
    return (ListTerm(plackett_luce, LOG_RATIO, beta=beta),)


def infonca(*, beta: Positive = 0.01, alpha: Positive = 1e-4) -> tuple[ListTerm, ...]:
    """InfoNCA: cross-entropy between the softmax of the scores and the softmax of beta times the log-ratios.

    Args:
        beta: as in dpo.
        alpha: temperature of the scores, in their unit; far below their differences the best takes all.
    """
    return (ListTerm(SoftmaxCrossEntropy(alpha), LOG_RATIO, beta=beta),)


def nca_list(*, beta: Positive = 0.01, alpha: Positive = 1e-4) -> tuple[ListTerm, ...]:
    """Noise Contrastive Alignment of a list: each log-ratio up by its share of the scores, all down a little.

    Args:
        beta: as in dpo.
        alpha: temperature of the scores, in their unit; far below their differences the best takes all.
    """
    return (ListTerm(NoiseContrast(alpha), LOG_RATIO, beta=beta),)


def rrhf(*, rrhf_weight: NonNegative = 1.0, normalize: Literal["sum", "mean"] = "sum") -> tuple[ListTerm, ...]:
    """Rank Responses: likelihoods per token must order as the scores do, plus the NLL of the best completion.

    Args:
        rrhf_weight: factor of the ranking loss.
        normalize: the NLL of the best completion summed over its tokens ("sum"), or averaged ("mean").
    """
    best = MEAN_LIKELIHOOD if normalize == "mean" else LIKELIHOOD
    return (
        ListTerm(ranking_hinge, MEAN_LIKELIHOOD, coefficient=rrhf_weight),
        ListTerm(negative_best, best),
    )


def plackett_luce(x: Tensor, record: ListLogProbs) -> Tensor:
    """Return -sum_k log( exp(x_k) / sum of exp(x_j) over the j of the list not better than k ), (lists,)."""
    scores = _scores(record)
    remaining = _same_list(record) & (scores[None, :] <= scores[:, None])
    return _sum_of_lists(_logsumexp_over(remaining, x) - x, record)


def ranking_hinge(x: Tensor, record: ListLogProbs) -> Tensor:
    """Return the sum of max(0, x_i - x_j) over the pairs of a list in which j has the higher score, (lists,)."""
    scores = _scores(record)
    misordered = _same_list(record) & (scores[:, None] < scores[None, :])
    ahead = torch.relu(x[:, None] - x[None, :]).masked_fill(~misordered, 0)
    return _sum_of_lists(ahead.sum(-1), record)


def negative_best(x: Tensor, record: ListLogProbs) -> Tensor:
    """Return -x of the completion with the highest score, their mean where several have it, (lists,)."""
    scores = _scores(record)
    beaten = (_same_list(record) & (scores[None, :] > scores[:, None])).any(-1)
    best = (~beaten).to(x.dtype)
    return _sum_of_lists(-x * best, record) / _sum_of_lists(best, record).clamp(min=1)


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """-sum_k t_k log softmax(x)_k with targets t = softmax(scores / alpha), over each list."""

    alpha: float

    def __call__(self, x: Tensor, record: ListLogProbs) -> Tensor:
        """Return (lists,)."""
        logs = x - _logsumexp_over(_same_list(record), x)
        return _sum_of_lists(-_targets(record, self.alpha, x.dtype) * logs, record)


@dataclass(frozen=True)
class NoiseContrast:
    """-sum_k ( t_k log s(x_k) + log s(-x_k) / K ) with targets t = softmax(scores / alpha), over each list."""

    alpha: float

    def __call__(self, x: Tensor, record: ListLogProbs) -> Tensor:
        """Return (lists,)."""
        share = 1 / _same_list(record).sum(-1).to(x.dtype)
        drawn = _targets(record, self.alpha, x.dtype) * F.logsigmoid(x) + share * F.logsigmoid(-x)
        return _sum_of_lists(-drawn, record)


def _scores(record: ListLogProbs) -> Tensor:
    assert record.scores is not None  # in `reads`, so Loss has looked
    return record.scores


def _targets(record: ListLogProbs, alpha: float, dtype: torch.dtype) -> Tensor:
    """Return the softmax of scores / alpha over each list, (completions,)."""
    logits = _scores(record).to(dtype) / alpha
    return torch.exp(logits - _logsumexp_over(_same_list(record), logits))


def _same_list(record: ListLogProbs) -> Tensor:
    """Return (completions, completions) bool: whether two completions answer one prompt."""
    return record.lists[:, None] == record.lists[None, :]


def _logsumexp_over(members: Tensor, x: Tensor) -> Tensor:
    """Return log sum of exp(x_j) over the members j of each row; every row has one, so it is finite."""
    return torch.logsumexp(x.expand_as(members).masked_fill(~members, -torch.inf), dim=-1)


def _sum_of_lists(values: Tensor, record: ListLogProbs) -> Tensor:
    """Return the sum over each list's completions, (lists,)."""
    return values.new_zeros(record.size).index_add(0, record.lists, values)


NCA = ("Chen et al. 2024", "2402.05369")
_TEMPERATURE = (
    "alpha divides the scores; its default, that of the authors' code (temperature_alpha), all but picks the best. "
    "Their code adds 0.01 to the first completion's score, which breaks ties for it; here ties share."
)

# fmt: off
ROWS: dict[str, Method] = {
    "plackett_luce_dpo": Method(
        plackett_luce_dpo, "-sum_k log( exp(beta u_k) / sum_{j not better than k} exp(beta u_j) )",
        "Rafailov et al. 2023", "2305.18290", "appendix A.3",
        note="With two completions it is dpo. The paper has no ties; here equal completions are drawn together, as in "
        "Breslow's likelihood.",
        also=("dpo_pl", "listwise_dpo"),
    ),
    "infonca": Method(
        infonca, "-sum_k t_k log softmax(beta u)_k,  t = softmax(scores / alpha)", *NCA,
        note=f"With two completions and alpha to 0 it is dpo. {_TEMPERATURE}",
        foreign={"temperature_alpha": "it is called alpha here."},
    ),
    "nca_list": Method(
        nca_list, "-sum_k ( t_k log s(beta u_k) + log s(-beta u_k) / K ),  t = softmax(scores / alpha)", *NCA,
        note=f"The paper's NCA of rewards. With two completions and alpha to 0 it is nca_pair. {_TEMPERATURE}",
        foreign={"temperature_alpha": "it is called alpha here."},
    ),
    "rrhf": Method(
        rrhf, "weight sum_{s_i < s_j} max(0, l̄_i - l̄_j) - l_best", "Yuan et al. 2023", "2304.05302",
        note="As the paper: weight 1, the NLL summed over tokens. The authors' code multiplies the ranking loss by "
        "100 and averages the NLL over tokens, padding included (rrhf_weight: 100, normalize: mean comes nearest).",
        foreign={
            "length_penalty": "likelihoods are per token here (length_penalty 1).",
            "beta": "rrhf has none; rrhf_weight multiplies its ranking loss.",
        },
    ),
}
# fmt: on
