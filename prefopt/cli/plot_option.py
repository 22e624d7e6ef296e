"""`--plot [FILE]`: an option whose value may be left out."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from typer.core import TyperCommand

DEFAULT = "losses.png"


class WithPlot(TyperCommand):
    """A command in which `--plot` stands alone or takes the file that follows it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the file written out."""
        return super().parse_args(ctx, with_plot_file(args))


def with_plot_file(words: list[str]) -> list[str]:
    """Return the words with a file after `--plot`: the next word if it is one, else the default."""
    written: list[str] = []
    for index, word in enumerate(words):
        written.append(word)
        if word == "--plot" and not (index + 1 < len(words) and _is_file(words[index + 1])):
            written.append(DEFAULT)
    return written


def _is_file(word: str) -> bool:
    """Whether a word names a file rather than a loss, a sum (`dpo+0.5*sft`), key=value or module:function."""
    return not word.startswith("-") and PurePath(word).suffix[1:].isalpha() and not {":", "=", "+", "*"} & set(word)
