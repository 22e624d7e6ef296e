"""What can go wrong, and how it is said.

    PrefoptError
    ├── UserError             a person can mend it: exit code 2, no traceback
    │   ├── RecipeError       a key of the recipe: unknown, of the wrong type, out of range, impossible together
    │   ├── DataError         a file, a row, a column, a tokenizer that does not fit
    │   ├── ModelError        a model, adapter or checkpoint that cannot be loaded or cannot be right
    │   └── CacheError        a reference cache of another reference, or a damaged one
    └── Interrupted           Ctrl-C: the state was saved, exit code 130

Every user error carries all its problems at once. A problem says where, what was expected, what was given
and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    where: str
    """Recipe key path, file and row, or tensor with its shape."""
    expected: str
    """What would have been right."""
    given: str = ""
    """What was found instead."""
    fix: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.expected}"]
        if self.given:
            lines.append(f"    given: {self.given}")
        if self.fix:
            lines.append(f"    to do: {self.fix}")
        return "\n".join(lines)


class PrefoptError(Exception):
    """Base of every error that prefopt raises on purpose."""


class UserError(PrefoptError):
    """Something a person can mend; carries all problems at once."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(UserError):
    """The recipe cannot be run as it is written."""


class DataError(UserError):
    """The data cannot be used as they are."""


class ModelError(UserError):
    """The model, adapter, tokenizer or checkpoint cannot be used."""


class CacheError(UserError):
    """The reference cache belongs to another reference or is damaged."""


class Interrupted(PrefoptError):
    """The run was stopped by Ctrl-C after its state was saved."""


def suggest(word: str, known: Sequence[str]) -> str:
    """Return `did you mean "x"?` for the nearest known word, or the empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else ""
