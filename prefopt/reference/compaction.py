"""What changes shards that are there: merging small ones, dropping rows that nobody needs.

A merged shard is published before its sources are unlinked, so at any instant every row stands in a complete shard; a
kill in between leaves sources whose rows all lose to the merged shard, which precedes them, until the next merge. Two
processes that merge at once are kept apart by a lock, and harmless without it: each unlinks only what it has published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt.errors import CacheError, Problem
from prefopt.reference.index import KeyIndex, as_words
from prefopt.reference.merging import Source, merge, runs_to_merge
from prefopt.reference.publishing import COMPACTING, PATIENCE, WRITING, discard, locked, remove_stale
from prefopt.reference.shards import ShardName, read_index, shard_names


@dataclass(frozen=True)
class Merged:
    """What merging or pruning did to a folder."""

    shards_before: int
    shards: int
    dropped: int
    """Completions that are gone."""


@dataclass(frozen=True)
class _Snapshot:
    """The shards of a folder in their order, read now: what is kept must not depend on who looked when."""

    folder: Path
    fingerprint: str
    names: list[ShardName]
    index: KeyIndex

    @classmethod
    def take(cls, folder: Path, fingerprint: str) -> _Snapshot:
        names = shard_names(folder)
        shards = [read_index(folder / str(name), fingerprint=fingerprint)[0] for name in names]
        return cls(folder, fingerprint, names, KeyIndex(shards))

    def source(self, number: int, kept: np.ndarray) -> Source:
        """Return a shard with those of its rows that are among (rows of all shards,) bool."""
        return Source(self.folder / str(self.names[number]), kept[self.index.span(number)])

    def replace(self, numbers: list[int], sources: list[Source]) -> None:
        """Publish one shard in the place of neighbouring ones, then unlink those."""
        members = [self.names[number] for number in numbers]
        level = max(name.level for name in members) + 1
        merge(self.folder, sources, order=members[0].order, level=level, fingerprint=self.fingerprint)
        for source in sources:
            discard(source.file)


def compact(folder: Path, fingerprint: str, *, all_levels: bool = True, patience: float = PATIENCE) -> Merged:
    """Merge small shards of a folder.

    Args:
        folder: a reference cache.
        fingerprint: of its reference.
        all_levels: merge all that are not large yet, instead of only levels that hold too many.
        patience: seconds to wait for a process that is merging; what it does need not be done again.

    Raises:
        CacheError: a shard is damaged; nothing is lost.
        OSError: the disk refuses; nothing is lost.
    """
    before = len(shard_names(folder))
    with locked(folder, COMPACTING, patience=patience) as held, contextlib.suppress(FileNotFoundError):
        # A file vanishes under the lock only where there are no locks: another process has done the work.
        if held:
            remove_stale(folder)
            snapshot = _Snapshot.take(folder, fingerprint)
            sizes = {name: (folder / str(name)).stat().st_size for name in snapshot.names}
            winners = snapshot.index.winners
            for run in runs_to_merge(snapshot.names, sizes, all_levels=all_levels):
                snapshot.replace(run, [snapshot.source(number, winners) for number in run])
    return Merged(before, len(shard_names(folder)), 0)


def keep_only(folder: Path, fingerprint: str, keys: Collection[bytes], *, dry_run: bool = False) -> Merged:
    """Drop every completion of a folder but these.

    Args:
        folder: a reference cache.
        fingerprint: of its reference.
        keys: of the completions that stay.
        dry_run: only count.

    Raises:
        CacheError: another process is at work, or a shard is damaged.
        OSError: the disk refuses; what was not dropped yet is there.
    """
    with locked(folder, COMPACTING) as alone, locked(folder, WRITING) as silent:
        if not (alone and silent):
            raise CacheError(
                Problem(f"reference cache {folder}", "a cache that no other process is changing",
                        "one kept its lock for a minute", "wait for it, or stop it")
            )  # fmt: skip
        snapshot = _Snapshot.take(folder, fingerprint)
        kept = np.zeros_like(snapshot.index.winners)
        places = snapshot.index.find(as_words(sorted(set(keys))))
        kept[places[places >= 0]] = True
        if not dry_run:
            for number in range(len(snapshot.names)):
                source = snapshot.source(number, kept)
                if not source.kept.all() or not len(source.kept):
                    snapshot.replace([number], [source])
    return Merged(len(snapshot.names), len(shard_names(folder)), len(snapshot.index) - int(kept.sum()))
