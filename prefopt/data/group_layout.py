"""Where the prompts, completions and judgements of all groups lie, without their token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


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
    completion_rows: np.ndarray
    """(completions,) row of the token table that holds the completion."""
    completion_places: np.ndarray
    """(completions,) its place among the completions of that row."""
    completion_lengths: np.ndarray
    """(completions,) tokens; fewer than the table holds where the end is cut off."""
    completion_hashes: np.ndarray
    """(completions,) 64-bit hash of the token ids in the table."""
    comparison_offsets: np.ndarray
    """(groups + 1,)"""
    chosen: np.ndarray
    """(comparisons,) index among the group's completions, -1 for none."""
    rejected: np.ndarray
    """(comparisons,) index among the group's completions, -1 for none."""
    gold: np.ndarray
    """(comparisons,) index among the group's completions, -1 for none."""
    list_numbers: np.ndarray
    """(comparisons,) which list of its group, from 0 without gaps; the comparisons of one row are one list."""
    list_scores: np.ndarray
    """(comparisons, 2) float64, what chosen and rejected are worth in their list."""
    scores: np.ndarray
    """(comparisons, 2, models) float64, of chosen and rejected, NaN where the data give none."""
    probabilities: np.ndarray
    """(comparisons,) float64, NaN where the data give none."""
    values: np.ndarray
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
            completion_rows=self.completion_rows[completions],
            completion_places=self.completion_places[completions],
            completion_lengths=self.completion_lengths[completions],
            completion_hashes=self.completion_hashes[completions],
            comparison_offsets=comparison_offsets,
            chosen=self.chosen[comparisons],
            rejected=self.rejected[comparisons],
            gold=self.gold[comparisons],
            list_numbers=self.list_numbers[comparisons],
            list_scores=self.list_scores[comparisons],
            scores=self.scores[comparisons],
            probabilities=self.probabilities[comparisons],
            values=self.values[comparisons],
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
        for name, array in self._added():
            hasher.update(f"{name} {array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()

    def _added(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what plain pairs and labels do not have: their hash is what it was before there was such a thing."""
        if (self.gold >= 0).any():
            yield "gold", self.gold.astype(np.int64)
        if not np.isnan(self.scores).all():
            yield "scores", self.scores
        if not np.isnan(self.values).all():
            yield "values", self.values
        if (self.list_scores != (1.0, 0.0)).any():
            yield "list_numbers", self.list_numbers.astype(np.int64)
            yield "list_scores", self.list_scores


def _gather(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat positions of what belongs to the groups, and the offsets they have then."""
    lengths = offsets[groups + 1] - offsets[groups]
    gathered = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shift = np.repeat(offsets[groups] - gathered[:-1], lengths)
    return np.arange(gathered[-1]) + shift, gathered
