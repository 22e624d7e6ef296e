"""How a certificate is shown: one table, and one sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from prefopt.reference.error_statistics import ErrorStatistics, Interval, Share
from prefopt.reference.loss_effect import NOTICEABLE, LossEffect, why_not_stated
from prefopt_losses import Loss

if TYPE_CHECKING:
    from prefopt.reference.certificate import Certificate

WIDTH = 79
"""Columns of the table: it fits the smallest terminal that people use."""


def certificate_table(certificate: Certificate, loss: Loss) -> Table:
    """Return the errors, and what they do to a loss, as a table of at most `WIDTH` columns."""
    effect = certificate.effect(loss)
    table = Table(
        box=box.SIMPLE_HEAD,
        width=WIDTH,
        pad_edge=False,
        padding=0,
        title=f"{certificate.quantization} reference: cached minus full precision ({certificate.full_precision}), "
        f"{certificate.comparisons} comparisons of {certificate.prompts} prompts, with 95 % intervals",
        title_justify="left",
        title_style="bold",
        caption=_caption(certificate, loss, effect),
        caption_justify="left",
        caption_style="",
    )
    table.add_column("nats", ratio=1, no_wrap=True, min_width=16)
    for name in ("mean", "mean size", "rms", "95 % within", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {"token": "per token", "completion": "per completion", "margin": "per margin"}
    if _of_means(loss):
        names["margin_per_token"] = "margin of means"
    for name, label in names.items():
        if name in certificate.errors:
            _add(table, label, certificate.errors[name])
    if effect is not None:
        table.add_section()
        _add(table, "margin x", effect.margin)
        _add(table, f"loss ({effect.at_reference:.3g})", effect.value)
        if effect.gradient_weight is not None:
            _add(table, "f'(x)/f'(0) - 1", effect.gradient_weight)
    return table


def _of_means(loss: Loss) -> bool:
    score = getattr(loss.ranking_term, "score", None)
    return getattr(score, "aggregate", None) == "mean"


def _add(table: Table, label: str, error: ErrorStatistics) -> None:
    table.add_row(
        Text(label),
        _cell(error.mean, error.mean_interval, signed=True),
        _cell(error.mean_abs, error.mean_abs_interval),
        _cell(error.rms, None),
        _cell(error.p95_abs, error.p95_abs_interval),
        _cell(error.max_abs, None),
    )


def _cell(value: float, interval: Interval | None, *, signed: bool = False) -> Text:
    text = Text(("+" if signed and value > 0 else "") + _number(value))
    if interval is not None:
        text.append(f"\n{_number(interval[0])}..{_number(interval[1])}", style="dim")
    return text


def _number(value: float) -> str:
    """Two digits that count, at most four decimals: an interval of two such numbers fits its column."""
    if value == 0 or abs(value) >= 10:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"
    decimals = 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(decimals, 4)}f}"


def _caption(certificate: Certificate, loss: Loss, effect: LossEffect | None) -> Text:
    lines = [] if effect is None else [f"below the line: what {_settings(loss)} sees where policy = full precision"]
    changes = certificate.sign_changes
    if "all" in changes:
        line = f"the reference ranks {_percent(changes['all'])} of the pairs the other way"
        if "confident" in changes:
            line += f", {_percent(changes['confident'])} of the half with the larger margins"
        lines.append(line)
    if effect is not None and effect.weight_changes is not None:
        lines.append(
            f"the gradient weight of {_percent(effect.weight_changes)} of the examples changes by more than "
            f"{100 * NOTICEABLE:.0f} %"
        )
    elif effect is None:
        lines.append(f"no effect on the loss: {why_not_stated(loss) or 'the sample lacks what it reads'}")
    else:
        lines.append(f"{loss.name} pulls at no example where policy = reference: it has no gradient weight there")
    return Text("\n".join(lines))


def _settings(loss: Loss) -> str:
    beta = loss.hyperparameters.get("beta")
    return f"{loss.name}, beta {beta:g}" if isinstance(beta, int | float) else loss.name


def _percent(share: Share) -> str:
    if share.interval is None:
        return f"{100 * share.share:.1f} %"
    low, high = (100 * end for end in share.interval)
    return f"{100 * share.share:.1f} % ({low:.1f} to {high:.1f})"


def sentence(certificate: Certificate, loss: Loss) -> str:
    """Return what the certificate says in one sentence."""
    error = certificate.limited
    what = "margins" if len(certificate.sample.pairs) else "completions' log-probs"
    said = (
        f"The {certificate.quantization} reference differs from full precision by {_between(error)} nats on average "
        f"in {what}, and by no more than {error.p95_abs:.2g} in 95 % of them ({certificate.comparisons} comparisons)"
    )
    effect = certificate.effect(loss)
    if effect is None or effect.weight_changes is None:
        return f"{said}."
    return (
        f"{said}; at {_settings(loss)} that changes the gradient weight of {_percent(effect.weight_changes)} of the "
        f"examples by more than {100 * NOTICEABLE:.0f} %."
    )


def _between(error: ErrorStatistics) -> str:
    if error.mean_abs_interval is None:
        return f"{error.mean_abs:.2g}"
    low, high = error.mean_abs_interval
    return f"{error.mean_abs:.2g} ({low:.2g} to {high:.2g})"
