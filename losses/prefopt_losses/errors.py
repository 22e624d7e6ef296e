"""The one error of this package."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LossError(ValueError):
    """A loss was asked for, or fed, in a way that cannot be right; `problems` lists every reason."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the nearest known word, or the empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
