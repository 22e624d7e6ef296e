"""Where a completion stands: an index of 32-byte keys, sorted by 64 of their bits, 52 bytes per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = 4
"""64-bit words of a key."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Rows:
    """Rows of one shard, or of several one after the other, without their token log-probs."""

    keys: np.ndarray
    """(rows, 4) uint64."""
    sums: np.ndarray
    """(rows,) fp32, nats."""
    tokens: np.ndarray
    """(rows,) int32."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of several parts, one after the other."""
        return cls(*(np.concatenate(column) for column in zip(*(vars(part).values() for part in parts))))


@dataclass(frozen=True)
class _Run:
    """Neighbouring shards, their rows sorted by hash."""

    rows: Rows
    hashes: np.ndarray
    """(kept,) uint64, sorted."""
    order: np.ndarray
    """(kept,) int32: row of each hash; rows that repeat an earlier one's key are left out."""

    @classmethod
    def of(cls, rows: Rows, kept: np.ndarray, hashes: np.ndarray) -> _Run:
        """Sort the kept rows, (kept,) int32 and ascending, by their hashes."""
        sort = np.argsort(hashes, kind="stable")  # nearly linear where sorted runs stand one after the other
        hashes, order = hashes[sort], kept[sort]
        repeats = _repeats(hashes, order, rows.keys)
        return cls(rows, hashes, order) if not repeats.any() else cls(rows, hashes[~repeats], order[~repeats])

    def followed_by(self, other: _Run) -> _Run:
        """Return one run of both; of one key, the row that is here wins."""
        order = np.concatenate([self.order, other.order + np.int32(len(self.rows))])
        return _Run.of(Rows.joined([self.rows, other.rows]), order, np.concatenate([self.hashes, other.hashes]))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, (n,), -1 where there is none. All 256 bits are compared."""
        hashes = _hashes(keys)
        place = np.searchsorted(self.hashes, hashes)
        found = np.full(len(keys), -1, dtype=np.int64)
        searching = np.flatnonzero(place < len(self.hashes))
        while len(searching):  # once, unless two keys share 64 bits
            searching = searching[self.hashes[place[searching]] == hashes[searching]]
            rows = self.order[place[searching]]
            hit = (self.rows.keys[rows] == keys[searching]).all(axis=1)
            found[searching[hit]] = rows[hit]
            searching = searching[~hit]
            place[searching] += 1
            searching = searching[place[searching] < len(self.hashes)]
        return found


class KeyIndex:
    """Rows of shards by key; of several rows with one key, the first.

    Kept in runs, each more than twice as long as the next, so that a small shard costs little to add.
    """

    def __init__(self, shards: Sequence[Rows] = ()) -> None:
        self._runs: list[_Run] = []
        self._starts = np.zeros(1, np.int64)
        self._add(shards)

    def _add(self, shards: Sequence[Rows]) -> None:
        shards = list(shards)
        if not shards:
            return
        rows = Rows.joined(shards)
        sizes = [len(one) for one in shards]
        self._starts = np.concatenate([self._starts, self._starts[-1] + np.cumsum(sizes, dtype=np.int64)])
        kept = np.flatnonzero(self.find(rows.keys) < 0).astype(np.int32)
        self._runs.append(_Run.of(rows, kept, _hashes(rows.keys)[kept]))
        while len(self._runs) > 1 and len(self._runs[-2].rows) <= 2 * len(self._runs[-1].rows):
            last = self._runs.pop()
            self._runs.append(self._runs.pop().followed_by(last))

    def with_shards(self, shards: Sequence[Rows]) -> KeyIndex:
        """Return an index with more shards; rows that are here win over fresh ones with their key."""
        index = KeyIndex()
        index._runs, index._starts = list(self._runs), self._starts
        index._add(shards)
        return index

    def __len__(self) -> int:
        return sum(len(run.order) for run in self._runs)

    def _placed_runs(self) -> Iterator[tuple[int, _Run]]:
        begin = 0
        for run in self._runs:
            yield begin, run
            begin += len(run.rows)

    @property
    def winners(self) -> np.ndarray:
        """(rows,) bool: which rows of all shards, one after the other, give their completion's value."""
        mask = np.zeros(int(self._starts[-1]), dtype=bool)
        for begin, run in self._placed_runs():
            mask[begin + run.order] = True
        return mask

    @property
    def keys(self) -> np.ndarray:
        """(rows, 4) uint64: keys of the rows of all shards, one after the other."""
        return np.concatenate([np.empty((0, WORDS), np.uint64), *(run.rows.keys for run in self._runs)])

    @property
    def tokens(self) -> int:
        """Scored tokens of all completions."""
        return sum(int(run.rows.tokens[run.order].sum(dtype=np.int64)) for run in self._runs)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Look keys up.

        Args:
            keys: (n, 4) uint64.

        Returns:
            (n,) places among the rows of all shards; -1 where a key is not held.
        """
        found = np.full(len(keys), -1, dtype=np.int64)
        for begin, run in self._placed_runs():
            open_ = np.flatnonzero(found < 0)
            rows = run.find(keys[open_])
            found[open_] = np.where(rows < 0, -1, begin + rows)
        return found

    def values(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sums (n,) fp32 in nats and tokens (n,) int32 of rows; NaN and 0 where the place is -1."""
        sums, tokens = np.full(len(places), np.nan, np.float32), np.zeros(len(places), np.int32)
        for begin, run in self._placed_runs():
            inside = (places >= begin) & (places < begin + len(run.rows))
            rows = places[inside] - begin
            sums[inside], tokens[inside] = run.rows.sums[rows], run.rows.tokens[rows]
        return sums, tokens

    def shard_of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each place, and the row in that shard."""
        shards = np.searchsorted(self._starts, places, side="right") - 1
        return shards, places - self._starts[shards]

    def span(self, shard: int) -> slice:
        """Return the places of the rows of one shard."""
        return slice(int(self._starts[shard]), int(self._starts[shard + 1]))


def as_words(keys: Sequence[bytes]) -> np.ndarray:
    """View keys of 32 bytes as (n, 4) uint64; `Keys` are in one buffer already."""
    content = getattr(keys, "buffer", None)
    content = b"".join(keys) if content is None else content
    return np.frombuffer(content, dtype=np.uint64).reshape(-1, WORDS)


def _hashes(keys: np.ndarray) -> np.ndarray:
    """64 bits of each key. Prompt and completion weigh differently: a text may be its own answer."""
    return keys[:, 0] * _ODD + keys[:, WORDS // 2]


def _repeats(hashes: np.ndarray, order: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Say which places of an order by hash have the key of an earlier place."""
    repeats = np.zeros(len(hashes), dtype=bool)
    close = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    same = (keys[order[close]] == keys[order[close - 1]]).all(axis=1)
    repeats[close[same]] = True
    for place in close[~same]:  # different keys with one hash: once in 2^64 pairs of rows
        begin = place - 1
        while begin > 0 and hashes[begin - 1] == hashes[place]:
            begin -= 1
        repeats[place] = (keys[order[begin:place]] == keys[order[place]]).all(axis=1).any()
    return repeats
