"""Rows of token tables -> prompt groups, on lengths and hashes alone; no token id is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefopt.data.group_layout import GroupLayout


@dataclass(frozen=True)
class TokenRows:
    """What is known of each row of a token table without its ids; every array is (rows, ...).

    The places of a row are its completions: chosen, rejected and gold; or those of a list. Rows that have fewer than
    others leave the last places empty.
    """

    used: np.ndarray
    """Whether the row has ids."""
    prompt_lengths: np.ndarray
    prompt_hashes: np.ndarray
    has: np.ndarray
    """(rows, places) whether there is a completion."""
    lengths: np.ndarray
    """(rows, places) tokens."""
    hashes: np.ndarray
    """(rows, places)"""
    scores: np.ndarray
    """(rows, places, models) NaN where the data give none."""
    list_scores: np.ndarray
    """(rows, places) by what a list is ordered, higher is better; NaN in rows that are no list."""
    probabilities: np.ndarray
    """NaN where the data give none."""
    values: np.ndarray
    """NaN where the data give none."""
    source_rows: np.ndarray
    """From 1 and on through all sources."""


def token_rows(tables: Sequence[datasets.Dataset]) -> TokenRows:
    """Read the small columns of token tables as if they were one."""
    rows = pa.concat_tables([table.with_format("arrow")[:] for table in tables])
    counts = _lengths(rows["completions"])
    row, place = _positions(counts)
    shape = (rows.num_rows, max(2, counts.max(initial=0)))
    inner = pc.list_flatten(rows["completions"])
    has = np.zeros(shape, dtype=bool)
    lengths, hashes = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    has[row, place] = inner.is_valid().to_numpy()
    lengths[row, place] = _lengths(inner)
    hashes[row, place] = pc.list_flatten(rows["completion_hashes"]).to_numpy()
    list_scores = np.full(shape, np.nan)
    list_scores[_positions(_lengths(rows["list_scores"]))] = pc.list_flatten(rows["list_scores"]).to_numpy()
    return TokenRows(
        used=pc.equal(rows["dropped"], "").to_numpy(),
        prompt_lengths=_lengths(rows["prompt"]),
        prompt_hashes=rows["prompt_hash"].to_numpy(),
        has=has,
        lengths=lengths,
        hashes=hashes,
        scores=_scores(rows["scores"], shape),
        list_scores=list_scores,
        probabilities=rows["preference_probability"].to_numpy().astype(np.float64),
        values=rows["value"].to_numpy().astype(np.float64),
        source_rows=np.arange(1, rows.num_rows + 1),
    )


def group_rows(known: TokenRows, rows: np.ndarray, *, by_prompt: bool) -> GroupLayout:
    """Lay out groups.

    Args:
        known: lengths and hashes.
        rows: (n,) the rows to use, possibly with repeats; all of them used.
        by_prompt: True makes one group of the rows with equal prompt ids; else every row is a group.

    Returns:
        Groups in the order in which their prompts first appear, completions in theirs, equal ones once.
    """
    group = np.arange(len(rows))
    if by_prompt:
        # The hash is of the whole prompt; a cut one is told apart by its length.
        group, _ = _numbered(known.prompt_hashes[rows], known.prompt_lengths[rows])
        order = np.argsort(group, kind="stable")
        rows, group = rows[order], group[order]
    _, first_of_group = np.unique(group, return_index=True)
    groups = len(first_of_group)

    present = known.has[rows]
    at, place = np.nonzero(present)
    lengths, hashes = known.lengths[rows[at], place], known.hashes[rows[at], place]
    completion, first = _numbered(group[at], hashes, lengths)
    completion_offsets = _offsets(group[at][first], groups)
    index = np.full(present.shape, -1, dtype=np.int64)
    index[present] = completion - completion_offsets[group[at]]

    of, better, worse = _comparisons(known.list_scores[rows])
    sides = np.stack((better, worse), axis=1)
    is_pair = np.isnan(known.list_scores[rows][:, 0])
    return GroupLayout(
        prompt_rows=rows[first_of_group],
        prompt_lengths=known.prompt_lengths[rows[first_of_group]],
        prompt_hashes=known.prompt_hashes[rows[first_of_group]],
        completion_offsets=completion_offsets,
        completion_rows=rows[at][first],
        completion_places=place[first],
        completion_lengths=lengths[first],
        completion_hashes=hashes[first],
        comparison_offsets=_offsets(group[of], groups),
        chosen=index[of, better],
        rejected=index[of, worse],
        gold=np.where(is_pair, index[:, 2], -1)[of] if index.shape[1] > 2 else np.full(len(of), -1),
        list_numbers=(np.arange(len(rows)) - first_of_group[group])[of],
        list_scores=_list_scores(known)[rows[of][:, None], sides],
        scores=known.scores[rows[of][:, None], sides],
        probabilities=known.probabilities[rows[of]],
        values=known.values[rows[of]],
        source_rows=known.source_rows[rows[of]],
    )


def _comparisons(list_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, better and worse place of every comparison, in the order of the rows.

    The first place of a pair beats the second; in a list every place beats those of a lower score.
    """
    beats = list_scores[:, :, None] > list_scores[:, None, :]
    beats[np.isnan(list_scores[:, 0]), 0, 1] = True
    of, better, worse = np.nonzero(beats)
    return of, better, worse


def _list_scores(known: TokenRows) -> np.ndarray:
    """Return (rows, places) scores of lists; a pair is a list of two with its mean scores, or with 1 and 0.

    Pairs have 1 and 0 unless every one of them has scores: the two are of different units.
    """
    pairs = np.isnan(known.list_scores[:, 0])
    filled = known.list_scores.copy()
    means = known.scores[:, :2].mean(axis=2)
    all_scored = not np.isnan(means[known.used & pairs]).any()
    filled[pairs, :2] = means[pairs] if all_scored else (1.0, 0.0)
    return filled


def _numbered(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each tuple of keys, counted as they first appear, and where they do."""
    if not len(keys[0]):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    _, first, inverse = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse.reshape(-1)], first[order]


def _scores(lists: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """Return (rows, places, models) the scores of nested lists."""
    inner = pc.list_flatten(lists)
    row, place = _positions(_lengths(lists))
    of, model = _positions(_lengths(inner))
    scores = np.full((*shape, 1 + model.max(initial=0)), np.nan)
    scores[row[of], place[of], model] = pc.list_flatten(inner).to_numpy()
    return scores


def _positions(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, of every element of lists with these lengths, its list and its place in it."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _offsets(group_of: np.ndarray, groups: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=groups))]).astype(np.int64)


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
