"""What a person should know before acting on an answer: what was left out, what lies at an edge, what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefopt.report.settings import Setting, shown
from prefopt.report.standings import Standing


def left_out(settings: Sequence[Setting]) -> Iterator[str]:
    """Say which settings are not in the running, and why."""
    for setting in settings:
        for run in setting.repeated:
            yield f"{run.label} repeats a setting with the same seed and is left out"
        if not setting.complete:
            lost = [run for run in setting.runs if not run.finished]
            why = f": {lost[0].state}{', ' + lost[0].reason if lost[0].reason else ''}" if lost else ""
            yield f"{setting.name} is left out: {len(setting.finished)} of {setting.wanted} seeds finished{why}"


EDGE_KEYS = ("loss.beta", "train.learning_rate")


def cautions_of(standings: Sequence[Standing], settings: Sequence[Setting]) -> Iterator[str]:
    """Say what a person should know before acting on the answer."""
    yield from _edges(standings[0].setting, settings)
    yield from _displaced(standings)
    yield from _far(standings)
    yield from _clipped(standings)


def _edges(best: Setting, settings: Sequence[Setting]) -> Iterator[str]:
    """Name the keys whose best value is the smallest or the largest that its loss was tried with."""
    own = [each for each in settings if each.loss == best.loss]
    for key in EDGE_KEYS:
        values = sorted({float(each.varied[key]) for each in own if key in each.varied})
        if len(values) > 1 and float(best.varied[key]) in (values[0], values[-1]):
            end = "smallest" if float(best.varied[key]) == values[0] else "largest"
            yield (
                f"the best {key.rpartition('.')[2]} of {best.loss}, {shown(best.varied[key])}, is the {end} that "
                "was tried: the optimum may lie beyond"
            )


FAR_KL, FALLEN = 50.0, -0.1
MOST = 0.5


def _displaced(standings: Sequence[Standing]) -> Iterator[str]:
    """Name likelihood displacement: chosen completions that became less likely, together with the rejected ones."""
    said = []
    for standing in standings:
        chosen, share = _mean(standing, "chosen_drift_per_token"), _mean(standing, "displacement")
        if chosen is not None and chosen < FALLEN and share is not None and share > MOST:
            said.append(f"{standing.setting.contestant} ({chosen:+.2f} nats per token, {share:.0%})")
    if said:
        yield (
            f"likelihood displacement in {', '.join(said)}: chosen completions became less likely too; the share is "
            "that of comparisons in which both fell while the margin grew"
        )


def _far(standings: Sequence[Standing]) -> Iterator[str]:
    """Name policies that left their reference far behind."""
    known = {standing.setting.contestant: _mean(standing, "kl") for standing in standings}
    if far := [f"{name} {kl:.0f}" for name, kl in known.items() if kl is not None and kl > FAR_KL]:
        yield f"far from the reference, in nats per completion: {', '.join(far)}; read samples before trusting accuracy"


def _mean(standing: Standing, key: str) -> float | None:
    values = [run.measures[key] for run in standing.setting.finished if run.measures.get(key) is not None]
    return float(np.mean(values)) if values else None


def _clipped(standings: Sequence[Standing]) -> Iterator[str]:
    """Say of which contestants most steps were clipped."""
    shares = {}
    for standing in standings:
        known = [run.clipped for run in standing.setting.finished if run.clipped is not None]
        if known and float(np.mean(known)) > MOST:
            shares[standing.setting.contestant] = float(np.mean(known))
    if shares:
        said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield f"most steps were clipped ({said}): there the learning rate says little about the size of a step"
