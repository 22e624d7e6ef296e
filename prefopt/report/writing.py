"""How a policy's writing changed: length, ending, repetition, against what the reference wrote for the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefopt.report.records import RunRecord

RUN_OF_WORDS = 4


def repetition(text: str) -> float | None:
    """Return the share of runs of four words that stood in the text before; None for a text too short for two."""
    words = text.split()
    runs = [tuple(words[place : place + RUN_OF_WORDS]) for place in range(len(words) - RUN_OF_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else None


def drift_of_writing(runs: Sequence[RunRecord]) -> dict[str, tuple[float, float]]:
    """Return (reference, policy) means of tokens, share finished and repetition; without what no sample has."""
    rows = [row for run in runs for row in run.samples]
    drift: dict[str, tuple[float, float]] = {}
    for key in ("tokens", "finished"):
        pairs = [(row[key]["reference"], row[key]["policy"]) for row in rows if key in row]
        if pairs:
            drift[key] = (float(np.mean([one for one, _ in pairs])), float(np.mean([two for _, two in pairs])))
    sides = []
    for side in ("reference", "policy"):
        values = [value for row in rows if (value := repetition(row[side])) is not None]
        sides.append(float(np.mean(values)) if values else None)
    if sides[0] is not None and sides[1] is not None:
        drift["repetition"] = (sides[0], sides[1])
    return drift
