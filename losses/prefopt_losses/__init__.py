"""Offline preference losses as one algebra; needs torch and nothing else.

    from prefopt_losses import LogProbs, get_loss

    loss = get_loss("dpo", beta=0.1) + 0.5 * get_loss("sft")
    logps = LogProbs(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths)
    loss(logps).mean().backward()  # loss(logps) is (batch,)

Or one function per method: `dpo_loss`, `ipo_loss`, `simpo_loss`, ... The table is `METHODS` (and README.md).
"""

from __future__ import annotations

from prefopt_losses import functional
from prefopt_losses.convex import FUNCTIONS
from prefopt_losses.distributions import (
    relative_token_logps_from_hidden,
    relative_token_logps_from_logits,
    sequential_kl_from_hidden,
    sequential_kl_from_logits,
)
from prefopt_losses.errors import LossError
from prefopt_losses.functional import *  # noqa: F403 - one function per method
from prefopt_losses.inputs import ListLogProbs, LogProbs, UnpairedLogProbs
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.logps import left_aligned, token_logps_from_hidden, token_logps_from_logits
from prefopt_losses.lookup import get_loss, loss_from_config
from prefopt_losses.loss import Loss
from prefopt_losses.method import Method
from prefopt_losses.methods import METHODS
from prefopt_losses.metrics import accuracies, likelihood_displacement, loss_metrics
from prefopt_losses.module import PreferenceLoss
from prefopt_losses.needs import Needs
from prefopt_losses.profiles.matched_beta import MatchedBeta, match_beta
from prefopt_losses.profiles.profile import Profile, profile, profile_terms
from prefopt_losses.score import LINKS, Score, TokenWeights
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, PAIR, REJECTED, FromRecord, Running, Term

__all__ = [
    "CHOSEN",
    "FUNCTIONS",
    "LINKS",
    "METHODS",
    "NEGATED_CHOSEN",
    "PAIR",
    "REJECTED",
    "FromRecord",
    "ListLogProbs",
    "ListTerm",
    "LogProbs",
    "Loss",
    "LossError",
    "MatchedBeta",
    "Method",
    "Needs",
    "PreferenceLoss",
    "Profile",
    "Running",
    "Score",
    "Term",
    "TokenWeights",
    "UnpairedLogProbs",
    "accuracies",
    "get_loss",
    "left_aligned",
    "likelihood_displacement",
    "loss_from_config",
    "loss_metrics",
    "match_beta",
    "profile",
    "profile_terms",
    "relative_token_logps_from_hidden",
    "relative_token_logps_from_logits",
    "sequential_kl_from_hidden",
    "sequential_kl_from_logits",
    "token_logps_from_hidden",
    "token_logps_from_logits",
    *functional.__all__,
]
