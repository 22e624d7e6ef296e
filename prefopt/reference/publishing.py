"""Files that appear whole or not at all, one writer at a time, and nothing left behind by the killed.

A file is written beside its place, flushed to the disk, linked to its name, and the folder is flushed. The locks are
the kernel's (flock): a killed process loses them. No row depends on them: without them, two writers may each store
the same completion, and the order of the shards decides which one is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system: shards are ordered all the same
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0
"""Seconds after which a writer goes on without the lock of a process that was stopped with it."""
STALE = 3600.0
"""Seconds after which a file that nobody finished is removed; a living writer touches its own far more often."""
SUFFIX = ".partial"
WRITING, COMPACTING = ".writing.lock", ".compacting.lock"

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.EPERM)


def partial_in(folder: Path) -> Path:
    """Name a file, new in the world, for content that is not complete yet."""
    return folder / f".{uuid.uuid4().hex}{SUFFIX}"


def publish(target: Path, content: bytes | memoryview) -> None:
    """Put content in place whole; where the name exists, what stands there stays."""
    partial = partial_in(target.parent)
    try:
        with partial.open("xb") as stream:
            stream.write(content)
        publish_file(partial, target)
    finally:
        discard(partial)


def publish_file(partial: Path, target: Path) -> None:
    """Flush a written file and give it its name; where the name exists, what stands there stays."""
    _flush(partial)
    try:
        os.link(partial, target)
    except FileExistsError:
        pass
    except OSError as error:  # a file system without links: equal names have equal content
        if error.errno not in _NO_LINKS:
            raise
        if not target.exists():
            os.replace(partial, target)
    _flush(target.parent)


def discard(file: Path) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, name: str, *, patience: float = PATIENCE) -> Iterator[bool]:
    """Hold a lock of a folder; gives False where another process kept it. Where there are no locks, all hold them."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield True
        return
    try:
        yield _acquire(descriptor, patience)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, patience: float) -> bool:
    deadline, pause = time.monotonic() + patience, 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True
        else:
            return True
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left: unfinished files and folders that nobody touched for an hour."""
    limit = time.time() - STALE
    for entry in os.scandir(folder):
        if not entry.name.endswith(SUFFIX) or not entry.name.startswith("."):
            continue
        with contextlib.suppress(OSError):  # another writer was faster
            if entry.stat(follow_symlinks=False).st_mtime < limit:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
