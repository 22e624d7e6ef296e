"""Pair losses held to the reference by another divergence than reverse KL: logistic, of linked log-ratios.

The optimum of a reward under an f-divergence to the reference is f'(pi / pi_ref) = reward / beta, so DPO's log-ratio
u becomes the link g(u) = f'(e^u) (reverse KL: g(u) = u, which is dpo). Where a link exponentiates u, its exponent is
held below 80. Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from prefopt_losses import convex
from prefopt_losses.convex import Function
from prefopt_losses.hyperparameters import Fraction, Positive
from prefopt_losses.method import Method
from prefopt_losses.score import AlphaDivergence, Score, chi_squared, forward_kl, jensen_shannon
from prefopt_losses.terms import Term


def f_dpo_forward_kl(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """f-DPO with the forward KL divergence: completions that the policy forgets weigh exponentially.

    Args:
        beta: strength of the pull towards the reference, per unit of the link 1 - e^-u, which is 1 nat of u near 0.
    """
    return _linked(forward_kl, beta)


def f_dpo_js(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """f-DPO with the Jensen-Shannon divergence: completions that gain much gain little more.

    Args:
        beta: strength of the pull towards the reference, per unit of the link, which is 2 nats of u near 0.
    """
    return _linked(jensen_shannon, beta)


def f_dpo_alpha(*, beta: Positive = 0.1, alpha: Fraction = 0.5) -> tuple[Term, ...]:
    """f-DPO with an alpha-divergence, between reverse KL (dpo, alpha towards 0) and forward KL (alpha towards 1).

    Args:
        beta: strength of the pull towards the reference, per unit of the link, which is 1 nat of u near 0.
        alpha: the paper's alpha.
    """
    return _linked(AlphaDivergence(alpha), beta)


def chi_po(*, beta: Positive = 0.1, r_max: Positive = 5.0) -> tuple[Term, ...]:
    """Chi-squared Preference Optimization: chi-squared and KL divergence together, against overoptimization.

    Args:
        beta: strength of the pull towards the reference, per unit of the link u + e^u, which is half a nat of u
            near 0.
        r_max: largest reward; the argument of the loss is clipped to +-2 r_max, beyond which a pair pulls no more.
    """
    return _linked(chi_squared, beta, convex.ClippedLogistic(2 * r_max))


def _linked(link: Function, beta: float, f: Function = convex.logistic) -> tuple[Term, ...]:
    return (Term(f, Score(aggregate="sum", reference=True, link=link), beta=beta),)


F_DPO = ("Wang et al. 2023", "2309.16240")
_NAMED = {"f_divergence_type": "the divergence is part of the name: f_dpo_forward_kl, f_dpo_js, f_dpo_alpha, or dpo."}

# fmt: off
ROWS: dict[str, Method] = {
    "f_dpo_forward_kl": Method(
        f_dpo_forward_kl, "-log s(beta (g(u_w) - g(u_l))),  g(u) = 1 - exp(-u)", *F_DPO,
        trl="DPO: sigmoid, f_divergence_type=forward_kl",
        note="exp(-u) is held below exp(80).",
        foreign=_NAMED,
    ),
    "f_dpo_js": Method(
        f_dpo_js, "-log s(beta (g(u_w) - g(u_l))),  g(u) = log 2 + log s(u)", *F_DPO,
        trl="DPO: sigmoid, f_divergence_type=js_divergence",
        foreign=_NAMED,
    ),
    "f_dpo_alpha": Method(
        f_dpo_alpha, "-log s(beta (g(u_w) - g(u_l))),  g(u) = (1 - exp(-alpha u)) / alpha", *F_DPO,
        trl="DPO: sigmoid, f_divergence_type=alpha_divergence",
        note="alpha is the paper's. TRL's f_alpha_divergence_coef is 1 - alpha since 0.29, and was alpha before. The "
        "exponent is held below 80.",
        foreign=_NAMED | {"f_alpha_divergence_coef": "TRL's is 1 - alpha since 0.29 (alpha before). Pass alpha."},
    ),
    "chi_po": Method(
        chi_po, "-log s(clip(beta (g(u_w) - g(u_l)), +-2 R_max)),  g(u) = u + exp(u)", "Huang et al. 2024",
        "2407.13399",
        note="The default of r_max is ours: the theory asks for a bound on the reward. exp(u) is held below exp(80), "
        "far outside the clip.",
        also=("chipo",),
        foreign={"R_max": "it is called r_max here."},
    ),
}
# fmt: on
