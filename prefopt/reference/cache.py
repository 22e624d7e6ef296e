"""The reference cache: log-probs by content, in a folder of Parquet shards.

    folder/
      reference.json  whose log-probs these are
      shard-<order>-<level>-<sha>.parquet
                      prompt, completion (128-bit hashes of token ids), logp_sum, tokens, token_logps
      certificate-<fingerprint>.json
                      how far a quantized reference is from full precision
      .used           touched whenever the cache is opened

A shard appears complete or not at all. A writer looks up under the folder's lock what is there already and commits the
rest, so the first commit of a completion is the only one; should two be there all the same (a file system without
locks), the first shard in the order of commits gives the value, and merging keeps that one. Any number of processes
may read, write and merge at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from prefopt.errors import CacheError, Problem
from prefopt.reference import merging
from prefopt.reference.compaction import Merged, compact, keep_only
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.index import KeyIndex, as_words
from prefopt.reference.note import claim
from prefopt.reference.publishing import PATIENCE, WRITING, locked, remove_stale
from prefopt.reference.shards import (
    HASH_BYTES,
    KEY_BYTES,
    ScoredRows,
    ShardName,
    damage,
    read_index,
    read_token_logps,
    shard_names,
    to_table,
)

__all__ = ["HALF_STEP", "KEY_BYTES", "Adopted", "ReferenceCache", "ScoredRows", "text_key"]

HALF_STEP = 2.0**-11
"""Relative error of a stored per-token log-prob (16-bit float); sums are stored in 32 bit."""
USED = ".used"
"""Its modification time is the last use of a cache."""

_ATTEMPTS = 100
"""Looks at a folder whose shards are merged while they are read."""


def text_key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """Key of one scored text: hashes of the token ids of prompt and completion, 16 bytes each."""
    return _ids_hash(prompt) + _ids_hash(completion)


def _ids_hash(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype("<i8", copy=False).tobytes(), digest_size=HASH_BYTES).digest()


@dataclass(frozen=True)
class Adopted:
    """What a shard from elsewhere brought."""

    new: int
    """Completions that were not here."""
    known: int
    """Completions that were here and keep their value."""
    largest_difference: float
    """Between both values of a known completion, nats."""

    def __add__(self, other: Adopted) -> Adopted:
        largest = max(self.largest_difference, other.largest_difference)
        return Adopted(self.new + other.new, self.known + other.known, largest)


class ReferenceCache:
    """One reference's log-probs in one folder."""

    def __init__(
        self,
        folder: Path,
        identity: ReferenceIdentity,
        *,
        named_by_user: bool = False,
        after_commit: Callable[[Path], None] | None = None,
    ) -> None:
        """Open a cache, making the folder where there is none.

        Args:
            folder: where it is or will be.
            identity: the reference whose log-probs it holds.
            named_by_user: whether the recipe names the folder, for the wording of problems.
            after_commit: called with every file that this process commits: shards, the certificate.

        Raises:
            CacheError: the folder holds another reference, something else, or a damaged shard.
        """
        self.folder = folder
        self.identity = identity
        self._after_commit = after_commit
        claim(folder, identity, named_by_user=named_by_user)
        self._shards: list[ShardName] = []
        self._metadata: list[dict[str, str]] = []
        self._index = KeyIndex()
        with contextlib.suppress(OSError):  # a folder that may only be read serves as it is
            (folder / USED).touch()
        self.refresh()
        with contextlib.suppress(OSError):
            self._merge_if_due()

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Read the index of shards that appeared since the last look.

        A look is repeated until it shows nothing new: while shards are merged, one listing of a folder can miss both
        the merged shard, which came after the listing began, and its sources, which went before it ended.
        """
        for _ in range(_ATTEMPTS):
            names = shard_names(self.folder)
            if set(names) == set(self._shards):
                return
            vanished = not set(names).issuperset(self._shards)
            known: list[ShardName] = [] if vanished else self._shards
            fresh = [name for name in names if name not in set(known)]
            try:
                read = [read_index(self.folder / str(name), fingerprint=self.identity.fingerprint) for name in fresh]
            except FileNotFoundError:
                continue
            index = KeyIndex() if vanished else self._index
            self._index = index.with_shards([rows for rows, _ in read])
            self._metadata = [*([] if vanished else self._metadata), *(metadata for _, metadata in read)]
            self._shards = [*known, *fresh]

    def lookup(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up completions.

        Returns:
            found (n,) bool, sums (n,) fp32 in nats (NaN where not found), tokens (n,) int32.
        """
        places = self._index.find(as_words(keys))
        return places >= 0, *self._index.values(places)

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Say which of the keys, (n, 4) uint64, are here: (n,) bool."""
        return self._index.find(keys) >= 0

    def token_logps(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """Per-token log-probs of completions, each (tokens,) fp16, nats; empty where the cache has none.

        Shards are read one row group at a time, and only those row groups that hold one of the completions.
        """
        words = as_words(keys)
        for _ in range(_ATTEMPTS):
            places = self._index.find(words)
            held = np.flatnonzero(places >= 0)
            shards, rows = self._index.shard_of(places[held])
            values: list[np.ndarray] = [np.empty(0, np.float16)] * len(keys)
            try:
                for shard in np.unique(shards):
                    inside = np.flatnonzero(shards == shard)
                    read = read_token_logps(self.folder / str(self._shards[shard]), rows[inside])
                    for place, one in zip(held[inside], read):
                        values[place] = one
            except FileNotFoundError:  # merged by another process since the last look
                self.refresh()
                continue
            return values
        raise CacheError(
            Problem(f"reference cache {self.folder}", "shards that stay while they are read",
                    f"they vanished {_ATTEMPTS} times", "see what else writes to this folder")
        )  # fmt: skip

    def commit(self, rows: ScoredRows) -> Path | None:
        """Write the rows that are not here yet as one shard; when this returns they are on the disk.

        Returns:
            The shard; None where every row was here already: the first commit of a completion wins.

        Raises:
            CacheError: the disk is full or refuses; no partial shard is left behind.
        """
        with self.said_plainly(), locked(self.folder, WRITING):
            remove_stale(self.folder)
            self.refresh()
            _, first = np.unique(np.array(rows.keys, dtype=object), return_index=True)
            absent = self._index.find(as_words(rows.keys)) < 0
            fresh = [int(place) for place in np.sort(first) if absent[place]]
            if not fresh:
                return None
            name = merging.write(
                self.folder, iter([to_table(rows.take(fresh))]), self._shard_metadata(),
                order=self._next_order(), level=0,
            )  # fmt: skip
            self.refresh()
        self.committed(self.folder / str(name))
        self._merge_if_due()
        return self.folder / str(name)

    def committed(self, file: Path) -> None:
        """Say that a file of this cache is complete: a cache at a URL sends it there."""
        if self._after_commit is not None:
            self._after_commit(file)

    def adopt(self, file: Path) -> Adopted:
        """Take the rows of a shard from elsewhere that are not here yet.

        Raises:
            CacheError: the shard is damaged or of another reference, or the disk refuses; nothing was taken.
        """
        theirs, _ = read_index(file, fingerprint=self.identity.fingerprint)
        with self.said_plainly(), locked(self.folder, WRITING):
            self.refresh()
            places = self._index.find(theirs.keys)
            known = places >= 0
            differences = np.abs(theirs.sums[known] - self._index.values(places[known])[0])
            source = merging.Source(file, KeyIndex([theirs]).winners & ~known)
            merging.merge(
                self.folder, [source], order=self._next_order(), level=0, fingerprint=self.identity.fingerprint
            )
            self.refresh()
        self._merge_if_due()
        return Adopted(int(source.kept.sum()), int(known.sum()), float(differences.max(initial=0.0)))

    def _next_order(self) -> int:
        return max((name.order for name in self._shards), default=0) + 1

    @contextlib.contextmanager
    def said_plainly(self) -> Iterator[None]:
        """Say of what the disk refuses that it was this cache."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise CacheError(
                Problem(
                    f"reference cache {self.folder}",
                    "room for one more shard" if full else "a folder that can be written",
                    error.strerror or str(error),
                    "free space, or set reference.cache to another folder; every earlier shard is kept, "
                    "and the same command goes on from there",
                )
            ) from error

    def _shard_metadata(self) -> dict[str, str]:
        return {
            "fingerprint": self.identity.fingerprint,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }

    def _merge_if_due(self) -> None:
        if merging.due(self._shards):
            self.compact(all_levels=False, patience=0.0)

    def compact(self, *, all_levels: bool = True, patience: float = PATIENCE) -> Merged:
        """Merge small shards, as `prefopt.reference.compaction.compact` does."""
        with self.said_plainly():
            done = compact(self.folder, self.identity.fingerprint, all_levels=all_levels, patience=patience)
        self.refresh()
        return done

    def keep_only(self, keys: Collection[bytes], *, dry_run: bool = False) -> Merged:
        """Drop every completion but these, as `prefopt.reference.compaction.keep_only` does."""
        with self.said_plainly():
            done = keep_only(self.folder, self.identity.fingerprint, keys, dry_run=dry_run)
        self.refresh()
        return done

    def check_shards(self) -> list[str]:
        """Read every byte of every shard against its SHA-256; returns one line per damaged or foreign shard."""
        wrong = []
        for name in shard_names(self.folder):
            file = self.folder / str(name)
            with contextlib.suppress(FileNotFoundError):  # merged meanwhile
                line = damage(file)
                if line is None:
                    try:
                        read_index(file, fingerprint=self.identity.fingerprint)
                    except CacheError as error:
                        line = error.problems[0].given
                if line is not None:
                    wrong.append(line)
        return wrong

    def written_with(self) -> dict[str, list[str]]:
        """Return what the shards say they were computed with, every different value."""
        values: dict[str, set[str]] = {}
        for metadata in self._metadata:
            for name, value in metadata.items():
                values.setdefault(name, set()).update(value.split(merging.SEPARATOR))
        return {name: sorted(found) for name, found in sorted(values.items())}

    def summary(self) -> dict[str, int | str]:
        """Count rows, tokens, shards and bytes."""
        sizes = []
        for name in shard_names(self.folder):
            with contextlib.suppress(FileNotFoundError):
                sizes.append((self.folder / str(name)).stat().st_size)
        return {
            "folder": str(self.folder),
            "fingerprint": self.identity.fingerprint,
            "completions": len(self),
            "tokens": self._index.tokens,
            "shards": len(sizes),
            "bytes": sum(sizes),
        }
