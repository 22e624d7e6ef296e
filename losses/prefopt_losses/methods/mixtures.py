"""Published sums of other losses. Any other sum is `dpo + 0.5 * sft`; these are the ones that papers have named.

Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from prefopt_losses.hyperparameters import NonNegative, Positive
from prefopt_losses.method import Method
from prefopt_losses.methods.pairwise import dpo
from prefopt_losses.methods.pointwise import bco_pair
from prefopt_losses.methods.reference_free import sft
from prefopt_losses.terms import Term


def irpo(*, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Term, ...]:
    """Iterative Reasoning Preference Optimization: dpo, and NLL that keeps the chosen completion likely.

    Args:
        beta: as in dpo.
        alpha: weight of the NLL of the chosen completion, per token of that completion.
    """
    return (*dpo(beta=beta), *(term.scaled(alpha) for term in sft(normalize="sequence")))


def mpo(
    *,
    beta: Positive = 0.1,
    preference_weight: NonNegative = 0.8,
    quality_weight: NonNegative = 0.2,
    generation_weight: NonNegative = 1.0,
) -> tuple[Term, ...]:
    """Mixed Preference Optimization: which is better (dpo), whether each is good (bco_pair), how to write (NLL).

    Args:
        beta: as in dpo, of both dpo and bco_pair.
        preference_weight: of dpo.
        quality_weight: of bco_pair.
        generation_weight: of the NLL of the chosen completion, per token of that completion.
    """
    return (
        *(term.scaled(preference_weight) for term in dpo(beta=beta)),
        *(term.scaled(quality_weight) for term in bco_pair(beta=beta)),
        *(term.scaled(generation_weight) for term in sft(normalize="sequence")),
    )


_TOKEN_MEAN = "TRL's sft, in its list of losses, is a mean over all tokens of the batch: that is "

# fmt: off
ROWS: dict[str, Method] = {
    "irpo": Method(
        irpo, "-log s(beta rho) - alpha l̄_w", "Pang et al. 2024", "2404.19733",
        note="Also called RPO, or DPO + NLL; reward-aware RPO is rpo_bwd_kl. The NLL is a mean over the completion's "
        f"own tokens, as in the paper. {_TOKEN_MEAN}dpo + alpha * sft. RPO of Liu et al. (arXiv 2405.16436) is another "
        "such sum, at beta 0.01 and 0.005 of NLL.",
        also=("rpo", "dpo_nll"),
        foreign={"rpo_alpha": "it is called alpha here."},
    ),
    "mpo": Method(
        mpo, "-w_p log s(beta rho) - w_q (log s(beta u_w) + log s(-beta u_l)) - w_g l̄_w", "Wang et al. 2024",
        "2411.10442",
        note=f"The quality loss is without the paper's reward shift. {_TOKEN_MEAN}0.8*dpo + 0.2*bco_pair + sft.",
        foreign={"loss_weights": "they are preference_weight, quality_weight and generation_weight here."},
    ),
}
# fmt: on
