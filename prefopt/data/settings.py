"""What the data room reads of a recipe. The recipe's own models have these attributes; so may any object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Truncation = Literal["completion", "prompt", "drop"]
Choice = Literal["auto", "always", "never"]


class SourceSettings(Protocol):
    """One source among several."""

    @property
    def path(self) -> str:
        """File, folder or hub name."""

    @property
    def weight(self) -> float:
        """0.5 takes a random half of its rows, 2 takes every row twice."""

    @property
    def split(self) -> str | None:
        """Split of this source; where absent, `data.split` (train) or an evaluation split (eval)."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Column names of this source; where absent, `data.columns`."""


class DataSettings(Protocol):
    """The section `data` of a recipe."""

    @property
    def train(self) -> str | Sequence[str | SourceSettings]:
        """What to train on."""

    @property
    def eval(self) -> str | Sequence[str | SourceSettings] | None:
        """Held-out data; where absent, a share of the prompts of `train`."""

    @property
    def eval_fraction(self) -> float:
        """Share of the prompts of `train` that is held out where `eval` is absent."""

    @property
    def held_out_seed(self) -> int:
        """Decides which prompts are held out."""

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, in tokens."""

    @property
    def truncation(self) -> Truncation:
        """What gives way in a longer row."""

    @property
    def columns(self) -> Mapping[str, str]:
        """The data's column names by role."""

    @property
    def split(self) -> str | None:
        """Split to train on."""

    @property
    def filter(self) -> Mapping[str, Any]:
        """Conditions on columns."""

    @property
    def group_by_prompt(self) -> bool:
        """Whether the comparisons of one prompt become one group."""

    @property
    def eos(self) -> Choice:
        """Whether a completion ends with the end-of-sequence token."""

    @property
    def chat_template(self) -> Choice:
        """Whether the tokenizer's chat template is applied."""

    @property
    def processes(self) -> int | None:
        """Processes that tokenize."""
