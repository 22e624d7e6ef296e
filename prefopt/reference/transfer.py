"""A cache as one file: a tar of a manifest with SHA-256, `reference.json`, shards and certificate, at any fsspec URL.

    manifest.json    {"format": 1, "fingerprint": ..., "files": {name: {"bytes": ..., "sha256": ...}}}
    reference.json
    shard-....parquet
    certificate-....json, where there is one

Equal caches give equal archives. An archive is read in full against its manifest before the first row is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import fsspec

from prefopt.errors import CacheError, Problem
from prefopt.reference.cache import Adopted, ReferenceCache
from prefopt.reference.certificate_file import (
    adopt_certificate,
    certificate_elsewhere,
    certificate_file,
    certificate_name,
    read_certificate,
)
from prefopt.reference.note import BROUGHT, NOTE, note_of, refuse_other_reference
from prefopt.reference.publishing import COMPACTING, SUFFIX, locked
from prefopt.reference.shards import ShardName, shard_names

MANIFEST = "manifest.json"
FORMAT = 1
_WITHOUT = "choose another file, or export the cache again where it was built"
_SMALL = 2**20
"""Bytes beyond which neither a manifest nor a note is read."""


def export_cache(cache: ReferenceCache, target: str) -> int:
    """Write a cache as one file, complete or not at all.

    Args:
        cache: what to write.
        target: a path or an fsspec URL.

    Returns:
        Bytes written.

    Raises:
        CacheError: a shard is damaged, or the place cannot be written.
    """
    with locked(cache.folder, COMPACTING):
        wrong = cache.check_shards()
        if wrong:
            raise CacheError(
                [Problem(f"reference cache {cache.folder}", "sound shards", line, "remove it and build again")
                 for line in wrong]
            )  # fmt: skip
        files = [cache.folder / str(name) for name in shard_names(cache.folder)]
        if read_certificate(cache) is not None:
            files.append(certificate_file(cache))
        manifest = _manifest(cache, files)
        return _written_whole(target, lambda stream: _pack(stream, manifest, note_of(cache.identity), files))


def _manifest(cache: ReferenceCache, files: list[Path]) -> bytes:
    entries = {NOTE: _entry(io.BytesIO(note_of(cache.identity)))}
    for file in files:
        with file.open("rb") as stream:
            entries[file.name] = _entry(stream)
    content = {"format": FORMAT, "fingerprint": cache.identity.fingerprint, "files": entries}
    return json.dumps(content, indent=1).encode()


def _entry(stream: IO[bytes]) -> dict[str, Any]:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return {"bytes": stream.seek(0, io.SEEK_END), "sha256": digest}


def _pack(stream: IO[bytes], manifest: bytes, note: bytes, files: list[Path]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name, content in ((MANIFEST, manifest), (NOTE, note)):
            archive.addfile(_member(name, len(content)), io.BytesIO(content))
        for file in files:
            with file.open("rb") as source:
                archive.addfile(_member(file.name, file.stat().st_size), source)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _written_whole(target: str, write: Callable[[IO[bytes]], None]) -> int:
    """Write beside the target and move into place; returns the bytes."""
    try:
        system, path = fsspec.url_to_fs(target)
        parent, _, name = path.rpartition("/")
        beside = f"{parent}/.{name}.{uuid.uuid4().hex}{SUFFIX}"
        try:
            with system.open(beside, "wb") as stream:
                write(stream)
                if "file" in _protocols(system):
                    stream.flush()
                    os.fsync(stream.fileno())
            system.mv(beside, path)
        finally:
            if system.exists(beside):
                system.rm(beside)
        return int(system.size(path))
    except (OSError, ValueError, ImportError) as error:
        raise CacheError(
            Problem(target, "a file that can be written, at a path or an fsspec URL", str(error),
                    "choose another place; nothing was written there")
        ) from error  # fmt: skip


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def import_cache(cache: ReferenceCache, source: str) -> Adopted:
    """Take from an archive the completions that a cache lacks.

    Args:
        cache: takes them; what it holds already keeps its value.
        source: a path or an fsspec URL of what `export_cache` wrote.

    Raises:
        CacheError: the file is not such an archive, is damaged, or is of another reference; nothing was taken.
    """
    with (
        cache.said_plainly(),
        tempfile.TemporaryDirectory(dir=cache.folder, prefix=".import-", suffix=SUFFIX) as temporary,
    ):
        files = _unpack(cache, source, Path(temporary))
        name = certificate_name(cache.identity)
        brought = [certificate_elsewhere(file.read_bytes(), cache, place=source) for file in files if file.name == name]
        taken = sum((cache.adopt(file) for file in files if file.name != name), Adopted(0, 0, 0.0))
        for certificate in brought:
            adopt_certificate(cache, certificate)
        return taken


def _unpack(cache: ReferenceCache, source: str, folder: Path) -> list[Path]:
    """Write the shards and the certificate of an archive into a folder; every byte is checked."""
    problems: list[Problem] = []
    files: list[Path] = []
    try:
        with fsspec.open(source, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            listed = _read_manifest(archive, cache, source)
            while (member := archive.next()) is not None:
                problem = _unpack_member(archive, member, listed, cache, source, folder)
                if problem is not None:
                    problems.append(problem)
                elif member.name != NOTE:
                    files.append(folder / member.name)
                listed.pop(member.name, None)
    except (OSError, tarfile.TarError, ImportError, EOFError) as error:
        raise CacheError(
            Problem(source, "an archive that prefopt cache export wrote", str(error) or "it ends early", _WITHOUT)
        ) from error
    if listed:
        problems.append(Problem(source, "every file of its manifest", f"without {', '.join(sorted(listed))}", _WITHOUT))
    if problems:
        raise CacheError(problems)
    return files


def _read_manifest(archive: tarfile.TarFile, cache: ReferenceCache, source: str) -> dict[str, dict[str, Any]]:
    first = archive.next()
    content = b"" if first is None or first.name != MANIFEST else _content(archive, first)
    try:
        manifest = json.loads(content)
        version, files = manifest["format"], dict(manifest["files"])
        listed = {str(name): {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])} for name, one in files.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            Problem(source, f"an archive that begins with {MANIFEST}", "another file", _WITHOUT)
        ) from error
    if version != FORMAT:
        raise CacheError(Problem(source, f"an archive of format {FORMAT}", f"format {version}", "update prefopt"))
    return listed


def _unpack_member(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    listed: dict[str, dict[str, Any]],
    cache: ReferenceCache,
    source: str,
    folder: Path,
) -> Problem | None:
    """Check one file of an archive and, if it is not the note, write it; returns what is wrong with it."""
    where = f"{member.name[:80]} of {source}"
    known = member.name in (NOTE, certificate_name(cache.identity)) or ShardName.parse(member.name) is not None
    if not (known and member.isfile() and member.name in listed):
        return Problem(where, "a file of the manifest: reference.json or a shard", "another one", _WITHOUT)
    if member.name == NOTE:
        content = _content(archive, member)
        digest, size = hashlib.sha256(content).hexdigest(), len(content)
        if {"bytes": size, "sha256": digest} == listed[NOTE]:
            refuse_other_reference(content, cache.identity, where=source, place=source, fix=BROUGHT)
            return None
    else:
        digest, size = _copy(archive, member, folder / member.name)
    expected = listed[member.name]
    if {"bytes": size, "sha256": digest} != expected:
        return Problem(
            where, f"SHA-256 {expected['sha256'][:12]} of {expected['bytes']:,} bytes",
            f"{digest[:12]} of {size:,} bytes", _WITHOUT,
        )  # fmt: skip
    return None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member) if member.isfile() else None
    return b"" if stream is None else stream.read(_SMALL)


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> tuple[str, int]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular file
    digest, size = hashlib.sha256(), 0
    with file.open("xb") as sink:
        while block := stream.read(2**20):
            digest.update(block)
            size += sink.write(block)
    return digest.hexdigest(), size
