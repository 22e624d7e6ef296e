"""Losses of a pair against a reference: f(beta * rho), rho the difference of the two log-ratios.

They differ in the function f and the label q; ipo and dpo_norm also in that their log-ratios are means over tokens.
Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.convex import Function
from prefopt_losses.hyperparameters import Positive, Range, Smoothing
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.own_function import named_function
from prefopt_losses.score import LOG_RATIO, MEAN_LOG_RATIO, widened
from prefopt_losses.terms import Coordinate, FromRecord, Term

PositiveSmoothing: TypeAlias = Annotated[float, Range(0, 0.5, includes_low=False)]
"""Probability that a label is flipped, where a label that is never flipped costs infinitely much."""


def dpo(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """Direct Preference Optimization: logistic regression on the difference of log-ratios.

    Args:
        beta: strength of the pull towards the reference, per nat of the whole completion.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.logistic, beta=beta, soft_labels=soft_labels)


def cdpo(*, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> tuple[Term, ...]:
    """Conservative DPO: the labels are taken to be wrong with probability label_smoothing.

    Args:
        beta: as in dpo.
        label_smoothing: eps, the probability that a label is flipped; the optimum is a finite margin.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, q=1 - label_smoothing),)


def robust_dpo(*, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> tuple[Term, ...]:
    """Provably robust DPO: an unbiased estimate, under noisy labels, of DPO's loss under clean ones.

    The same two logistic losses as in cdpo, extrapolated (q > 1) instead of mixed; unbounded below.

    Args:
        beta: as in dpo.
        label_smoothing: eps, the probability that a label is flipped.
    """
    eps = label_smoothing
    return (Term(convex.logistic, LOG_RATIO, beta=beta, q=(1 - eps) / (1 - 2 * eps)),)


def ipo(
    *, beta: Positive = 0.1, normalize: Literal["mean", "sum"] = "mean", soft_labels: bool = False
) -> tuple[Term, ...]:
    """Identity Preference Optimization: regression of the margin on 1 / (2 tau).

    In the algebra: the squared function with GPO beta = 2 tau and coefficient 1 / (4 tau^2).

    Args:
        beta: the paper's tau; per nat per token with "mean", per nat of the whole completion with "sum".
        normalize: log-ratios averaged over completion tokens ("mean"), or summed ("sum"), where the same
            beta regularises about as many times more strongly as completions have tokens.
        soft_labels: take q = preference_probability instead of 1.
    """
    return (
        Term(
            convex.squared,
            MEAN_LOG_RATIO if normalize == "mean" else LOG_RATIO,
            beta=2 * beta,
            q=_label(soft_labels),
            coefficient=1 / (2 * beta) ** 2,
        ),
    )


def hinge(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """Hinge loss on the difference of log-ratios, the support-vector counterpart of DPO.

    Args:
        beta: as in dpo; no gradient flows once the log-ratios differ by 1 / beta.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.hinge, beta=beta, soft_labels=soft_labels)


def gpo(*, f: str | Function = "logistic", beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """Generalized Preference Optimization: any scalar function of beta times the log-ratio difference.

    Args:
        f: a name (logistic, hinge, squared, exponential, truncated_quadratic, savage, ...), your own as
            `module:function`, or a function: elementwise, tensor to tensor, falling through x = 0.
        beta: multiplies the difference; equal beta is not equal regularisation, see the table of functions.
        soft_labels: take q = preference_probability instead of 1.
    """
    return (Term(named_function(f), LOG_RATIO, beta=beta, q=_label(soft_labels)),)


def gpo_squared(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """GPO with (x - 1)^2: ipo over summed log-ratios at tau = beta / 2, without the factor 1 / (4 tau^2).

    Args:
        beta: as in gpo.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.squared, beta=beta, soft_labels=soft_labels)


def gpo_exponential(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """GPO with e^-x: the optimum of dpo at 2 beta, wrong pairs weighing exponentially more.

    Args:
        beta: as in gpo. The loss overflows to inf where beta * rho < -88.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.exponential, beta=beta, soft_labels=soft_labels)


def gpo_truncated_quadratic(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """GPO with max(0, 1 - x)^2: squared without the pull back beyond the target.

    Args:
        beta: as in gpo.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.truncated_quadratic, beta=beta, soft_labels=soft_labels)


def gpo_savage(*, beta: Positive = 0.1, soft_labels: bool = False) -> tuple[Term, ...]:
    """GPO with 1 / (1 + e^x)^2: the optimum of dpo, hopeless pairs given up; not convex.

    Args:
        beta: as in gpo.
        soft_labels: take q = preference_probability instead of 1.
    """
    return gpo(f=convex.savage, beta=beta, soft_labels=soft_labels)


def dpo_norm(*, beta: Positive = 5.0) -> tuple[Term, ...]:
    """Length-normalised DPO: logistic regression on the difference of mean log-ratios.

    Args:
        beta: strength of the pull towards the reference, per nat per token.
    """
    return (Term(convex.logistic, MEAN_LOG_RATIO, beta=beta),)


def exo(*, beta: Positive = 0.1, label_smoothing: PositiveSmoothing = 0.001) -> tuple[Term, ...]:
    """Efficient Exact Optimization of pairs: reverse KL from the policy's preference to the labels.

    The loss is least at the finite margin log((1 - eps) / eps); pairs far beyond it or far behind pull little.

    Args:
        beta: as in dpo.
        label_smoothing: eps, the probability that a label is flipped; not 0, for then the divergence is infinite.
    """
    return (Term(convex.ReverseKL(label_smoothing), LOG_RATIO, beta=beta),)


def discopop(*, beta: Positive = 0.05, tau: Positive = 0.05) -> tuple[Term, ...]:
    """DiscoPOP, the log-ratio modulated loss: logistic for wrong pairs, exponential for right ones; not convex.

    At the default tau its slope at the reference is +0.78: training starts backwards, towards its minimum at
    x = -0.12. From tau = 0.103 on it starts forwards.

    Args:
        beta: as in dpo.
        tau: width of the switch between the two, in units of beta * rho.
    """
    return (Term(convex.LogRatioModulated(tau), LOG_RATIO, beta=beta),)


def cell(*, beta: Positive = 0.05) -> tuple[Term, ...]:
    """Combined exponential and logistic loss: the mean of gpo_exponential and dpo.

    Args:
        beta: as in dpo. The loss overflows to inf where beta * rho < -88.
    """
    return gpo(f=convex.cell, beta=beta)


def padll(*, beta: Positive = 0.05) -> tuple[Term, ...]:
    """Performance adaptive decay logistic loss: 0.9 of dpo for right pairs, 0.45 for wrong ones; jumps at 0.

    Args:
        beta: as in dpo.
    """
    return gpo(f=convex.padll, beta=beta)


def bpo(*, beta: Positive = 0.1, sba_lambda: Positive = 0.5) -> tuple[Term, ...]:
    """Bregman Preference Optimization with the scaled Basu power divergence of likelihood ratios.

    Has the optimum of dpo; confident pairs, right or wrong, weigh exponentially more as sba_lambda grows.

    Args:
        beta: as in dpo. The loss falls without bound where a pair is ever more right, and overflows in fp32
            beyond beta * rho = 88 / sba_lambda and before -88 / (1 + sba_lambda).
        sba_lambda: the paper's lambda, exponent of the divergence.
    """
    return (Term(convex.ScaledBasu(sba_lambda), LOG_RATIO, beta=beta),)


def _preference_probability(record: LogProbs) -> Tensor:
    assert record.preference_probability is not None  # in `reads`, so Loss has looked
    return widened(record.preference_probability)


PREFERENCE_PROBABILITY = FromRecord(
    "preference_probability", reads=("preference_probability",), value=_preference_probability
)


def _label(soft_labels: bool) -> Coordinate:
    return PREFERENCE_PROBABILITY if soft_labels else 1.0


GPO = ("Tang et al. 2024", "2402.05749", "Table 1")
DISCOVERED = ("Lu et al. 2024", "2406.08414")
_SMOOTHED = "labels are hard here. cdpo mixes with label_smoothing, robust_dpo corrects for it."

# fmt: off
ROWS: dict[str, Method] = {
    "dpo": Method(
        dpo, "-log s(beta rho)", "Rafailov et al. 2023", "2305.18290", "eq. 7", "DPO: sigmoid", also=("sigmoid",),
        foreign={"label_smoothing": _SMOOTHED},
    ),
    "cdpo": Method(
        cdpo, "-(1 - eps) log s(beta rho) - eps log s(-beta rho)", "Mitchell 2023",
        web="https://ericmitchell.ai/cdpo.pdf",
        note="TRL's DPOTrainer since 0.29 accepts label_smoothing with sigmoid and ignores it.",
    ),
    "robust_dpo": Method(
        robust_dpo, "(-(1 - eps) log s(beta rho) + eps log s(-beta rho)) / (1 - 2 eps)", "Chowdhury et al. 2024",
        "2403.00409", trl="DPO: robust", also=("robust", "rdpo"),
    ),
    "ipo": Method(
        ipo, "(ū_w - ū_l - 1 / (2 tau))^2", "Azar et al. 2023", "2310.12036", "eq. 17", "DPO: ipo",
        note="beta is the paper's tau: GPO beta = 2 tau. Mean over tokens as its authors and TRL use it; the paper's "
        "equation, OpenRLHF and the reference DPO code sum (normalize: sum).",
        foreign={"tau": "it is called beta here, as in TRL.", "label_smoothing": _SMOOTHED},
    ),
    "hinge": Method(
        hinge, "max(0, 1 - beta rho)", "Liu et al. 2023 (RSO)", "2309.06657", trl="DPO: hinge",
        note="RSO's hinge-norm (its gamma is beta, 0.05 there); its sigmoid-norm is dpo, its rejection sampling a "
        "step of data. TRL credits hinge to SLiC; slic_hf is that.",
        also=("rso",),
        foreign={"label_smoothing": _SMOOTHED, "gamma": "RSO's gamma is beta here.", "delta": "that is slic_hf's."},
    ),
    "gpo": Method(gpo, "f(beta rho)", *GPO, note="beta multiplies the summed log-ratios, whatever f is."),
    "gpo_squared": Method(gpo_squared, "(beta rho - 1)^2", *GPO, also=("squared",)),
    "gpo_exponential": Method(gpo_exponential, "exp(-beta rho)", *GPO, also=("exponential",)),
    "gpo_truncated_quadratic": Method(
        gpo_truncated_quadratic, "max(0, 1 - beta rho)^2", *GPO, also=("truncated_quadratic",),
    ),
    "gpo_savage": Method(gpo_savage, "1 / (1 + exp(beta rho))^2", *GPO, also=("savage",)),
    "dpo_norm": Method(
        dpo_norm, "-log s(beta (ū_w - ū_l))", "Lambert et al. 2024 (Tulu 3)", "2411.15124", trl="DPO: sigmoid_norm",
        note="Default beta as open-instruct's dpo_norm; TRL's sigmoid_norm takes dpo's 0.1, fifty times less.",
        also=("sigmoid_norm", "length_normalized_dpo"),
        foreign={"label_smoothing": _SMOOTHED},
    ),
    "exo": Method(
        exo, "s(x) log(s(x) / (1 - eps)) + s(-x) log(s(-x) / eps),  x = beta rho", "Ji et al. 2024", "2402.00856",
        "eq. 16", "DPO: exo_pair",
        note="EXO-pref, for two completions. The authors' code takes unnormalised labels: log-probs 0 and -10 for "
        "log(1 - eps) and log eps.",
        also=("exo_pair", "exo_pref"),
        foreign={"eps": "it is called label_smoothing here, as in TRL."},
    ),
    "discopop": Method(
        discopop, "-(1 - s(x / tau)) log s(x) + s(x / tau) exp(-x),  x = beta rho", *DISCOVERED, "eq. 5",
        "DPO: discopop",
        note="Starts backwards at the authors' tau (0.05). TRL's default beta is 0.1.", also=("lrml",),
        foreign={"discopop_tau": "it is called tau here.", "temperature": "it is called tau here."},
    ),
    "cell": Method(
        cell, "(exp(-beta rho) - log s(beta rho)) / 2", *DISCOVERED,
        note="Found by the search that found DiscoPOP.",
    ),
    "padll": Method(
        padll, "-0.9 log s(beta rho), half of it where rho < 0", *DISCOVERED,
        note="Found by the search that found DiscoPOP.",
    ),
    "bpo": Method(
        bpo, "exp(-(1 + lambda) x) / (4 (1 + lambda)) - exp(lambda x) / (4 lambda),  x = beta rho", "Kim et al. 2025",
        "2505.19601",
        note="Negative values are in order: constants are left out, and there is no lower bound. The default of "
        "sba_lambda is ours. Nothing is clipped; the TokenRatio code holds x within +-30.",
        also=("bpo_sba", "sba"),
        foreign={"lambda": "it is called sba_lambda here."},
    ),
}
# fmt: on
