"""Folders that are built once and published whole: a reader sees a finished folder or none."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from prefopt.errors import DataError, Problem

ABANDONED_AFTER = 24 * 3600
"""Seconds after which an unfinished folder is taken for the remains of a killed process."""


def built_folder(root: Path, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return the folder of a key, building it if it is not there, and whether it was there.

    Two processes that build the same key at once both finish; the first one's folder is kept.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = root / key
    if folder.is_dir():
        return folder, True
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        unfinished = root / f".{key}-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished.mkdir()
    except OSError as error:
        raise DataError(
            Problem(
                str(root),
                "a cache folder that can be written",
                str(error),
                "set PREFOPT_CACHE to another one",
            )
        ) from error
    try:
        build(unfinished)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder, False


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # not merely another process that was faster
            raise


def _remove_abandoned(root: Path) -> None:
    for path in root.glob(".*-*-*"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # its own process finished it meanwhile
            continue
