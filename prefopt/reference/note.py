"""`reference.json`: whose log-probs a folder, an archive or a repository holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefopt.errors import CacheError, Problem
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.publishing import publish

NOTE = "reference.json"
CERTIFICATES = "certificate-*.json"
"""Names of certificates, which lie beside the shards."""

OPENED = "use reference.cache=auto, which keeps one folder per reference, or another place"
BROUGHT = "give model and reference in the recipe as they were there, or choose another place"
"""What to do about another reference's cache: one that is worked in, and one that is copied from or to."""


def claim(folder: Path, identity: ReferenceIdentity, *, named_by_user: bool = False) -> None:
    """Write whose cache a folder is, making it where there is none, or compare with what stands there.

    Raises:
        CacheError: the folder holds another reference or somebody's own files, or cannot be written.
    """
    note = folder / NOTE
    where = "reference.cache" if named_by_user else str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            _refuse_other_content(folder, where)
            publish(note, note_of(identity))
        content = note.read_bytes()
    except OSError as error:
        raise CacheError(
            Problem(where, "a folder that can be written", f"{folder}: {error.strerror or error}",
                    "free space or choose another folder; nothing that stood there was touched")
        ) from error  # fmt: skip
    refuse_other_reference(content, identity, where=where, place=str(folder))


def note_of(identity: ReferenceIdentity) -> bytes:
    """Return the content of `reference.json`."""
    content = {"fingerprint": identity.fingerprint, "identity": asdict(identity)}
    return json.dumps(content, indent=2).encode()


def read_note(content: bytes, *, where: str, place: str) -> dict[str, Any]:
    """Read the content of `reference.json`.

    Raises:
        CacheError: it is not one.
    """
    try:
        stored = json.loads(content)
        return {"fingerprint": str(stored["fingerprint"]), "identity": dict(stored.get("identity", {}))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            Problem(where, "a reference cache", f"{NOTE} of {place} is not readable as one",
                    "choose another place, or remove this one to build it again")
        ) from error  # fmt: skip


def refuse_other_reference(
    content: bytes, identity: ReferenceIdentity, *, where: str, place: str, fix: str = OPENED
) -> None:
    """Raise CacheError, with both fingerprints, where a `reference.json` is not this reference's."""
    stored = read_note(content, where=where, place=place)
    there = stored["fingerprint"]
    if there == identity.fingerprint:
        return
    differing = "; ".join(identity.differences(stored["identity"]))
    raise CacheError(
        Problem(
            where,
            f"a cache of reference {identity.fingerprint[:12]}",
            f"{place} was written by reference {there[:12]} ({differing})",
            fix,
        )
    )


def _refuse_other_content(folder: Path, where: str) -> None:
    """Raise CacheError where a folder without a note holds files: they are somebody's own.

    A certificate is ours: it may stay where shards and note were removed.
    """
    entries = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    foreign = sorted(name for name in entries if not fnmatch(name, CERTIFICATES))
    if foreign and not (folder / NOTE).exists():
        raise CacheError(
            Problem(where, "an empty or new folder, or a reference cache",
                    f"{folder} holds {', '.join(foreign[:4])} and no {NOTE}",
                    "choose another folder; nothing was written there")
        )  # fmt: skip
