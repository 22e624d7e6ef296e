"""What the table of methods says about each: one row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prefopt_losses.list_terms import ListTerm
from prefopt_losses.terms import Term


@dataclass(frozen=True)
class Method:
    """A published method."""

    make: Callable[..., tuple[Term, ...] | tuple[ListTerm, ...]]
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
    also: tuple[str, ...] = ()
    """What other tools and papers call it."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Names that other tools give its hyper-parameters, and what to write here."""

    @property
    def summary(self) -> str:
        """One line of prose."""
        return (inspect.getdoc(self.make) or "").split("\n", 1)[0]

    @property
    def family(self) -> str:
        """The room of its maker: pairwise, reference_free, pointwise, ..."""
        return self.make.__module__.rsplit(".", 1)[-1]

    @property
    def link(self) -> str:
        """Where the paper can be read, or the empty string."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.web
