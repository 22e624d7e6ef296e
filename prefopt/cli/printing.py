"""How the command line looks: problems on stderr, tables on stdout."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.errors import UserError

PIPED_WIDTH = 1000
"""Columns where no terminal says otherwise: a pipe wraps nothing, so that a path stays in one piece."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that wraps at the terminal's width and leaves our words uncoloured."""
    made = Console(stderr=stderr, highlight=False)
    if made.is_terminal:
        return made
    stream = cast(IO[str], _Trimmed(sys.stderr if stderr else sys.stdout))
    return Console(file=stream, highlight=False, width=PIPED_WIDTH)


class _Trimmed(io.TextIOBase):
    """A stream that leaves out the spaces with which tables fill their lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(re.sub(r"[ ]+(?=\n|$)", "", text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def show_problems(error: UserError) -> None:
    """Print every problem of the error: where, what was expected, what was given, what to do."""
    out = console(stderr=True)
    count = len(error.problems)
    out.print(Text(f"\n{count} problem{'s' if count != 1 else ''}", style="bold red"))
    for problem in error.problems:
        out.print(Text(f"\n  {problem.where}", style="bold"))
        print_labelled(out, "expected", problem.expected, width=12)
        print_labelled(out, "given", problem.given, width=12, style="red")
        print_labelled(out, "to do", problem.fix, width=12, style="green")
    out.print()


def print_labelled(out: Console, label: str, text: str, *, width: int, style: str = "") -> None:
    """Print a dim label and, beside it, a text that wraps in its own column; nothing for an empty text."""
    if text:
        row = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        row.add_column(style="dim", width=width)
        row.add_column(overflow="fold")
        row.add_row(Text(f"    {label}"), Text(text, style=style))
        out.print(row)


def print_hints(out: Console, hints: Mapping[str, str]) -> None:
    """Print commands to go on with, and what each of them does."""
    out.print()
    widest = max(map(len, hints))
    for command, effect in hints.items():
        out.print(Text(command.ljust(widest + 3), style="dim"), Text(effect), sep="")
    out.print()


def show_measures(out: Console, measures: Mapping[str, Any]) -> None:
    """Print nested measures as two columns: dotted name, value."""
    for name, value in _flat(measures):
        values = value if isinstance(value, list | tuple) else [value]
        shown = (f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
        print_labelled(out, name, " to ".join(shown), width=36)


def _flat(measures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in measures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
