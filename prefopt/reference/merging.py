"""Fewer and larger shards: which are merged, and rows of several written as one.

Shards are merged by level, as in a log-structured tree: 256 of level 0 become one of level 1, 16 of a higher level one
of the next, so a row is written again once per level. Neighbours only, so that the order of commits stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from prefopt.errors import CacheError, Problem
from prefopt.reference.publishing import discard, partial_in, publish_file
from prefopt.reference.shards import (
    ShardName,
    damage,
    damaged,
    digest_of,
    read_metadata,
    read_tables,
    write_shard,
)

COMMITTED = 256
"""Shards as they were committed that a folder holds before they are merged."""
MERGED = 16
"""Merged shards of one level before they are merged further."""
LARGEST = 256 * 2**20
"""Bytes of a merged shard; one of half that size is left as it is."""


@dataclass(frozen=True)
class Source:
    """A shard and the rows of it that are kept."""

    file: Path
    kept: np.ndarray
    """(rows,) bool."""


def due(names: Sequence[ShardName]) -> bool:
    """Whether a folder holds so many shards of a level that they are to be merged."""
    return any(len(run) for run in _levels_due(names))


def _levels_due(names: Sequence[ShardName]) -> list[list[ShardName]]:
    levels: dict[int, list[ShardName]] = {}
    for name in names:
        levels.setdefault(name.level, []).append(name)
    return [run for level, run in sorted(levels.items()) if len(run) > (COMMITTED if level == 0 else MERGED)]


def runs_to_merge(names: Sequence[ShardName], sizes: Mapping[ShardName, int], *, all_levels: bool) -> list[list[int]]:
    """Choose neighbouring shards that become one.

    Args:
        names: every shard, sorted by rank.
        sizes: bytes of each.
        all_levels: merge whatever is not large yet; otherwise only levels that hold too many.

    Returns:
        Runs of places in `names`, two or more each.
    """
    candidates = set(names) if all_levels else {name for run in _levels_due(names) for name in run}
    runs: list[list[int]] = [[]]
    room = LARGEST
    for place, name in enumerate(names):
        if name not in candidates or sizes[name] >= LARGEST // 2:
            runs.append([])
            room = LARGEST
            continue
        if sizes[name] > room:
            runs.append([])
            room = LARGEST
        runs[-1].append(place)
        room -= sizes[name]
    return [run for run in runs if len(run) > 1]


def merge(folder: Path, sources: Sequence[Source], *, order: int, level: int, fingerprint: str) -> ShardName | None:
    """Write the kept rows of several shards as one shard of a folder; the sources stay.

    Returns:
        Its name; None where no row is kept.

    Raises:
        CacheError: a source is damaged or of another reference; nothing was written.
        FileNotFoundError: a source was merged by another process.
    """
    wanted = sum(int(source.kept.sum()) for source in sources)
    if not wanted:
        return None
    for source in sources:
        _refuse_damage(source.file)
    metadata = _together([read_metadata(source.file) for source in sources])
    return write(folder, _kept_tables(sources, fingerprint), metadata, order=order, level=level, rows=wanted)


def write(
    folder: Path,
    tables: Iterator[pa.Table],
    metadata: Mapping[str, str],
    *,
    order: int,
    level: int,
    rows: int | None = None,
) -> ShardName:
    """Write tables as one shard of a folder, which appears when it is on the disk.

    Raises:
        CacheError: not so many rows came as were expected; nothing appears.
    """
    partial = partial_in(folder)
    try:
        written = write_shard(partial, tables, metadata)
        if rows is not None and written != rows:
            raise CacheError(
                Problem(f"reference cache {folder}", f"{rows} rows to merge", f"{written} rows",
                        "prefopt cache verify RECIPE names the damaged shard")
            )  # fmt: skip
        name = ShardName(order, level, digest_of(partial))
        publish_file(partial, folder / str(name))
    finally:
        discard(partial)
    return name


def _refuse_damage(file: Path) -> None:
    lines = damage(file) if ShardName.parse(file.name) else None
    if lines:
        raise CacheError(damaged(file, lines.partition(": ")[2]))


def _kept_tables(sources: Sequence[Source], fingerprint: str) -> Iterator[pa.Table]:
    for source in sources:
        begin = 0
        for table in read_tables(source.file, fingerprint=fingerprint):
            yield table.filter(pa.array(source.kept[begin : begin + len(table)]))
            begin += len(table)


def _together(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Join what shards say about themselves; different values stand side by side."""
    values: dict[str, dict[str, None]] = {}
    for one in metadata:
        for name, value in one.items():
            values.setdefault(name, {}).update(dict.fromkeys(value.split(SEPARATOR)))
    return {name: SEPARATOR.join(found) for name, found in sorted(values.items())}


SEPARATOR = " | "
"""Between the values that merged shards brought."""
