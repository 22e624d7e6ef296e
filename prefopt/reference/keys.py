"""Keys of a dataset's completions, hashed straight from the memory-mapped token table.

A key is two 16-byte hashes, of the prompt's token ids and of the completion's. A million keys are one buffer of 32 MB,
not a million Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from prefopt.data.groups import GroupDataset
from prefopt.reference.shards import HASH_BYTES, KEY_BYTES


class Keys(Sequence[bytes]):
    """Keys in one buffer; reads like a sequence of 32-byte strings."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer

    @classmethod
    def of(cls, hashes: np.ndarray) -> Keys:
        """Take (n, 32) uint8."""
        return cls(hashes.tobytes())

    @property
    def hashes(self) -> np.ndarray:
        """(n, 32) uint8."""
        return np.frombuffer(self.buffer, dtype=np.uint8).reshape(-1, KEY_BYTES)

    @property
    def sortable(self) -> np.ndarray:
        """(n,) the same as fixed-width strings; equal and ordered as the keys are."""
        return np.frombuffer(self.buffer, dtype=f"S{KEY_BYTES}")

    def take(self, places: np.ndarray) -> Keys:
        """Return the keys at some places (numbers or a mask)."""
        return Keys.of(self.hashes[places])

    def __len__(self) -> int:
        return len(self.buffer) // KEY_BYTES

    def __iter__(self) -> Iterator[bytes]:
        buffer = self.buffer
        return (buffer[begin : begin + KEY_BYTES] for begin in range(0, len(buffer), KEY_BYTES))

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Keys: ...
    def __getitem__(self, index: int | slice) -> bytes | Keys:
        if isinstance(index, slice):
            return Keys.of(self.hashes[index])
        begin = range(len(self))[index] * KEY_BYTES
        return self.buffer[begin : begin + KEY_BYTES]


@dataclass(frozen=True)
class _Texts:
    """Token lists of one column, chunk by chunk, as the table holds them."""

    lists: list[pa.ListArray]
    first_row: np.ndarray
    """(chunks + 1,) table row with which each chunk begins."""
    first_text: list[Callable[[np.ndarray], np.ndarray]]
    """Per chunk: which list is the first one of some rows of the chunk."""


def dataset_keys(dataset: GroupDataset, *, rejected: bool = True) -> tuple[Keys, np.ndarray]:
    """Keys of every completion, group after group, and which of them a run needs.

    Returns:
        keys (completions,), needed (completions,) bool: those that a comparison names as chosen or, with `rejected`,
        as rejected; no loss reads the reference of gold completions.
    """
    layout = dataset.layout
    counts = np.diff(layout.completion_offsets)
    # The table is memory-mapped: its columns are read in place, once, in the order of their rows.
    table = dataset._table.data.table
    none = np.zeros(len(dataset), dtype=np.int64)
    hashes = np.empty((int(counts.sum()), KEY_BYTES), dtype=np.uint8)
    prompts = _hashes(_rows_of(table.column("prompt")), layout.prompt_rows, none, layout.prompt_lengths)
    hashes[:, :HASH_BYTES] = np.repeat(prompts, counts, axis=0)
    hashes[:, HASH_BYTES:] = _hashes(
        _lists_of(table.column("completions")),
        layout.completion_rows,
        layout.completion_places,
        layout.completion_lengths,
    )
    return Keys.of(hashes), _needed(dataset, rejected=rejected)


def _needed(dataset: GroupDataset, *, rejected: bool) -> np.ndarray:
    layout = dataset.layout
    needed = np.zeros(int(layout.completion_offsets[-1]), dtype=bool)
    first = np.repeat(layout.completion_offsets[:-1], np.diff(layout.comparison_offsets))
    for side in (layout.chosen, *((layout.rejected,) if rejected else ())):
        needed[(first + side)[side >= 0]] = True
    return needed


def _rows_of(column: pa.ChunkedArray) -> _Texts:
    """Take a column of token lists: row r is text r."""
    chunks = column.chunks
    return _Texts(chunks, _starts(chunks), [lambda rows: rows] * len(chunks))


def _lists_of(column: pa.ChunkedArray) -> _Texts:
    """Take a column of lists of token lists: row r begins with text `offsets[r]` of its chunk."""
    chunks = column.chunks
    offsets = [chunk.offsets.to_numpy() for chunk in chunks]
    return _Texts([chunk.values for chunk in chunks], _starts(chunks), [one.__getitem__ for one in offsets])


def _starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum([len(chunk) for chunk in chunks]))).astype(np.int64)


def _hashes(texts: _Texts, rows: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, 16) uint8, hashes of the first `lengths` tokens of the texts at (row, place)."""
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], texts.first_row)
    hashes = np.empty((len(rows), HASH_BYTES), dtype=np.uint8)
    for number, lists in enumerate(texts.lists):
        chosen = order[bounds[number] : bounds[number + 1]]
        if not len(chosen):
            continue
        text = texts.first_text[number](rows[chosen] - texts.first_row[number]) + places[chosen]
        offsets = lists.offsets.to_numpy()
        low, high = int(offsets[text].min()), int(offsets[text + 1].max())
        ids = memoryview(lists.values.slice(low, high - low).to_numpy().astype("<i8")).cast("B")
        begins = (8 * (offsets[text].astype(np.int64) - low)).tolist()
        ends = (8 * (offsets[text].astype(np.int64) - low + lengths[chosen])).tolist()
        digests = [hashlib.blake2b(ids[begin:end], digest_size=HASH_BYTES).digest() for begin, end in zip(begins, ends)]
        hashes[chosen] = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, HASH_BYTES)
    return hashes
