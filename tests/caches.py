"""Small reference caches: rows by number, and what must be found of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefopt.reference.cache import HALF_STEP, ReferenceCache, ScoredRows, text_key
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.shards import shard_names


def identity(weights: str = "0") -> ReferenceIdentity:
    return ReferenceIdentity(weights * 64, "0" * 64, {}, "float32", "float32")


def rows(numbers, *, shift: float = 0.0) -> ScoredRows:
    """Completions by number; a number always gives the same key and, without shift, the same log-probs."""
    keys = [text_key(np.array([n]), np.array([n, 1])) for n in numbers]
    logps = [-np.random.default_rng(n).random(1 + n % 7) * 9 - shift for n in numbers]
    return ScoredRows(keys, np.array([one.sum() for one in logps]), np.array([len(one) for one in logps]), logps)


def assert_holds(cache: ReferenceCache, some: ScoredRows) -> None:
    found, sums, tokens = cache.lookup(some.keys)
    assert found.all()
    np.testing.assert_array_equal(sums, some.sums.astype(np.float32))
    np.testing.assert_array_equal(tokens, some.tokens)
    for stored, exact in zip(cache.token_logps(some.keys), some.token_logps):
        np.testing.assert_allclose(stored, exact, rtol=HALF_STEP)


def files(cache: ReferenceCache) -> list[Path]:
    return [cache.folder / str(name) for name in shard_names(cache.folder)]


def reopened(cache: ReferenceCache) -> ReferenceCache:
    return ReferenceCache(cache.folder, cache.identity)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)
