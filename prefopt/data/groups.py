"""The unit of the data: one prompt, its completions, and the judgements between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.group_layout import GroupLayout

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


@dataclass(frozen=True)
class Comparison:
    """One judgement: chosen beats rejected.

    Unpaired feedback has one side None: (c, None) is desirable, (None, c) is undesirable.
    """

    chosen: int | None
    """Index into `PromptGroup.completions`."""
    rejected: int | None
    """Index into `PromptGroup.completions`."""
    preference_probability: float | None
    """Probability that chosen beats rejected; None where the data give no soft label."""
    row: int
    """Row of the source data, counted from 1 and on through all sources; for messages."""
    chosen_score: tuple[float, ...] | None = None
    """Of each reward model; None where the data give none."""
    rejected_score: tuple[float, ...] | None = None
    """Of each reward model; None where the data give none."""
    value: float | None = None
    """Expected score of the prompt; None where the data give none."""
    gold: int | None = None
    """Index into `PromptGroup.completions` of a third, better one; None where the data give none."""
    list_number: int | None = None
    """Which list of its group the comparison belongs to, from 0; None: it is a list of its own."""
    list_scores: tuple[float, float] = (1.0, 0.0)
    """What chosen and rejected are worth in their list: scores, or minus their ranks."""


def lists_of(comparisons: Sequence[Comparison]) -> list[tuple[int, ...]]:
    """Return the comparisons of each list, as indices, lists in their order of appearance."""
    lists: dict[tuple[bool, int], list[int]] = {}
    for index, comparison in enumerate(comparisons):
        number = comparison.list_number
        lists.setdefault((number is None, index if number is None else number), []).append(index)
    return [tuple(members) for members in lists.values()]


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, at least one completion, at least one comparison."""

    prompt: np.ndarray
    """(prompt_tokens,) int64, at least one token."""
    completions: tuple[np.ndarray, ...]
    """Each (completion_tokens,) int64, at least one token; holds EOS where EOS is scored."""
    comparisons: tuple[Comparison, ...]


class GroupDataset:
    """A sequence of prompt groups whose token ids stay in a memory-mapped file."""

    def __init__(self, table: datasets.Dataset, layout: GroupLayout, *, paired: bool) -> None:
        """Take a table with a list `prompt` and a list of lists `completions`, and the groups to make of it."""
        self.layout = layout
        self.paired = paired
        """False for {prompt, completion, label} data."""
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.layout.prompt_rows)

    def __getitem__(self, index: int) -> PromptGroup:
        group = range(len(self))[index]
        layout = self.layout
        prompt_row = int(layout.prompt_rows[group])
        rows_of = self._completions_of(layout.completion_rows, group).tolist()
        rows = sorted({prompt_row, *rows_of})
        number = {row: place for place, row in enumerate(rows)}
        tokens = self._table[rows]
        prompts, completions = tokens.column("prompt"), tokens.column("completions")
        places = self._completions_of(layout.completion_places, group).tolist()
        lengths = self._completions_of(layout.completion_lengths, group).tolist()
        return PromptGroup(
            prompt=_ids(prompts[number[prompt_row]]),
            completions=tuple(
                _ids(completions[number[row]].values[place])[:length]
                for row, place, length in zip(rows_of, places, lengths)
            ),
            comparisons=self.comparisons(group),
        )

    def __iter__(self) -> Iterator[PromptGroup]:
        for index in range(len(self)):
            yield self[index]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(groups,) tokens of each prompt."""
        return self.layout.prompt_lengths

    @cached_property
    def comparisons_per_group(self) -> np.ndarray:
        """(groups,) number of comparisons of each group."""
        return np.diff(self.layout.comparison_offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of tokens, structure and labels, 32 hex digits; paths and row numbers do not enter."""
        return self.layout.content_hash()

    @cached_property
    def largest_id(self) -> int:
        """Largest token id of the table, read column by column."""
        import pyarrow.compute as pc

        largest = [pc.max(column).as_py() for column in self._token_columns()]
        return max((value for value in largest if value is not None), default=0)

    def share_of(self, token: int) -> float:
        """Share of the table's tokens that are this one."""
        import pyarrow.compute as pc

        columns = self._token_columns()
        total = sum(len(column) for column in columns)
        hits = sum(pc.sum(pc.equal(column, token)).as_py() or 0 for column in columns)
        return hits / total if total else 0.0

    @cached_property
    def lists_per_group(self) -> np.ndarray:
        """(groups,) number of lists of each group; a pair is a list of two."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.maximum.reduceat(self.layout.list_numbers, self.layout.comparison_offsets[:-1]) + 1

    @property
    def without_scores(self) -> int:
        """Comparisons of which a completion has no score."""
        missing = np.isnan(self.layout.scores).any(axis=2)
        sides = np.stack((self.layout.chosen, self.layout.rejected), axis=1)
        return int((missing & (sides >= 0)).any(axis=1).sum())

    @property
    def without_values(self) -> int:
        """Comparisons whose prompt has no value."""
        return int(np.isnan(self.layout.values).sum())

    @property
    def without_gold(self) -> int:
        """Comparisons that have no gold completion."""
        return int((self.layout.gold < 0).sum())

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        counts = np.diff(self.layout.completion_offsets)
        return int((np.repeat(self.layout.prompt_lengths, counts) + self.layout.completion_lengths).max())

    def completion_lengths(self, group: int) -> np.ndarray:
        """Return (completions,) the tokens of each completion of a group, without reading token ids."""
        return self._completions_of(self.layout.completion_lengths, group)

    def comparisons(self, group: int) -> tuple[Comparison, ...]:
        """Return the comparisons of a group, without reading token ids."""
        layout, (start, end) = self.layout, self.layout.comparison_offsets[group : group + 2]
        return tuple(
            Comparison(
                chosen=_index(chosen),
                rejected=_index(rejected),
                preference_probability=_number(probability),
                row=row,
                chosen_score=_score(scores[0]),
                rejected_score=_score(scores[1]),
                value=_number(value),
                gold=_index(gold),
                list_number=number,
                list_scores=(worth[0], worth[1]),
            )
            for chosen, rejected, probability, row, scores, value, gold, number, worth in zip(
                layout.chosen[start:end].tolist(),
                layout.rejected[start:end].tolist(),
                layout.probabilities[start:end].tolist(),
                layout.source_rows[start:end].tolist(),
                layout.scores[start:end].tolist(),
                layout.values[start:end].tolist(),
                layout.gold[start:end].tolist(),
                layout.list_numbers[start:end].tolist(),
                layout.list_scores[start:end].tolist(),
            )
        )

    def select(self, indices: Sequence[int] | np.ndarray) -> GroupDataset:
        """Return a dataset of some groups, in the order given."""
        groups = np.arange(len(self))[np.asarray(indices, dtype=np.int64)]
        return self.laid_out(self.layout.select(groups), paired=self.paired)

    def laid_out(self, layout: GroupLayout, *, paired: bool) -> GroupDataset:
        """Return other groups of the same table."""
        return GroupDataset(self._table, layout, paired=paired)

    def _token_columns(self) -> list[pa.ChunkedArray]:
        """Return the token ids of the table as flat columns."""
        import pyarrow.compute as pc

        table = self._table.data.table
        flat = pc.list_flatten(pc.list_flatten(table.column("completions")))
        return [pc.list_flatten(table.column("prompt")), flat]

    def _completions_of(self, values: np.ndarray, group: int) -> np.ndarray:
        start, end = self.layout.completion_offsets[group : group + 2]
        return values[start:end]


def _ids(tokens: pa.ListScalar) -> np.ndarray:
    return tokens.values.to_numpy().astype(np.int64)


def _index(place: int) -> int | None:
    return place if place >= 0 else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _score(models: list[float]) -> tuple[float, ...] | None:
    return None if math.isnan(models[0]) else tuple(models)
