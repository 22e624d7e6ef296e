"""The unit of the data: one prompt, its completions, and the judgements between them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets


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


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, at least one completion, at least one comparison."""

    prompt: np.ndarray
    """(prompt_tokens,) int64, at least one token."""
    completions: tuple[np.ndarray, ...]
    """Each (completion_tokens,) int64, at least one token; holds EOS where EOS is scored."""
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class GroupLayout:
    """Everything about the groups but their token ids; flat arrays, ragged by offsets.

    What belongs to group g lies in `[offsets[g] : offsets[g + 1]]`.
    """

    prompt_rows: np.ndarray
    """(groups,) row of the token table that holds the prompt."""
    prompt_lengths: np.ndarray
    """(groups,) tokens."""
    prompt_hashes: np.ndarray
    """(groups,) 64-bit hash of the prompt before any cut."""
    completion_offsets: np.ndarray
    """(groups + 1,)"""
    completion_cells: np.ndarray
    """(completions,) 2 * row of the token table + side, where side 0 is chosen and 1 is rejected."""
    completion_lengths: np.ndarray
    """(completions,) tokens."""
    completion_hashes: np.ndarray
    """(completions,) 64-bit hash of the token ids."""
    comparison_offsets: np.ndarray
    """(groups + 1,)"""
    chosen: np.ndarray
    """(comparisons,) index among the group's completions, -1 for none."""
    rejected: np.ndarray
    """(comparisons,) index among the group's completions, -1 for none."""
    probabilities: np.ndarray
    """(comparisons,) float64, NaN where the data give none."""
    source_rows: np.ndarray
    """(comparisons,) row of the source data, from 1."""

    def select(self, groups: np.ndarray) -> GroupLayout:
        """Return the layout of some groups, in the order given."""
        completions, completion_offsets = _gather(self.completion_offsets, groups)
        comparisons, comparison_offsets = _gather(self.comparison_offsets, groups)
        return GroupLayout(
            prompt_rows=self.prompt_rows[groups],
            prompt_lengths=self.prompt_lengths[groups],
            prompt_hashes=self.prompt_hashes[groups],
            completion_offsets=completion_offsets,
            completion_cells=self.completion_cells[completions],
            completion_lengths=self.completion_lengths[completions],
            completion_hashes=self.completion_hashes[completions],
            comparison_offsets=comparison_offsets,
            chosen=self.chosen[comparisons],
            rejected=self.rejected[comparisons],
            probabilities=self.probabilities[comparisons],
            source_rows=self.source_rows[comparisons],
        )

    def content_hash(self) -> str:
        """Return a hash of tokens, structure and labels; where the rows came from does not enter."""
        hasher = hashlib.blake2b(digest_size=16)
        for array in (
            self.prompt_hashes,
            self.prompt_lengths,
            self.completion_offsets,
            self.completion_hashes,
            self.completion_lengths,
            self.comparison_offsets,
            self.chosen,
            self.rejected,
        ):
            hasher.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        hasher.update(np.ascontiguousarray(self.probabilities, dtype=np.float64).tobytes())
        return hasher.hexdigest()


class GroupDataset:
    """A sequence of prompt groups whose token ids stay in a memory-mapped file."""

    def __init__(self, table: datasets.Dataset, layout: GroupLayout, *, paired: bool) -> None:
        """Take a table with list columns `prompt`, `chosen`, `rejected`, and the groups to make of it."""
        self.layout = layout
        self.paired = paired
        """False for {prompt, completion, label} data."""
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.layout.prompt_rows)

    def __getitem__(self, index: int) -> PromptGroup:
        group = range(len(self))[index]
        cells = self._completions_of(self.layout.completion_cells, group)
        rows = sorted({int(self.layout.prompt_rows[group]), *(int(cell) // 2 for cell in cells)})
        place = {row: number for number, row in enumerate(rows)}
        tokens = self._table[rows]

        def ids(row: int, column: str) -> np.ndarray:
            return tokens.column(column)[place[row]].values.to_numpy().astype(np.int64)

        return PromptGroup(
            prompt=ids(int(self.layout.prompt_rows[group]), "prompt"),
            completions=tuple(ids(int(cell) // 2, "rejected" if int(cell) % 2 else "chosen") for cell in cells),
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

        chunks = self._table.data.table
        largest = [pc.max(pc.list_flatten(chunks.column(name))).as_py() for name in ("prompt", "chosen", "rejected")]
        return max((value for value in largest if value is not None), default=0)

    def share_of(self, token: int) -> float:
        """Share of the table's tokens that are this one."""
        import pyarrow.compute as pc

        table = self._table.data.table
        columns = [pc.list_flatten(table.column(name)) for name in ("prompt", "chosen", "rejected")]
        total = sum(len(column) for column in columns)
        hits = sum(pc.sum(pc.equal(column, token)).as_py() or 0 for column in columns)
        return hits / total if total else 0.0

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
        start, end = self.layout.comparison_offsets[group : group + 2]
        return tuple(
            Comparison(
                chosen=int(chosen) if chosen >= 0 else None,
                rejected=int(rejected) if rejected >= 0 else None,
                preference_probability=None if np.isnan(probability) else float(probability),
                row=int(row),
            )
            for chosen, rejected, probability, row in zip(
                self.layout.chosen[start:end],
                self.layout.rejected[start:end],
                self.layout.probabilities[start:end],
                self.layout.source_rows[start:end],
            )
        )

    def select(self, indices: Sequence[int] | np.ndarray) -> GroupDataset:
        """Return a dataset of some groups, in the order given."""
        groups = np.arange(len(self))[np.asarray(indices, dtype=np.int64)]
        return GroupDataset(self._table, self.layout.select(groups), paired=self.paired)

    def _completions_of(self, values: np.ndarray, group: int) -> np.ndarray:
        start, end = self.layout.completion_offsets[group : group + 2]
        return values[start:end]


def _gather(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat positions of what belongs to the groups, and the offsets they have then."""
    lengths = offsets[groups + 1] - offsets[groups]
    gathered = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shift = np.repeat(offsets[groups] - gathered[:-1], lengths)
    return np.arange(gathered[-1]) + shift, gathered
