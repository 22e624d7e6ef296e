"""A cache at an fsspec URL: completions are fetched from there and sent there; a copy on this machine is worked on.

What is there has the layout of a cache on a disk, so one may be copied to the other. Building in place is not offered:
an object store has neither links nor locks. It needs none for this: shards are written whole under names that nobody
else gives and are never changed or removed, each is compared with the SHA-256 in its name when it is fetched, and of
two shards with one completion every machine takes the first in the order of their names.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from prefopt.errors import CacheError, Problem
from prefopt.paths import cache_root
from prefopt.reference.cache import Adopted, ReferenceCache
from prefopt.reference.certificate import Certificate
from prefopt.reference.certificate_file import (
    adopt_certificate,
    certificate_elsewhere,
    certificate_file,
    certificate_name,
    read_certificate,
    says_more,
)
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.index import KeyIndex, Rows
from prefopt.reference.merging import LARGEST, Source, merge
from prefopt.reference.note import BROUGHT, NOTE, OPENED, note_of, refuse_other_reference
from prefopt.reference.publishing import COMPACTING, SUFFIX, locked
from prefopt.reference.shards import ShardName, damaged, digest_of, read_index, shard_names


class RemoteFolder:
    """The shards of one reference at an fsspec URL."""

    def __init__(self, url: str, identity: ReferenceIdentity, *, named_by_recipe: bool = False) -> None:
        """Look at a folder, which need not exist yet; say of problems whether the recipe names it.

        Raises:
            CacheError: it is another reference's, or cannot be reached.
        """
        self.url = url
        self.identity = identity
        self._where = "reference.cache" if named_by_recipe else url
        with self._said_plainly():
            self._system, self._path = fsspec.url_to_fs(url)
            self._system.invalidate_cache()
            note = f"{self._path}/{NOTE}"
            content = self._system.cat_file(note) if self._system.exists(note) else None
        if content is not None:
            refuse_other_reference(
                content, identity, where=self._where, place=url, fix=OPENED if named_by_recipe else BROUGHT
            )

    def names(self) -> list[ShardName]:
        """List the shards, the one that wins first."""
        with self._said_plainly():
            self._system.invalidate_cache()
            with suppress(FileNotFoundError):
                found = (ShardName.parse(str(file).rpartition("/")[2]) for file in self._system.ls(self._path, False))
                return sorted((name for name in found if name is not None), key=lambda name: name.rank)
        return []

    def index(self, name: ShardName) -> Rows:
        """Read what is looked up of a shard: about 40 bytes per completion."""
        with self._said_plainly(), self._system.open(f"{self._path}/{name}", "rb") as stream:
            file = Path(self.url) / str(name)
            return read_index(file, fingerprint=self.identity.fingerprint, stream=stream)[0]

    def fetch(self, name: ShardName, folder: Path) -> Path:
        """Copy a shard into a folder and compare it with its SHA-256."""
        file = folder / str(name)
        with self._said_plainly():
            self._system.get_file(f"{self._path}/{name}", str(file))
        if digest_of(file) != name.digest:
            raise CacheError(damaged(Path(self.url) / str(name), "its SHA-256 differs"))
        return file

    def certificate(self, cache: ReferenceCache) -> Certificate | None:
        """Read the certificate that is there of a cache's reference; None where there is none."""
        file = f"{self._path}/{certificate_name(self.identity)}"
        with self._said_plainly():
            content = self._system.cat_file(file) if self._system.exists(file) else None
        return None if content is None else certificate_elsewhere(content, cache, place=self.url)

    def send(self, file: Path) -> None:
        """Copy a shard or a certificate there: whole under another name, then moved; with the note before the first."""
        with self._said_plainly():
            self._system.makedirs(self._path, exist_ok=True)
            if not self._system.exists(f"{self._path}/{NOTE}"):
                self._system.pipe_file(f"{self._path}/{NOTE}", note_of(self.identity))
            beside = f"{self._path}/.{uuid.uuid4().hex}{SUFFIX}"
            self._system.put_file(str(file), beside)
            self._system.mv(beside, f"{self._path}/{file.name}")

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            raise CacheError(
                Problem(self._where, "a place that can be read and written", f"{self.url}: {error}",
                        "check the URL, your rights and the network; what is on this machine is kept")
            ) from error  # fmt: skip


def pull(cache: ReferenceCache, remote: RemoteFolder) -> Adopted:
    """Fetch the shards that hold a completion which the cache lacks, and a certificate of a larger sample."""
    total = Adopted(0, 0, 0.0)
    certificate = remote.certificate(cache)
    for name in remote.names():
        if cache.holds(remote.index(name).keys).all():
            continue
        with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".pull-", suffix=SUFFIX) as temporary:
            total += cache.adopt(remote.fetch(name, Path(temporary)))
    if certificate is not None:
        adopt_certificate(cache, certificate)
    return total


def push(cache: ReferenceCache, remote: RemoteFolder) -> int:
    """Send the completions that the remote folder lacks, and a certificate of a larger sample.

    Returns:
        Completions sent.
    """
    names = remote.names()
    held = KeyIndex([remote.index(name) for name in names])
    with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".push-", suffix=SUFFIX) as temporary:
        files, rows = shards_without(cache, held, Path(temporary), after=names[-1].order if names else 0)
        for file in files:
            remote.send(file)
    if says_more(read_certificate(cache), remote.certificate(cache)):
        remote.send(certificate_file(cache))
    return rows


def shards_without(cache: ReferenceCache, held: KeyIndex, folder: Path, *, after: int) -> tuple[list[Path], int]:
    """Write the completions of a cache that an index does not hold as shards of another folder.

    Args:
        cache: whose completions.
        held: what need not be written.
        folder: where to.
        after: the order of the last shard there.

    Returns:
        The shards, and their rows.
    """
    fingerprint = cache.identity.fingerprint
    with locked(cache.folder, COMPACTING):  # what is listed stays
        local = [cache.folder / str(name) for name in shard_names(cache.folder)]
        index = KeyIndex([read_index(file, fingerprint=fingerprint)[0] for file in local])
        absent = index.winners & (held.find(index.keys) < 0)
        sources = [Source(file, absent[index.span(number)]) for number, file in enumerate(local)]
        written = [
            merge(folder, chunk, order=after + number, level=0, fingerprint=fingerprint)
            for number, chunk in enumerate(_chunks([source for source in sources if source.kept.any()]), start=1)
        ]
    return [folder / str(name) for name in written if name is not None], int(absent.sum())


def _chunks(sources: list[Source]) -> Iterator[list[Source]]:
    """Join neighbouring shards up to the size of a large one."""
    chunk: list[Source] = []
    size = 0
    for source in sources:
        more = source.file.stat().st_size
        if chunk and size + more > LARGEST:
            yield chunk
            chunk, size = [], 0
        chunk.append(source)
        size += more
    if chunk:
        yield chunk


def open_remote(url: str, identity: ReferenceIdentity) -> ReferenceCache:
    """Open the cache that is at a URL, through a copy on this machine.

    What is there and not here is fetched, what is here and not there is sent, and so is every shard or certificate that
    this process commits. Where sending fails, the build goes on and the next opening sends it.

    Raises:
        CacheError: the URL is another reference's, or cannot be reached.
    """
    remote = RemoteFolder(url, identity, named_by_recipe=True)
    place = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_root() / "mirrors" / f"{place}-{identity.fingerprint[:16]}"

    def send(file: Path) -> None:
        try:
            remote.send(file)
        except CacheError as error:
            warnings.warn(f"{error}; {file.name} is kept in {folder} and sent next time", stacklevel=2)

    cache = ReferenceCache(folder, identity, after_commit=send)
    pull(cache, remote)
    push(cache, remote)
    return cache
