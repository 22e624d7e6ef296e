"""Losses without a reference model: NLL, and pair losses held in place by it, by lengths or by a margin.

Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.hyperparameters import NonNegative, Positive
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.score import Score, log_odds, widened
from prefopt_losses.terms import CHOSEN, FromRecord, Term

LIKELIHOOD = Score(aggregate="sum", reference=False)
MEAN_LIKELIHOOD = Score(aggregate="mean", reference=False)
LOG_ODDS = Score(aggregate="mean", reference=False, link=log_odds)


def sft(*, normalize: Literal["token", "sequence"] = "token") -> tuple[Term, ...]:
    """Supervised fine-tuning: negative log-likelihood of the chosen completion, prompt excluded.

    Args:
        normalize: "token": every token of the optimizer step weighs the same (long completions weigh more);
            "sequence": every completion weighs the same.
    """
    weight = TOKEN_SHARE if normalize == "token" else 1.0
    return (Term(convex.linear, MEAN_LIKELIHOOD, CHOSEN, weight=weight),)


def slic_hf(*, delta: NonNegative = 1.0, lambda_coef: NonNegative = 0.1) -> tuple[Term, ...]:
    """SLiC-HF: a hinge on plain log-likelihoods, plus the NLL of the chosen completion as regulariser.

    Args:
        delta: margin by which the chosen completion must be likelier, in nats of the whole completion.
        lambda_coef: the paper's lambda, weight of the NLL; summed over tokens, like the hinge.
    """
    # hinge(x) = max(0, 1 - x): shifting by delta - 1 makes it max(0, delta - (l_w - l_l)).
    return (
        Term(convex.hinge, LIKELIHOOD, shift=delta - 1),
        Term(convex.linear, LIKELIHOOD, CHOSEN, coefficient=lambda_coef),
    )


def simpo(*, beta: Positive = 2.0, gamma_beta_ratio: NonNegative = 0.25) -> tuple[Term, ...]:
    """SimPO: the likelihood per token is the reward, and the winner must lead by a target margin.

    Args:
        beta: scale of the reward, per nat per token.
        gamma_beta_ratio: target margin gamma / beta, in nats per token: subtracted before beta multiplies.
    """
    return (Term(convex.logistic, MEAN_LIKELIHOOD, beta=beta, shift=gamma_beta_ratio),)


def cpo(*, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Term, ...]:
    """Contrastive Preference Optimization: DPO under a uniform reference, plus NLL.

    Args:
        beta: per nat of the whole completion.
        alpha: weight of the token-mean NLL of the chosen completion.
    """
    pair = Term(convex.logistic, LIKELIHOOD, beta=beta)
    return (pair, *(term.scaled(alpha) for term in sft()))


def orpo(*, lambda_coef: NonNegative = 0.1) -> tuple[Term, ...]:
    """Odds Ratio Preference Optimization: NLL plus a logistic loss on the log odds ratio.

    Args:
        lambda_coef: the paper's lambda, weight of the odds-ratio term. The NLL is the token mean.
    """
    return (Term(convex.logistic, LOG_ODDS, coefficient=lambda_coef), *sft())


def _token_share(record: LogProbs) -> Tensor:
    """|y| / mean |y|: turns the mean over completions of a token mean into the mean over all tokens."""
    assert record.chosen_logps is not None  # both are in `reads`, so Loss has looked
    assert record.chosen_lengths is not None
    lengths = record.chosen_lengths.to(widened(record.chosen_logps).dtype)
    step_mean = record.tokens_per_example
    return lengths / (lengths.mean() if step_mean is None else step_mean)


TOKEN_SHARE = FromRecord("token_share", reads=("chosen_lengths",), value=_token_share, unit="token")


_RATIO = "that is the absolute margin gamma = beta * gamma_beta_ratio. Pass gamma_beta_ratio = gamma / beta ({})."

# fmt: off
ROWS: dict[str, Method] = {
    "slic_hf": Method(
        slic_hf, "max(0, delta - l_w + l_l) - lambda l_w", "Zhao et al. 2023", "2305.10425", "eq. 4",
        note="The target of the NLL is the chosen completion; hinge and NLL are both summed over tokens.",
        also=("slic",),
        foreign={"lambda": "it is called lambda_coef here.", "beta": "SLiC-HF has none; hinge (RSO) has."},
    ),
    "simpo": Method(
        simpo, "-log s(beta (l̄_w - l̄_l) - gamma),  gamma = beta gamma_beta_ratio", "Meng et al. 2024", "2405.14734",
        "eq. 6", "CPO: simpo, cpo_alpha=0",
        note="gamma_beta_ratio as in the authors' code; simpo_gamma (TRL, LLaMA-Factory) is gamma itself. No NLL: TRL "
        "adds one unless cpo_alpha is 0.",
        foreign={
            "gamma": _RATIO.format("SimPO's paper calls the product gamma"),
            "simpo_gamma": _RATIO.format("TRL: simpo_gamma 0.5 at beta 2.0 is gamma_beta_ratio 0.25"),
            "cpo_alpha": "SimPO has no NLL here. For one, add it: simpo + alpha * sft.",
        },
    ),
    "cpo": Method(
        cpo, "-log s(beta (l_w - l_l)) + alpha nll", "Xu et al. 2024", "2401.08417", trl="CPO: sigmoid",
        note="alpha is TRL's cpo_alpha; the NLL is a mean over tokens.",
        foreign={"cpo_alpha": "it is called alpha here."},
    ),
    "orpo": Method(
        orpo, "nll - lambda log s(o_w - o_l),  o = l̄ - log(1 - exp(l̄))", "Hong et al. 2024", "2403.07691", "eq. 6",
        "ORPO",
        note="lambda_coef is the paper's lambda: beta in TRL, alpha (1.0) in the authors' code. The NLL is over the "
        "completion; TRL's is over prompt and completion.",
        foreign={
            "beta": "nothing multiplies ORPO's log-odds; TRL's beta is the paper's lambda. Pass lambda_coef.",
            "alpha": "the authors' code calls the paper's lambda alpha. Pass lambda_coef.",
            "lambda": "it is called lambda_coef here.",
        },
    ),
    "sft": Method(
        sft, "nll", "maximum likelihood", trl="DPO: sft",
        note="Token mean over the optimizer step, or mean over completions of their token means (sequence).",
        also=("nll",),
    ),
}
# fmt: on
