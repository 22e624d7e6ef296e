"""A shard: scored completions in one Parquet file that bears its order, its level and its own SHA-256 in its name.

    shard-00000042-0-3f786850e387550fdab836ed7e6dc881.parquet
          order    level   first 128 bits of the SHA-256 of all its bytes

    prompt, completion   16-byte hashes of the token ids
    logp_sum             nats, 32 bit
    tokens               scored tokens
    token_logps          nats, 16 bit

Every page has a CRC-32, which is checked whenever the page is read; the SHA-256 covers every byte of the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.errors import CacheError, Problem
from prefopt.reference.index import WORDS, Rows

HASH_BYTES = 16
KEY_BYTES = 2 * HASH_BYTES

SCHEMA = pa.schema(
    [
        ("prompt", pa.binary(HASH_BYTES)),
        ("completion", pa.binary(HASH_BYTES)),
        ("logp_sum", pa.float32()),
        ("tokens", pa.int32()),
        ("token_logps", pa.list_(pa.float16())),
    ]
)
INDEX_COLUMNS = ["prompt", "completion", "logp_sum", "tokens"]
GROUP_TOKENS = 2**20
"""Tokens in a row group: 2 MiB of log-probs, what a reader of single rows holds at a time."""

_NAME = re.compile(r"shard-(\d{8,})-(\d+)-([0-9a-f]{32})\.parquet")
_DIGITS = 32


@dataclass(frozen=True)
class ShardName:
    """Name of a shard; sorted by `rank`, the first of several shards with one completion gives its value."""

    order: int
    """Number in the order of commits; a merged shard has its first source's."""
    level: int
    """How many times its rows were merged."""
    digest: str

    @property
    def rank(self) -> tuple[int, int, str]:
        """Sort key: commits in their order, a merged shard before what it was merged from."""
        return (self.order, -self.level, self.digest)

    def __str__(self) -> str:
        return f"shard-{self.order:08d}-{self.level}-{self.digest}.parquet"

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """Read a file's name; None where it is not a shard's."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match[1]), int(match[2]), match[3])


@dataclass(frozen=True)
class ScoredRows:
    """Log-probs on their way into a shard."""

    keys: list[bytes]
    sums: np.ndarray
    """(rows,) fp32, nats."""
    tokens: np.ndarray
    """(rows,) scored tokens."""
    token_logps: list[np.ndarray]
    """Per row (tokens,) nats."""

    def take(self, places: Sequence[int]) -> ScoredRows:
        """Return the rows at some places."""
        return ScoredRows(
            [self.keys[place] for place in places],
            np.asarray(self.sums)[places],
            np.asarray(self.tokens)[places],
            [self.token_logps[place] for place in places],
        )


def shard_names(folder: Path) -> list[ShardName]:
    """List the shards of a folder, the one that wins first."""
    names = (ShardName.parse(entry.name) for entry in os.scandir(folder))
    return sorted((name for name in names if name is not None), key=lambda name: name.rank)


def to_table(rows: ScoredRows) -> pa.Table:
    """Lay rows out as a table."""
    return pa.table(
        {
            "prompt": [key[:HASH_BYTES] for key in rows.keys],
            "completion": [key[HASH_BYTES:] for key in rows.keys],
            "logp_sum": np.asarray(rows.sums, dtype=np.float32),
            "tokens": np.asarray(rows.tokens, dtype=np.int32),
            "token_logps": [np.asarray(values, dtype=np.float16) for values in rows.token_logps],
        },
        schema=SCHEMA,
    )


def write_shard(file: Path, tables: Iterator[pa.Table], metadata: Mapping[str, str]) -> int:
    """Write tables, one at a time, in row groups of about GROUP_TOKENS tokens; returns the rows written."""
    written, waiting, tokens = 0, list[pa.Table](), 0
    schema = SCHEMA.with_metadata(dict(metadata))
    with pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=False, write_page_checksum=True,
        column_encoding={"logp_sum": "BYTE_STREAM_SPLIT", "token_logps.list.element": "BYTE_STREAM_SPLIT"},
    ) as writer:  # fmt: skip
        for part in (piece for table in tables for piece in _pieces(table)):
            waiting.append(part)
            tokens += _tokens(part)
            if tokens >= GROUP_TOKENS:
                written += _write_group(writer, waiting, schema)
                waiting, tokens = [], 0
        if waiting:
            written += _write_group(writer, waiting, schema)
    return written


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Cut a table where its tokens fill a row group."""
    ends = np.cumsum(table["tokens"].to_numpy(), dtype=np.int64)
    begin = 0
    while begin < len(ends):
        spent = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, spent + GROUP_TOKENS, side="right")), begin + 1)
        yield table.slice(begin, end - begin)
        begin = end


def _tokens(table: pa.Table) -> int:
    return int(table["tokens"].to_numpy().sum(dtype=np.int64))


def _write_group(writer: pq.ParquetWriter, parts: list[pa.Table], schema: pa.Schema) -> int:
    table = pa.concat_tables([part.replace_schema_metadata(schema.metadata) for part in parts]).combine_chunks()
    writer.write_table(table, row_group_size=len(table))
    return len(table)


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes, as far as it stands in a shard's name."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGITS]


def read_index(file: Path, *, fingerprint: str, stream: IO[bytes] | None = None) -> tuple[Rows, dict[str, str]]:
    """Read what is looked up of a shard, and its metadata; token log-probs are not read.

    Args:
        file: where it is; names it in problems.
        fingerprint: of the reference it must be of.
        stream: its bytes, where it is no local file.

    Raises:
        FileNotFoundError: it was merged into another and removed.
        CacheError: it is damaged, or another reference's.
    """
    with _opened(file, stream) as parquet:
        table = parquet.read(columns=INDEX_COLUMNS, use_threads=False)
        metadata = _metadata(parquet.schema_arrow)
        if parquet.schema_arrow.remove_metadata() != SCHEMA:
            raise pa.ArrowInvalid(f"columns are not {', '.join(SCHEMA.names)}")
    if metadata.get("fingerprint") != fingerprint:
        raise CacheError(foreign(file, metadata.get("fingerprint", "unknown")))
    return rows_of(table), metadata


def foreign(file: Path, fingerprint: str) -> Problem:
    """Say that a shard belongs to another reference."""
    return Problem(
        f"reference cache {file.parent}",
        "shards of one reference",
        f"{file.name} was written by another reference ({fingerprint[:12]})",
        f"remove {file}",
    )


def rows_of(table: pa.Table) -> Rows:
    """Take the index columns of a table as arrays."""
    halves = [_hash_words(table[name]) for name in ("prompt", "completion")]
    return Rows(
        np.hstack(halves).reshape(len(table), WORDS),
        table["logp_sum"].to_numpy(),
        table["tokens"].to_numpy(),
    )


def _hash_words(column: pa.ChunkedArray) -> np.ndarray:
    """View 16-byte hashes as (rows, 2) uint64 without a copy of each."""
    words = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint64).reshape(-1, 2)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(words) if words else np.empty((0, 2), np.uint64)


def read_tables(file: Path, *, fingerprint: str) -> Iterator[pa.Table]:
    """Read whole rows, one row group at a time.

    Raises:
        FileNotFoundError, CacheError: as `read_index`.
    """
    with _opened(file) as parquet:
        found = _metadata(parquet.schema_arrow).get("fingerprint", "unknown")
        if found != fingerprint:
            raise CacheError(foreign(file, found))
        for number in range(parquet.num_row_groups):
            yield parquet.read_row_group(number, use_threads=False)


def read_token_logps(file: Path, rows: np.ndarray) -> list[np.ndarray]:
    """Read token log-probs of some rows, each (tokens,) fp16; only row groups that hold one are read."""
    order = np.argsort(rows, kind="stable")
    values: list[np.ndarray] = [np.empty(0, np.float16)] * len(rows)
    with _opened(file) as parquet:
        begin = 0
        for number in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(number).num_rows
            inside = order[np.searchsorted(rows[order], begin) : np.searchsorted(rows[order], end)]
            if len(inside):
                column = parquet.read_row_group(number, columns=["token_logps"], use_threads=False)["token_logps"]
                lists = column.combine_chunks()
                flat, ends = lists.flatten().to_numpy(), lists.value_lengths().to_numpy().cumsum()
                for place in inside:
                    row = int(rows[place]) - begin
                    values[place] = flat[ends[row - 1] if row else 0 : ends[row]].copy()
            begin = end
    return values


def read_metadata(file: Path) -> dict[str, str]:
    """Read what a shard says about itself.

    Raises:
        FileNotFoundError, CacheError: as `read_index`.
    """
    with _opened(file) as parquet:
        return _metadata(parquet.schema_arrow)


def rows_in(files: Sequence[Path]) -> int | None:
    """Count the rows of shards by their footers; None where one does not read back."""
    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (OSError, pa.ArrowException):
        return None


def _metadata(schema: pa.Schema) -> dict[str, str]:
    try:
        return {name.decode(): value.decode() for name, value in (schema.metadata or {}).items()}
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("metadata are not text") from error


class _opened:
    """A shard open for reading; whatever Parquet finds wrong becomes a CacheError that names it."""

    def __init__(self, file: Path, stream: IO[bytes] | None = None) -> None:
        self._file = file
        self._stream = stream
        self._parquet: pq.ParquetFile | None = None

    def __enter__(self) -> pq.ParquetFile:
        try:
            self._parquet = pq.ParquetFile(self._stream or self._file, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise CacheError(damaged(self._file, error)) from error
        return self._parquet

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if isinstance(error, OSError | pa.ArrowException) and not isinstance(error, FileNotFoundError):
            raise CacheError(damaged(self._file, error)) from error


def damaged(file: Path, error: BaseException | str) -> Problem:
    """Say that a shard does not read back as it was written."""
    reason = (str(error).splitlines() or ["unreadable"])[0][:200]
    return Problem(
        f"reference cache {file.parent}",
        "shards that read back as they were written",
        f"{file.name} is damaged: {reason}",
        f"remove {file} and run again: only its completions are scored anew",
    )


def damage(file: Path) -> str | None:
    """Compare a shard with its SHA-256; returns the parts that differ as far as page checksums tell, or None."""
    name = ShardName.parse(file.name)
    if name is not None and digest_of(file) == name.digest:
        return None
    parts = []
    try:
        with _opened(file) as parquet:
            for group in range(parquet.num_row_groups):
                for column in SCHEMA.names:
                    try:
                        parquet.read_row_group(group, columns=[column], use_threads=False)
                    except (OSError, pa.ArrowException):
                        parts.append(f"{column} of row group {group}")
    except CacheError:
        parts = ["the footer"]
    return f"{file.name} is damaged: {', '.join(parts) or 'the footer or a page header'} (SHA-256 differs)"
