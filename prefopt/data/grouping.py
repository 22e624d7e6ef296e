"""Rows of token tables -> prompt groups, on lengths and hashes alone; no token id is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefopt.data.groups import GroupLayout


@dataclass(frozen=True)
class TokenRows:
    """What is known of each row of a token table without its ids; every array is (rows,)."""

    used: np.ndarray
    """Whether the row has ids."""
    prompt_lengths: np.ndarray
    prompt_hashes: np.ndarray
    has: np.ndarray
    """(rows, 2) whether there is a chosen, a rejected completion."""
    lengths: np.ndarray
    """(rows, 2) tokens."""
    hashes: np.ndarray
    """(rows, 2)"""
    probabilities: np.ndarray
    """NaN where the data give none."""
    source_rows: np.ndarray
    """From 1 and on through all sources."""


def token_rows(tables: Sequence[datasets.Dataset]) -> TokenRows:
    """Read the small columns of token tables as if they were one."""
    columns = [table.with_format("arrow")[:] for table in tables]
    rows = pa.concat_tables(columns)
    sides = ("chosen", "rejected")
    return TokenRows(
        used=pc.equal(rows["dropped"], "").to_numpy(),
        prompt_lengths=_lengths(rows["prompt"]),
        prompt_hashes=rows["prompt_hash"].to_numpy(),
        has=np.stack([rows[side].is_valid().to_numpy() for side in sides], axis=1),
        lengths=np.stack([_lengths(rows[side]) for side in sides], axis=1),
        hashes=np.stack([rows[f"{side}_hash"].to_numpy() for side in sides], axis=1),
        probabilities=rows["preference_probability"].to_numpy().astype(np.float64),
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
    cells = (2 * rows[:, None] + np.arange(2))[present]
    row_of_cell, side = np.divmod(cells, 2)
    group_of_cell = np.broadcast_to(group[:, None], present.shape)[present]
    lengths = known.lengths[row_of_cell, side]
    completion_of_cell, first_cell = _numbered(group_of_cell, known.hashes[row_of_cell, side], lengths)
    completion_offsets = _offsets(group_of_cell[first_cell], groups)

    index = np.full(present.shape, -1, dtype=np.int64)
    index[present] = completion_of_cell - completion_offsets[group_of_cell]
    return GroupLayout(
        prompt_rows=rows[first_of_group],
        prompt_lengths=known.prompt_lengths[rows[first_of_group]],
        prompt_hashes=known.prompt_hashes[rows[first_of_group]],
        completion_offsets=completion_offsets,
        completion_cells=cells[first_cell],
        completion_lengths=lengths[first_cell],
        completion_hashes=known.hashes[row_of_cell, side][first_cell],
        comparison_offsets=_offsets(group, groups),
        chosen=index[:, 0],
        rejected=index[:, 1],
        probabilities=known.probabilities[rows],
        source_rows=known.source_rows[rows],
    )


def _numbered(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each tuple of keys, counted as they first appear, and where they do."""
    if not len(keys[0]):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    _, first, inverse = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse.reshape(-1)], first[order]


def _offsets(group_of: np.ndarray, groups: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=groups))]).astype(np.int64)


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
