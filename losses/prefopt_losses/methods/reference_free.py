"""Losses without a reference model: NLL, and pair losses held in place by it, by lengths or by a margin.

Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.hyperparameters import NonNegative, Positive, Real
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.score import LIKELIHOOD, MEAN_LIKELIHOOD, Score, log_odds, widened
from prefopt_losses.terms import CHOSEN, NEITHER, FromRecord, Term

LOG_ODDS = Score(aggregate="mean", reference=False, link=log_odds)
PROBABILITY = Score(aggregate="mean", reference=False, link=torch.exp)


@dataclass(frozen=True)
class AlphaReward:
    """r(x) = (1 - e^(-alpha x)) / alpha of x = log p; x itself at alpha = 0."""

    alpha: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the reward; it overflows to -inf where alpha * x < -88 in fp32."""
        return -torch.expm1(-self.alpha * x) / self.alpha if self.alpha else x


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


def alphapo(*, beta: Positive = 2.5, alpha: Real = 0.25, gamma: NonNegative = 0.1) -> tuple[Term, ...]:
    """AlphaPO: SimPO with a reward of another shape, (1 - p^-alpha) / alpha of the probability per token.

    Args:
        beta: scale of the reward.
        alpha: shape of the reward; 0 is SimPO's log p, above it improbable completions are punished more.
        gamma: target margin, absolute: subtracted after beta has multiplied.
    """
    reward = Score(aggregate="mean", reference=False, link=AlphaReward(alpha))
    return (Term(convex.logistic, reward, beta=beta, shift=gamma / beta),)


def simper() -> tuple[Term, ...]:
    """SimPER: the inverse perplexity of the chosen completion up, of the rejected one down; no hyper-parameters."""
    return (Term(convex.linear, PROBABILITY),)


def repo(*, gamma: NonNegative = 0.6) -> tuple[Term, ...]:
    """RePO: SimPO's margin under a hinge, the limit of SimPO as beta grows.

    Args:
        gamma: target margin, in nats per token; pairs beyond it are left alone. SimPO's gamma / beta.
    """
    # hinge(x) = max(0, 1 - x): shifting by gamma - 1 makes it max(0, gamma - (l̄_w - l̄_l)).
    return (Term(convex.hinge, MEAN_LIKELIHOOD, shift=gamma - 1),)


def cpo(*, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Term, ...]:
    """Contrastive Preference Optimization: DPO under a uniform reference, plus NLL.

    Args:
        beta: per nat of the whole completion.
        alpha: weight of the token-mean NLL of the chosen completion.
    """
    pair = Term(convex.logistic, LIKELIHOOD, beta=beta)
    return (pair, *(term.scaled(alpha) for term in sft()))


def tpo(
    *, beta: Positive = 0.01, alpha: NonNegative = 1.0, normalize: Literal["token", "sequence"] = "token"
) -> tuple[Term, ...]:
    """Triple Preference Optimization: CPO's pair, with the NLL of a third, gold completion instead of the chosen.

    Args:
        beta: per nat of the whole completion.
        alpha: weight of the NLL of the gold completion.
        normalize: of that NLL, as in sft; "token" couples the examples of a step, "sequence" does not.
    """
    return (Term(convex.logistic, LIKELIHOOD, beta=beta), _gold_nll(alpha, normalize))


def tpo_l(
    *,
    beta: Positive = 0.01,
    gamma: NonNegative = 0.5,
    alpha: NonNegative = 1.0,
    normalize: Literal["token", "sequence"] = "token",
) -> tuple[Term, ...]:
    """TPO-L: tpo with the likelihood per token as reward, and a target margin.

    Args:
        beta: scale of the reward, per nat per token.
        gamma: target margin, absolute: subtracted after beta has multiplied.
        alpha: weight of the NLL of the gold completion.
        normalize: of that NLL, as in tpo.
    """
    return (Term(convex.logistic, MEAN_LIKELIHOOD, beta=beta, shift=gamma / beta), _gold_nll(alpha, normalize))


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


def _gold_nll(alpha: float, normalize: Literal["token", "sequence"]) -> Term:
    # The gold completion is on neither side of the contrast: x = -shift, and linear(x) = shift.
    shift = GOLD_NLL_PER_STEP_TOKEN if normalize == "token" else GOLD_NLL_PER_TOKEN
    return Term(convex.linear, MEAN_LIKELIHOOD, NEITHER, shift=shift, coefficient=alpha)


def _gold_nll_per_token(record: LogProbs) -> Tensor:
    assert record.gold_logps is not None  # both are in `reads`, so Loss has looked
    assert record.gold_lengths is not None
    return -widened(record.gold_logps) / record.gold_lengths


def _gold_nll_per_step_token(record: LogProbs) -> Tensor:
    assert record.gold_logps is not None  # both are in `reads`, so Loss has looked
    assert record.gold_lengths is not None
    logps = widened(record.gold_logps)
    return -logps / record.gold_lengths.to(logps.dtype).mean()


_GOLD = ("gold_logps", "gold_lengths")
GOLD_NLL_PER_TOKEN = FromRecord("gold_nll", _GOLD, _gold_nll_per_token)
GOLD_NLL_PER_STEP_TOKEN = FromRecord("gold_nll_per_step_token", _GOLD, _gold_nll_per_step_token, batch=True)


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
    "alphapo": Method(
        alphapo, "-log s(beta (a_w - a_l) - gamma),  a = (1 - exp(-alpha l̄)) / alpha", "Gupta et al. 2025",
        "2501.03884", trl="CPO: alphapo",
        note="gamma is absolute, as TRL's simpo_gamma, where simpo takes a ratio. Defaults as for Mistral 7B.",
        foreign={
            "simpo_gamma": "it is called gamma here.",
            "gamma_beta_ratio": "AlphaPO's margin is absolute. Pass gamma = beta * gamma_beta_ratio.",
            "cpo_alpha": "AlphaPO has no NLL here. For one, add it: alphapo + alpha * sft.",
        },
    ),
    "simper": Method(
        simper, "-exp(l̄_w) + exp(l̄_l)", "Xiao et al. 2025", "2502.00883",
        foreign={"beta": "SimPER has no hyper-parameters."},
    ),
    "repo": Method(
        repo, "max(0, gamma - (l̄_w - l̄_l))", "Wu et al. 2025", "2503.07426",
        note="gamma is the authors' gamma_beta_ratio; beta, which their configuration still has, is 1.",
        foreign={
            "gamma_beta_ratio": "it is called gamma here, as in the paper.",
            "beta": "RePO has none; its gamma is SimPO's gamma / beta.",
        },
    ),
    "cpo": Method(
        cpo, "-log s(beta (l_w - l_l)) + alpha nll", "Xu et al. 2024", "2401.08417", trl="CPO: sigmoid",
        note="alpha is TRL's cpo_alpha; the NLL is a mean over tokens.",
        foreign={"cpo_alpha": "it is called alpha here."},
    ),
    "tpo": Method(
        tpo, "-log s(beta (l_w - l_l)) + alpha nll_gold", "Saeidi et al. 2024", "2405.16681", trl="TPO: sigmoid",
        note="alpha is TRL's tpo_alpha. The NLL is a mean over the gold tokens of the step, or over its gold "
        "completions of their token means (sequence).",
        foreign={"tpo_alpha": "it is called alpha here.", "tpo_l_gamma": "that is tpo_l's gamma."},
    ),
    "tpo_l": Method(
        tpo_l, "-log s(beta (l̄_w - l̄_l) - gamma) + alpha nll_gold", "Saeidi et al. 2024", "2405.16681",
        trl="TPO: tpo-l",
        note="gamma is TRL's tpo_l_gamma, and absolute, where simpo takes a ratio. Defaults as TRL, and as the "
        "authors for Llama 3 8B and 5,000 examples; for Mistral 7B they take beta 2 and gamma 1.6.",
        also=("tpo-l",),
        foreign={"tpo_alpha": "it is called alpha here.", "tpo_l_gamma": "it is called gamma here."},
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
