"""Measures by which checkpoints and runs are put in order."""

from __future__ import annotations

BETTER = {
    "eval.loss": min,
    "eval.kl": min,
    "eval.displacement": min,
    "eval.accuracy": max,
    "eval.margin": max,
    "eval.gold_reward.policy": max,
}
"""Metrics that `checkpoint.best` and early stopping can name, and which end of them is better."""
