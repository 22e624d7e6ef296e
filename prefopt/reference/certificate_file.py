"""A certificate as a file beside the shards, `certificate-<fingerprint>.json`, which travels with them.

One per reference; a larger sample replaces a smaller one. The content names its own SHA-256, so that it is known for
what was written wherever it comes from: a disk, an archive, a URL, the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from prefopt.errors import CacheError, Problem
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certificate import Certificate
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.note import CERTIFICATES
from prefopt.reference.publishing import WRITING, discard, locked, partial_in


def certificate_name(identity: ReferenceIdentity) -> str:
    """Name the certificate of a reference wherever its shards are."""
    return CERTIFICATES.replace("*", identity.fingerprint[:16])


def certificate_file(cache: ReferenceCache) -> Path:
    """Return where the certificate of a cache lies."""
    return cache.folder / certificate_name(cache.identity)


def certificate_bytes(certificate: Certificate) -> bytes:
    """Return the content of the file: the same for the same certificate."""
    stated = certificate.as_dict()
    return json.dumps({**stated, "sha256": _digest(stated)}).encode()


def certificate_from(content: bytes, identity: ReferenceIdentity) -> Certificate:
    """Read a certificate; raises ValueError where it is not as written or of another reference."""
    try:
        stored = json.loads(content)
        digest = stored.pop("sha256")
        found = Certificate.from_dict(stored)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError("it is not readable as a certificate") from error
    if digest != _digest(stored):
        raise ValueError("its SHA-256 differs")
    if found.fingerprint != identity.fingerprint:
        raise ValueError(f"it is of reference {found.fingerprint[:12]}")
    return found


def _digest(stated: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def read_certificate(cache: ReferenceCache) -> Certificate | None:
    """Read the certificate of a cache; None where there is none of this very reference that can be read."""
    try:
        return certificate_from(certificate_file(cache).read_bytes(), cache.identity)
    except (OSError, ValueError):  # a torn or foreign file certifies nothing
        return None


def store_certificate(cache: ReferenceCache, certificate: Certificate) -> Certificate:
    """Put a certificate in place, whole or not at all; returns the one that stands, which may be a larger one."""
    with locked(cache.folder, WRITING):
        standing = read_certificate(cache)
        if standing is not None and standing.comparisons > certificate.comparisons:
            return standing
        partial = partial_in(cache.folder)
        try:
            with partial.open("xb") as stream:
                stream.write(certificate_bytes(certificate))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, certificate_file(cache))
        finally:
            discard(partial)
    cache.committed(certificate_file(cache))
    return certificate


def certificate_elsewhere(content: bytes, cache: ReferenceCache, *, place: str) -> Certificate:
    """Read a certificate that came with shards of a cache's reference.

    Raises:
        CacheError: it is damaged or of another reference.
    """
    try:
        return certificate_from(content, cache.identity)
    except ValueError as error:
        name = certificate_name(cache.identity)
        raise CacheError(
            Problem(f"{name} of {place}", "a certificate as it was written, of this reference", str(error),
                    "remove it there: it is made anew where the reference is at hand")
        ) from error  # fmt: skip


def adopt_certificate(cache: ReferenceCache, certificate: Certificate) -> None:
    """Take a certificate from elsewhere where a cache has none or one of a smaller sample."""
    if says_more(certificate, read_certificate(cache)):
        store_certificate(cache, certificate)


def says_more(certificate: Certificate | None, than: Certificate | None) -> bool:
    """Whether a certificate has the larger sample of two, either of which there may not be."""
    return certificate is not None and (than is None or certificate.comparisons > than.comparisons)
