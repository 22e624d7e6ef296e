"""The reference cache: log-probs by content, in a folder of Parquet shards.

    folder/
      reference.json        whose log-probs these are
      shard-<hash>.parquet  prompt, completion (128-bit hashes of their token ids), logp_sum, tokens, token_logps

A shard appears complete or not at all: it is written beside, flushed to the disk and linked into place. Two writers
of the same rows produce the same name, and the first one wins. Any number of processes may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from prefopt.errors import CacheError, Problem
from prefopt.reference.identity import ReferenceIdentity

_HASH_BYTES = 16
KEY_BYTES = 2 * _HASH_BYTES

SCHEMA = pa.schema(
    [
        ("prompt", pa.binary(_HASH_BYTES)),
        ("completion", pa.binary(_HASH_BYTES)),
        ("logp_sum", pa.float32()),
        ("tokens", pa.int32()),
        ("token_logps", pa.list_(pa.float16())),
    ]
)

HALF_STEP = 2.0**-11
"""Relative error of a stored per-token log-prob (16-bit float); sums are stored in 32 bit."""


def text_key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """Key of one scored text: hashes of the token ids of prompt and completion, 16 bytes each."""
    return _ids_hash(prompt) + _ids_hash(completion)


def _ids_hash(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype("<i8", copy=False).tobytes(), digest_size=_HASH_BYTES).digest()


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


class ReferenceCache:
    """One reference's log-probs in one folder."""

    def __init__(self, folder: Path, identity: ReferenceIdentity, *, named_by_user: bool = False) -> None:
        """Open a cache, making the folder where there is none.

        Raises:
            CacheError: the folder holds another reference, something else, or a damaged shard.
        """
        self.folder = folder
        self.identity = identity
        self._claim(named_by_user)
        self._shards: set[str] = set()
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")
        self._sums = np.empty(0, dtype=np.float32)
        self._tokens = np.empty(0, dtype=np.int32)
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def _claim(self, named_by_user: bool) -> None:
        """Write whose cache this is, or compare with what stands there."""
        note = self.folder / "reference.json"
        where = "reference.cache" if named_by_user else str(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                self._refuse_other_content(where)
                content = {"fingerprint": self.identity.fingerprint, "identity": asdict(self.identity)}
                _publish(self.folder, note, json.dumps(content, indent=2).encode())
            stored = json.loads(note.read_text(encoding="utf-8"))
            there = str(stored["fingerprint"])
        except OSError as error:
            raise CacheError(
                Problem(where, "a folder that can be written", f"{self.folder}: {error.strerror or error}",
                        "free space or choose another folder; nothing that stood there was touched")
            ) from error  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                Problem(where, "a reference cache", f"{note} is not readable as one",
                        "choose another folder, or remove this one to build it again")
            ) from error  # fmt: skip
        if there != self.identity.fingerprint:
            differing = "; ".join(self.identity.differences(stored.get("identity", {})))
            raise CacheError(
                Problem(
                    where,
                    f"a cache of reference {self.identity.fingerprint[:12]}",
                    f"{self.folder} was written by reference {there[:12]} ({differing})",
                    "use reference.cache=auto, which keeps one folder per reference, or another folder",
                )
            )

    def _refuse_other_content(self, where: str) -> None:
        """Raise CacheError where a folder without a note holds files: they are somebody's own."""
        foreign = sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        if foreign and not (self.folder / "reference.json").exists():
            raise CacheError(
                Problem(where, "an empty or new folder, or a reference cache",
                        f"{self.folder} holds {', '.join(foreign[:4])} and no reference.json",
                        "choose another folder; nothing was written there")
            )  # fmt: skip

    def refresh(self) -> None:
        """Read the index of shards that appeared since the last look."""
        fresh = sorted(set(self._shard_names()) - self._shards)
        if not fresh:
            return
        tables = [_read_shard(self.folder / name, ["prompt", "completion", "logp_sum", "tokens"]) for name in fresh]
        keys = np.concatenate([self._keys, *map(_table_keys, tables)])
        sums = np.concatenate([self._sums, *(table["logp_sum"].to_numpy() for table in tables)])
        tokens = np.concatenate([self._tokens, *(table["tokens"].to_numpy() for table in tables)])
        self._keys, first = np.unique(keys, return_index=True)
        self._sums, self._tokens = sums[first], tokens[first]
        self._shards.update(fresh)

    def _shard_names(self) -> list[str]:
        return [
            entry.name for entry in os.scandir(self.folder) if re.fullmatch(r"shard-[0-9a-f]+\.parquet", entry.name)
        ]

    def lookup(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up completions.

        Returns:
            found (n,) bool, sums (n,) fp32 in nats (NaN where not found), tokens (n,) int32.
        """
        wanted = np.asarray(keys, dtype=self._keys.dtype)
        if not len(self._keys) or not len(wanted):
            return (
                np.zeros(len(wanted), bool),
                np.full(len(wanted), np.nan, np.float32),
                np.zeros(len(wanted), np.int32),
            )
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found = self._keys[place] == wanted
        return (
            found,
            np.where(found, self._sums[place], np.float32("nan")),
            np.where(found, self._tokens[place], 0),
        )

    def token_logps(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """Per-token log-probs of completions that the cache holds, each (tokens,) fp16, nats; read shard by shard."""
        wanted = {key: np.empty(0, np.float16) for key in keys}
        for name in sorted(self._shards):
            table = _read_shard(self.folder / name, ["prompt", "completion", "token_logps"])
            values = table["token_logps"].combine_chunks()
            flat, ends = values.flatten().to_numpy(), values.value_lengths().to_numpy().cumsum()
            for key, tokens in zip(_table_keys(table).tolist(), np.split(flat, ends[:-1])):
                if _padded(key) in wanted:
                    wanted[_padded(key)] = tokens
        return [wanted[key] for key in keys]

    def commit(self, rows: ScoredRows) -> Path:
        """Write rows as one shard; when this returns they are on the disk.

        Raises:
            CacheError: the disk is full or refuses; no partial shard is left behind.
        """
        table = pa.table(
            {
                "prompt": [key[:_HASH_BYTES] for key in rows.keys],
                "completion": [key[_HASH_BYTES:] for key in rows.keys],
                "logp_sum": rows.sums.astype(np.float32),
                "tokens": rows.tokens.astype(np.int32),
                "token_logps": [values.astype(np.float16) for values in rows.token_logps],
            },
            schema=SCHEMA.with_metadata(self._shard_metadata()),
        )
        name = hashlib.blake2b(b"".join(rows.keys), digest_size=12).hexdigest()
        target = self.folder / f"shard-{name}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        try:
            _publish(self.folder, target, sink.getvalue())
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise CacheError(
                Problem(
                    f"reference cache {self.folder}",
                    "room for one more shard" if full else "a folder that can be written",
                    error.strerror or str(error),
                    "free space, or set reference.cache to another folder; every earlier shard is kept, "
                    "and the same command goes on from there",
                )
            ) from error
        self.refresh()
        return target

    def _shard_metadata(self) -> dict[str, str]:
        return {
            "fingerprint": self.identity.fingerprint,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }

    def check_shards(self) -> list[str]:
        """Read every byte of every shard against its checksums; returns one line per damaged or foreign shard."""
        wrong = []
        for name in sorted(self._shard_names()):
            try:
                table = _read_shard(self.folder / name, None)
            except CacheError as error:
                wrong.append(error.problems[0].given)
                continue
            metadata = table.schema.metadata or {}
            if metadata.get(b"fingerprint", b"").decode() != self.identity.fingerprint:
                wrong.append(f"{name} was written by another reference")
        return wrong

    def summary(self) -> dict[str, int | str]:
        """Count rows, tokens, shards and bytes."""
        names = self._shard_names()
        return {
            "folder": str(self.folder),
            "fingerprint": self.identity.fingerprint,
            "completions": len(self),
            "tokens": int(self._tokens.sum()),
            "shards": len(names),
            "bytes": sum((self.folder / name).stat().st_size for name in names),
        }


def _table_keys(table: pa.Table) -> np.ndarray:
    prompt, completion = (
        np.frombuffer(b"".join(table[name].to_pylist()), dtype=np.uint8).reshape(-1, _HASH_BYTES)
        for name in ("prompt", "completion")
    )
    return np.ascontiguousarray(np.hstack((prompt, completion))).view(f"S{KEY_BYTES}").ravel()


def _padded(key: bytes) -> bytes:
    """Give a key its trailing zero bytes back, which numpy's byte strings drop."""
    return key.ljust(KEY_BYTES, b"\0")


def _read_shard(file: Path, columns: list[str] | None) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns, page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            Problem(
                f"reference cache {file.parent}",
                "shards that read back as they were written",
                f"{file.name} is damaged: {str(error).splitlines()[0][:200]}",
                f"remove {file} and run again: only its completions are scored anew",
            )
        ) from error


def _publish(folder: Path, target: Path, content: bytes | pa.Buffer) -> None:
    """Put a file in place whole: write beside, flush, link (the first of several writers wins), flush the folder."""
    temporary = folder / f".{uuid.uuid4().hex}.partial"
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            pass
        except OSError as error:  # a file system without links: the last writer of equal content wins instead
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
