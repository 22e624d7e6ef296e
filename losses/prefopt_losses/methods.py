"""The table of published methods: one row each, and nothing else decides what a name means.

Notation of the formulas: minimised, per example; s is the sigmoid; w the chosen, l the rejected completion;
l_w, l_l policy and r_w, r_l reference log-probs summed over completion tokens; u = l - r a log-ratio;
rho = u_w - u_l; a bar (l̄, ū) divides by the completion's tokens; nll is the token mean of -l_w.

To add a method: write its maker (terms, keyword-only hyper-parameters) in the room of its family, add its
row, name its function in functional.py, and write its formula out by hand in the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from prefopt_losses.pairwise import (
    cdpo,
    dpo,
    gpo,
    gpo_exponential,
    gpo_savage,
    gpo_squared,
    gpo_truncated_quadratic,
    hinge,
    ipo,
    robust_dpo,
)
from prefopt_losses.pointwise import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from prefopt_losses.reference_free import cpo, orpo, sft, simpo, slic_hf
from prefopt_losses.terms import Term


@dataclass(frozen=True)
class Method:
    """A published method."""

    make: Callable[..., tuple[Term, ...]]
    """Hyper-parameters (keyword-only) -> terms. Its signature is their schema."""
    formula: str
    paper: str
    arxiv: str = ""
    equation: str = ""
    """Where in the paper; empty where it was not looked up."""
    trl: str = ""
    """TRL's name for it, as `trainer: loss_type`."""
    note: str = ""
    """What the hyper-parameters mean here, and where other tools differ."""
    web: str = ""
    """Address of a source without arXiv id."""

    @property
    def summary(self) -> str:
        """One line of prose."""
        return (inspect.getdoc(self.make) or "").split("\n", 1)[0]

    @property
    def family(self) -> str:
        """The room of its maker: pairwise, reference_free or pointwise."""
        return self.make.__module__.rsplit(".", 1)[-1]

    @property
    def link(self) -> str:
        """Where the paper can be read, or the empty string."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.web


GPO = ("Tang et al. 2024", "2402.05749", "Table 1")
APO = ("D'Oosterlinck et al. 2024", "2408.06266")

# fmt: off
METHODS: dict[str, Method] = {
    # A pair against a reference
    "dpo": Method(dpo, "-log s(beta rho)", "Rafailov et al. 2023", "2305.18290", "eq. 7", "DPO: sigmoid"),
    "cdpo": Method(
        cdpo, "-(1 - eps) log s(beta rho) - eps log s(-beta rho)",
        "Mitchell 2023", web="https://ericmitchell.ai/cdpo.pdf",
        note="TRL's DPOTrainer since 0.29 accepts label_smoothing with sigmoid and ignores it.",
    ),
    "robust_dpo": Method(
        robust_dpo, "(-(1 - eps) log s(beta rho) + eps log s(-beta rho)) / (1 - 2 eps)",
        "Chowdhury et al. 2024", "2403.00409", trl="DPO: robust",
    ),
    "ipo": Method(
        ipo, "(ū_w - ū_l - 1 / (2 tau))^2", "Azar et al. 2023", "2310.12036", "eq. 17", "DPO: ipo",
        note="beta is the paper's tau: GPO beta = 2 tau. Mean over tokens as its authors and TRL use it; "
        "the paper's equation, OpenRLHF and the reference DPO code sum (normalize: sum).",
    ),
    "hinge": Method(
        hinge, "max(0, 1 - beta rho)", "Liu et al. 2023 (RSO)", "2309.06657", trl="DPO: hinge",
        note="RSO's hinge-norm (its gamma is beta, 0.05 there). TRL credits it to SLiC; slic_hf is that.",
    ),
    "gpo": Method(gpo, "f(beta rho)", *GPO, note="beta multiplies the summed log-ratios, whatever f is."),
    "gpo_squared": Method(gpo_squared, "(beta rho - 1)^2", *GPO),
    "gpo_exponential": Method(gpo_exponential, "exp(-beta rho)", *GPO),
    "gpo_truncated_quadratic": Method(gpo_truncated_quadratic, "max(0, 1 - beta rho)^2", *GPO),
    "gpo_savage": Method(gpo_savage, "1 / (1 + exp(beta rho))^2", *GPO),
    # Without a reference
    "slic_hf": Method(
        slic_hf, "max(0, delta - l_w + l_l) - lambda l_w", "Zhao et al. 2023", "2305.10425", "eq. 4",
        note="The target of the NLL is the chosen completion; hinge and NLL are both summed over tokens.",
    ),
    "simpo": Method(
        simpo, "-log s(beta (l̄_w - l̄_l) - gamma),  gamma = beta gamma_beta_ratio",
        "Meng et al. 2024", "2405.14734", "eq. 6", "CPO: simpo, cpo_alpha=0",
        note="gamma_beta_ratio as in the authors' code; simpo_gamma (TRL, LLaMA-Factory) is gamma itself. "
        "No NLL: TRL adds one unless cpo_alpha is 0.",
    ),
    "cpo": Method(
        cpo, "-log s(beta (l_w - l_l)) + alpha nll", "Xu et al. 2024", "2401.08417", trl="CPO: sigmoid",
        note="alpha is TRL's cpo_alpha; the NLL is a mean over tokens.",
    ),
    "orpo": Method(
        orpo, "nll - lambda log s(o_w - o_l),  o = l̄ - log(1 - exp(l̄))",
        "Hong et al. 2024", "2403.07691", "eq. 6", "ORPO",
        note="lambda_coef is the paper's lambda: beta in TRL, alpha (1.0) in the authors' code. "
        "The NLL is over the completion; TRL's is over prompt and completion.",
    ),
    "sft": Method(
        sft, "nll", "maximum likelihood", trl="DPO: sft",
        note="Token mean over the optimizer step, or mean over completions of their token means (sequence).",
    ),
    # Single completions against a reference
    "bco_pair": Method(
        bco_pair, "-log s(beta u_w) - log s(-beta u_l)",
        "Jung et al. 2024", "2404.04656", trl="DPO: bco_pair",
        note="Without the paper's reward shift (a running mean), as TRL since 0.29. Default beta as TRL; "
        "the paper's recipe uses 0.01.",
    ),
    "nca_pair": Method(
        nca_pair, "-log s(beta u_w) - log s(-beta u_w) / 2 - log s(-beta u_l) / 2",
        "Chen et al. 2024", "2402.05369", trl="DPO: nca_pair", note="TRL's default beta is 0.1.",
    ),
    "sppo_hard": Method(
        sppo_hard, "(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2",
        "Wu et al. 2024", "2405.00675", "eq. 4.7", "DPO: sppo_hard",
        note="GPO beta = 2 beta on each side. Sum of the two sides, as TRL; the authors' code takes half. "
        "TRL's default beta is 0.1.",
    ),
    "apo_zero": Method(apo_zero, "1 - s(beta u_w) + s(beta u_l)", *APO, "eq. 7", "DPO: apo_zero"),
    "apo_down": Method(apo_down, "s(beta u_w) + 1 - s(beta rho)", *APO, "eq. 8", "DPO: apo_down"),
}
# fmt: on

# What other tools call a method.
OTHER_NAMES: dict[str, str] = {
    "sigmoid": "dpo",
    "robust": "robust_dpo",
    "rdpo": "robust_dpo",
    "rso": "hinge",
    "slic": "slic_hf",
    "bco": "bco_pair",
    "nca": "nca_pair",
    "sppo": "sppo_hard",
    "nll": "sft",
    "exponential": "gpo_exponential",
    "truncated_quadratic": "gpo_truncated_quadratic",
    "savage": "gpo_savage",
    "squared": "gpo_squared",
}

_SMOOTHED = "labels are hard here. cdpo mixes with label_smoothing, robust_dpo corrects for it."
_RATIO = "that is the absolute margin gamma = beta * gamma_beta_ratio. Pass gamma_beta_ratio = gamma / beta ({})."

# What other tools call a hyper-parameter of a method, and what to write here.
OTHER_HYPERPARAMETERS: dict[str, dict[str, str]] = {
    "dpo": {"label_smoothing": _SMOOTHED},
    "hinge": {
        "label_smoothing": _SMOOTHED,
        "gamma": "RSO's gamma is beta here.",
        "delta": "that is slic_hf's.",
    },
    "ipo": {"tau": "it is called beta here, as in TRL.", "label_smoothing": _SMOOTHED},
    "slic_hf": {"lambda": "it is called lambda_coef here.", "beta": "SLiC-HF has none; hinge (RSO) has."},
    "simpo": {
        "gamma": _RATIO.format("SimPO's paper calls the product gamma"),
        "simpo_gamma": _RATIO.format("TRL: simpo_gamma 0.5 at beta 2.0 is gamma_beta_ratio 0.25"),
        "cpo_alpha": "SimPO has no NLL here. For one, add it: simpo + alpha * sft.",
    },
    "cpo": {"cpo_alpha": "it is called alpha here."},
    "orpo": {
        "beta": "nothing multiplies ORPO's log-odds; TRL's beta is the paper's lambda. Pass lambda_coef.",
        "alpha": "the authors' code calls the paper's lambda alpha. Pass lambda_coef.",
        "lambda": "it is called lambda_coef here.",
    },
}
