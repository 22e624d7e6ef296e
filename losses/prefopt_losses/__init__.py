"""Offline preference losses as one algebra; needs torch and nothing else.

    from prefopt_losses import LogProbs, get_loss

    loss = get_loss("dpo", beta=0.1) + 0.5 * get_loss("sft")
    logps = LogProbs(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths)
    loss(logps).mean().backward()  # loss(logps) is (batch,)

Or one function per method: `dpo_loss`, `ipo_loss`, `simpo_loss`, ... The table is `METHODS` (and README.md).
"""

from __future__ import annotations

from prefopt_losses.convex import FUNCTIONS
from prefopt_losses.errors import LossError
from prefopt_losses.functional import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cdpo_loss,
    cpo_loss,
    dpo_loss,
    gpo_exponential_loss,
    gpo_loss,
    gpo_savage_loss,
    gpo_squared_loss,
    gpo_truncated_quadratic_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    orpo_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
    slic_hf_loss,
    sppo_hard_loss,
)
from prefopt_losses.inputs import LogProbs, UnpairedLogProbs
from prefopt_losses.logps import token_logps_from_hidden, token_logps_from_logits
from prefopt_losses.lookup import get_loss, loss_from_config
from prefopt_losses.loss import Loss, Needs
from prefopt_losses.methods import METHODS, Method
from prefopt_losses.metrics import accuracies, likelihood_displacement, loss_metrics
from prefopt_losses.score import LINKS, Score
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, PAIR, REJECTED, FromRecord, Term

__all__ = [
    "CHOSEN",
    "FUNCTIONS",
    "LINKS",
    "METHODS",
    "NEGATED_CHOSEN",
    "PAIR",
    "REJECTED",
    "FromRecord",
    "LogProbs",
    "Loss",
    "LossError",
    "Method",
    "Needs",
    "Score",
    "Term",
    "UnpairedLogProbs",
    "accuracies",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "cdpo_loss",
    "cpo_loss",
    "dpo_loss",
    "get_loss",
    "gpo_exponential_loss",
    "gpo_loss",
    "gpo_savage_loss",
    "gpo_squared_loss",
    "gpo_truncated_quadratic_loss",
    "hinge_loss",
    "ipo_loss",
    "likelihood_displacement",
    "loss_from_config",
    "loss_metrics",
    "nca_pair_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "slic_hf_loss",
    "sppo_hard_loss",
    "token_logps_from_hidden",
    "token_logps_from_logits",
]
