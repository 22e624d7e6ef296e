"""The caches of this user: one folder per reference; when each was used last; removing those that nobody uses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.paths import cache_root
from prefopt.reference.cache import USED
from prefopt.reference.note import NOTE
from prefopt.reference.publishing import partial_in, remove_stale
from prefopt.reference.shards import rows_in, shard_names

DAY = 24 * 3600.0


@dataclass(frozen=True)
class CacheFolder:
    """One cache under the cache root."""

    folder: Path
    fingerprint: str
    identity: dict[str, Any]
    completions: int | None
    """Rows of all shards; None where one of them is damaged."""
    shards: int
    bytes: int
    last_used: float
    """Seconds since the epoch."""

    @property
    def idle_days(self) -> float:
        """Days since it was opened last."""
        return (time.time() - self.last_used) / DAY


def cache_folders() -> list[CacheFolder]:
    """List the caches under the cache root, the one used last first; folders that recipes name are not among them."""
    notes = [note for kind in ("reference", "mirrors") for note in sorted((cache_root() / kind).glob(f"*/{NOTE}"))]
    found = (_look(note) for note in notes)
    return sorted((one for one in found if one is not None), key=lambda one: -one.last_used)


def _look(note: Path) -> CacheFolder | None:
    try:
        stored = json.loads(note.read_bytes())
        fingerprint, identity = str(stored["fingerprint"]), dict(stored.get("identity", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not one of ours
    folder = note.parent
    files = [folder / str(name) for name in shard_names(folder)]
    used = folder / USED
    return CacheFolder(
        folder,
        fingerprint,
        identity,
        rows_in(files),
        len(files),
        sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()),
        (used if used.exists() else note).stat().st_mtime,
    )


def remove(cache: CacheFolder) -> None:
    """Remove a cache: its folder goes out of sight at once, then its files."""
    hidden = partial_in(cache.folder.parent)
    os.rename(cache.folder, hidden)
    shutil.rmtree(hidden)
    with contextlib.suppress(OSError):  # what a killed removal left
        remove_stale(cache.folder.parent)
