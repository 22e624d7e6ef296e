"""What is drawn, as data: one description serves the interactive page and the figures for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["line", "points", "interval", "bar", "violin"]


@dataclass(frozen=True)
class Series:
    """One set of points."""

    name: str
    group: str
    """Which colour: the contestant."""
    x: Sequence[Any]
    y: Sequence[Any]
    kind: Kind = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    text: Sequence[str] = ()
    """What is shown when a point is pointed at."""
    faint: bool = False
    """One of several seeds, behind their mean."""
    dashed: bool = False
    listed: bool = True
    """Whether the legend has it."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    name: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    scale: str = ""
    """Of the axis, where a chart has the same panel on several."""

    @property
    def choice(self) -> tuple[str, str]:
        """What a reader chooses it by."""
        return (self.name, self.scale)


@dataclass(frozen=True)
class Chart:
    """One figure, with one or more panels between which a reader chooses."""

    key: str
    short: str
    """Its name where there is little room."""
    title: str
    says: str
    """What is to be seen in it, and how to read it."""
    panels: tuple[Panel, ...]

    @property
    def choices(self) -> list[list[str]]:
        """The names and the scales among which a reader chooses; without those that are the same in all panels."""
        every = [list(dict.fromkeys(values)) for values in zip(*(panel.choice for panel in self.panels))]
        return [values if len(values) > 1 else [] for values in every]
