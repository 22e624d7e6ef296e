"""What happened to the rows: counts with reasons, token statistics, one example as the model will see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from prefopt.data.groups import GroupDataset, PromptGroup

SHOWN_TOKENS = 4
"""Tokens shown of each end of the example."""


class Dropped(StrEnum):
    """Why a row is not used."""

    FILTERED = "data.filter does not keep it"
    PROMPT_NULL = "prompt is null"
    CHOSEN_NULL = "chosen is null"
    REJECTED_NULL = "rejected is null"
    COMPLETION_NULL = "completion is null"
    PROMPT_EMPTY = "prompt is empty"
    CHOSEN_EMPTY = "chosen is empty"
    REJECTED_EMPTY = "rejected is empty"
    COMPLETION_EMPTY = "completion is empty"
    IDENTICAL = "chosen and rejected are identical"
    SAME_IDS = "chosen and rejected differ as text and have the same token ids"
    IDENTICAL_AFTER_CUT = "chosen and rejected are identical after the cut to data.max_length"
    NO_SHARED_PROMPT = "no prompt is given and chosen and rejected begin differently"
    PROBABILITY = "preference_probability outside [0, 1]"
    GOLD_EMPTY = "gold is empty"
    LISTED_NULL = "a completion of the list is null"
    LISTED_EMPTY = "a completion of the list is empty"
    LIST_SHORT = "a list with fewer than two completions"
    LIST_IDENTICAL = "all completions of the list are identical"
    LIST_SAME_IDS = "the completions of the list differ as text and have the same token ids"
    LIST_IDENTICAL_AFTER_CUT = "the completions of the list are identical after the cut to data.max_length"
    LIST_TIED = "all completions of the list have the same score or rank"
    SCORE_NULL = "a score or rank of the list is null"
    PROMPT_TOO_LONG = "prompt alone reaches data.max_length"
    TOO_LONG = "longer than data.max_length"


class Cut(StrEnum):
    """What was cut off a row that is used."""

    COMPLETION = "completion cut to data.max_length"
    PROMPT = "start of the prompt cut to data.max_length"
    REPEATED = "completions that their list holds several times, kept once"


class Missing(StrEnum):
    """What a row that is used may lack; a loss that needs it refuses the data."""

    SCORE = "no score"
    VALUE = "no value"
    GOLD = "no gold"


@dataclass(frozen=True)
class SourceReport:
    """The rows of one source."""

    name: str
    """As the recipe writes it."""
    role: str
    """`train` or `eval`."""
    rows_read: int
    rows_kept: int
    """Before weights: each row counts once."""
    dropped: Mapping[str, int]
    """Rows by reason."""
    cut: Mapping[str, int]
    """Kept rows by reason."""
    boundary_merges: int
    """Kept rows whose ids at the boundary would differ if prompt and completion were one text."""
    template_mismatches: int
    """Kept rows where the chat template writes the prompt differently once a completion follows."""
    without: Mapping[str, int]
    """Kept rows that lack what other rows of the source have."""
    from_cache: bool
    """Whether the token ids were there already."""


@dataclass(frozen=True)
class TokenStatistics:
    """Lengths in tokens."""

    mean: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> TokenStatistics | None:
        """Return the statistics of (n,) lengths; None where n is 0."""
        if len(lengths) == 0:
            return None
        return cls(float(lengths.mean()), float(np.percentile(lengths, 95)), int(lengths.max()))

    def __str__(self) -> str:
        return f"mean {self.mean:,.1f}, p95 {self.p95:,.0f}, max {self.max:,}"


@dataclass(frozen=True)
class SetReport:
    """The training set or the evaluation set, after weights and grouping."""

    groups: int
    comparisons: int
    completions: int
    """A completion that several comparisons of a group share counts once."""
    lists: int
    """Each with all its comparisons; a pair is a list of two."""
    prompt_tokens: TokenStatistics | None
    """Over groups."""
    chosen_tokens: TokenStatistics | None
    """Over comparisons."""
    rejected_tokens: TokenStatistics | None
    """Over comparisons."""
    fingerprint: str

    @classmethod
    def of(cls, dataset: GroupDataset) -> SetReport:
        """Count a dataset."""
        layout = dataset.layout
        start = np.repeat(layout.completion_offsets[:-1], dataset.comparisons_per_group)
        chosen = (start + layout.chosen)[layout.chosen >= 0]
        rejected = (start + layout.rejected)[layout.rejected >= 0]
        return cls(
            groups=len(dataset),
            comparisons=len(layout.chosen),
            completions=len(layout.completion_lengths),
            lists=int(dataset.lists_per_group.sum()),
            prompt_tokens=TokenStatistics.of(layout.prompt_lengths),
            chosen_tokens=TokenStatistics.of(layout.completion_lengths[chosen]),
            rejected_tokens=TokenStatistics.of(layout.completion_lengths[rejected]),
            fingerprint=dataset.fingerprint,
        )


@dataclass(frozen=True)
class Example:
    """The ends of one row, token by token, decoded: a missing EOS or a doubled BOS is seen here."""

    texts: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    """Prompt, chosen, rejected, as far as they are there: what it is, its first tokens, its last tokens (none where
    the first ones are all)."""


@dataclass(frozen=True)
class DataReport:
    """Everything that was read, dropped, cut and kept."""

    sources: tuple[SourceReport, ...]
    train: SetReport
    eval: SetReport | None
    shared_prompts: int
    """Prompts of the evaluation set that are trained on too (never with `eval_fraction`)."""
    unknown_tokens: float
    """Share of the training set's tokens that are the tokenizer's unknown token."""
    unused_template: bool
    """Whether the tokenizer has a chat template and the rows are plain text, to which it is not applied."""
    example: Example

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def rows_kept(self) -> int:
        """Rows of all sources that are used."""
        return sum(source.rows_kept for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows of all sources that are not used, by reason."""
        return _total([source.dropped for source in self.sources])

    @property
    def cut(self) -> dict[str, int]:
        """Rows of all sources that were cut, by reason."""
        return _total([source.cut for source in self.sources])

    @property
    def without(self) -> dict[str, int]:
        """Rows of all sources that lack what other rows of their source have."""
        return _total([source.without for source in self.sources])

    @property
    def boundary_merges(self) -> int:
        """Rows of all sources whose boundary would merge."""
        return sum(source.boundary_merges for source in self.sources)

    @property
    def template_mismatches(self) -> int:
        """Rows of all sources whose chat template is not prefix-consistent."""
        return sum(source.template_mismatches for source in self.sources)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for `result.json`."""
        totals = {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "dropped": self.dropped,
            "cut": self.cut,
            "without": self.without,
            "boundary_merges": self.boundary_merges,
            "template_mismatches": self.template_mismatches,
        }
        return {**totals, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        cached = all(source.from_cache for source in self.sources)
        lines = [
            f"{self.rows_read:,} rows read, {self.rows_kept:,} kept" + (" (token ids from the cache)" if cached else "")
        ]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        lines += [f"  cut {count:,}: {reason}" for reason, count in self.cut.items()]
        lines += [f"  {count:,} rows: {what}, unlike the others" for what, count in self.without.items()]
        if self.boundary_merges:
            lines.append(
                f"  {self.boundary_merges:,} rows: prompt and completion as one text would give other ids "
                "at the boundary"
            )
        if self.template_mismatches:
            lines.append(
                f"  {self.template_mismatches:,} rows: the chat template writes the prompt differently once "
                "a completion follows; the completion starts where they part"
            )
        if self.unknown_tokens:
            lines.append(f"  {self.unknown_tokens:.2%} of the tokens are unknown to the tokenizer")
        if self.unused_template:
            lines.append("  plain text: the tokenizer's chat template is not applied (data.chat_template=always does)")
        lines += _set_lines("train", self.train)
        if self.eval is not None:
            lines += _set_lines("eval", self.eval)
        if self.shared_prompts:
            lines.append(f"  {self.shared_prompts:,} prompts of the evaluation set are trained on too")
        return lines + _example_lines(self.example)


def example_of(group: PromptGroup, tokenizer: Decoder) -> Example:
    """Decode the ends of the first comparison of a group, token by token."""
    comparison = group.comparisons[0]
    sides = {"chosen": comparison.chosen, "rejected": comparison.rejected}
    texts = {"prompt": group.prompt}
    texts |= {name: group.completions[side] for name, side in sides.items() if side is not None}

    def decoded(ids: np.ndarray) -> tuple[str, ...]:
        return tuple(str(tokenizer.decode([int(token)])) for token in ids)

    def ends(ids: np.ndarray) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if len(ids) <= 2 * SHOWN_TOKENS:
            return decoded(ids), ()
        return decoded(ids[:SHOWN_TOKENS]), decoded(ids[-SHOWN_TOKENS:])

    return Example(tuple((name, *ends(ids)) for name, ids in texts.items()))


class Decoder(Protocol):
    """The part of a tokenizer that the example needs."""

    def decode(self, token_ids: list[int]) -> str | list[str]:
        """Return the text of token ids."""


def _total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _set_lines(name: str, report: SetReport) -> list[str]:
    lists = f" of {report.lists:,} lists" if report.lists < report.comparisons else ""
    counts = f"{report.comparisons:,} comparisons{lists}, {report.groups:,} groups, {report.completions:,} completions"
    lines = [f"  {name}: {counts}"]
    for what, statistics in (
        ("prompt", report.prompt_tokens),
        ("chosen", report.chosen_tokens),
        ("rejected", report.rejected_tokens),
    ):
        if statistics is not None:
            lines.append(f"    {what} tokens: {statistics}")
    return lines


def _example_lines(example: Example) -> list[str]:
    return [
        f"  example {name + ':':<10}" + " ".join(map(repr, start)) + ("  …  " + " ".join(map(repr, end)) if end else "")
        for name, start, end in example.texts
    ]
