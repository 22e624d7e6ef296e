"""Kill writers of one reference cache, at random instants and at every step that touches the disk; count what is wrong.

    python benchmarks/kill_the_cache.py [--kills 100 --writers 3 --seconds 1 --seed 0 --folder FOLDER]

First a sweep: one writer commits and merges, and is killed before and after each of its fsync, link, unlink and rename
calls, one after the other. Then the kills: in each round three writers and a reader work on one folder, with merging
set to begin at 6 shards instead of 256; one writer is killed with SIGKILL, in half of the rounds at a random instant,
in the others at a random system call of those above. The writers overlap in what they write and differ in the values,
so that a mixed-up row, a row of two writers or a changed value shows.

After each kill another process checks:
    every shard against its SHA-256; every completion that a writer was told is committed; sums, counts and every token
    log-prob of all rows; that no value ever seen changed; in the end, that nothing unfinished is left behind.

Processes are forked from one that has imported everything, so a round costs little more than its seconds.
Exit status 0: nothing was wrong.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prefopt.reference import merging
from prefopt.reference.cache import ReferenceCache, ScoredRows
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.publishing import STALE

IDENTITY = ReferenceIdentity("0" * 64, "0" * 64, {}, "float32", "float32")
ROWS = 100_000
STAMPS = 64
CALLS = ("fsync", "link", "unlink", "rename", "replace")


def main() -> int:
    arguments = parse_arguments()
    merging.COMMITTED, merging.MERGED = 6, 3
    with tempfile.TemporaryDirectory() as temporary:
        warm_up(Path(temporary) / "warm")
        folder = Path(arguments.folder or temporary)
        wrong = sweep(folder / "sweep")
        wrong += rounds(folder / "rounds", arguments)
    print(f"{wrong} wrong" if wrong else "nothing was wrong")
    return int(wrong > 0)


def warm_up(folder: Path) -> None:
    """Import what writing, merging and checking import late, so that forked processes share it."""
    folder.mkdir()
    cache, told = ReferenceCache(folder / "cache", IDENTITY), Told(folder / "told")
    for row in range(2):
        cache.commit(scored([row], 0))
    cache.compact()
    told.add([0, 1])
    check_all(folder / "cache", told, folder / "seen.npy")
    gc.freeze()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="a new folder on the file system to try; a temporary one by default")
    return parser.parse_args()


def key(row: int) -> bytes:
    return hashlib.blake2b(row.to_bytes(8, "little"), digest_size=32).digest()


def token_logps(row: int, stamp: int) -> np.ndarray:
    """What a writer with a stamp says of a row: exact in 16 bits, so each row tells who wrote it."""
    base = np.random.Generator(np.random.PCG64(row)).integers(1, 8, 1 + row % 13)
    return -(base + stamp / STAMPS)


def scored(rows: list[int], stamp: int) -> ScoredRows:
    logps = [token_logps(row, stamp) for row in rows]
    sums = np.array([one.sum() for one in logps])
    return ScoredRows([key(row) for row in rows], sums, np.array([len(one) for one in logps]), logps)


def forked(work: Callable[..., None], *arguments: object) -> int:
    """Call a function in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def die_at(moment: int) -> list[int]:
    """Kill this process at a moment: before (even) or after (odd) one of its calls; returns the running count."""
    count = [0]

    def wrap(call: Callable) -> Callable:
        def counted(*arguments: object, **options: object) -> object:
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            result = call(*arguments, **options)
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return result

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


class Told:
    """Rows that writers were told are committed: appended to a file at once, so a kill loses none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, rows: list[int]) -> None:
        """Note rows whose commit has returned."""
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, np.array(rows, dtype=np.int64).tobytes())
        os.close(descriptor)

    def rows(self) -> np.ndarray:
        """Return every row noted."""
        return np.unique(np.fromfile(self.file, dtype=np.int64)) if self.file.exists() else np.empty(0, np.int64)


def write(folder: Path, told: Told, stamp: int, seed: int, until: float, moment: int) -> None:
    """Commit batches until the time is over or the moment has come: rows near a place that moves on; writers meet."""
    if moment >= 0:
        die_at(moment)
    generator = random.Random(seed)
    cache = ReferenceCache(folder, IDENTITY)
    while time.monotonic() < until:
        begin = (len(cache) + generator.randrange(-60, 60)) % ROWS
        rows = [row % ROWS for row in range(begin, begin + generator.randrange(1, 40))]
        cache.commit(scored(rows, stamp))
        told.add(rows)


def read(folder: Path, until: float) -> None:
    """Look again and again: what was there stays, with its value."""
    cache = ReferenceCache(folder, IDENTITY)
    keys = [key(row) for row in range(2_000)]
    found, sums, _ = cache.lookup(keys)
    while time.monotonic() < until:
        cache.refresh()
        found_now, sums_now, tokens = cache.lookup(keys)
        assert found_now[found].all(), "a row vanished"
        assert (sums_now[found] == sums[found]).all(), "a value changed"
        found, sums = found_now, sums_now
        some = np.flatnonzero(found)[::7]
        lengths = [len(one) for one in cache.token_logps([keys[place] for place in some])]
        assert lengths == tokens[some].tolist(), "token log-probs of another row"


def check(folder: Path, told: Told, seen: Path) -> None:
    """Compare everything with what it must be."""
    cache = ReferenceCache(folder, IDENTITY)
    assert cache.check_shards() == [], cache.check_shards()
    rows = np.arange(int(told.rows().max(initial=0)) + 50)
    keys = [key(int(row)) for row in rows]
    found, sums, tokens = cache.lookup(keys)
    assert found[told.rows()].all(), f"{(~found[told.rows()]).sum()} committed rows are lost"
    for row, logps in zip(rows[found], cache.token_logps([keys[place] for place in np.flatnonzero(found)])):
        plain = token_logps(int(row), 0)
        stamp = round(float(plain[0] - logps[0]) * STAMPS)
        assert 0 <= stamp < STAMPS, f"row {row}"
        assert (logps == token_logps(int(row), stamp)).all(), f"row {row}"
        assert sums[row] == np.float32(logps.astype(np.float64).sum()), f"row {row}"
        assert tokens[row] == len(logps), f"row {row}"
    if seen.exists():
        before = np.load(seen)
        known = np.flatnonzero(~np.isnan(before))
        assert (sums[known] == before[known]).all(), "a value changed"
    np.save(seen, sums)


def check_all(folder: Path, told: Told, seen: Path) -> None:
    """Check, let the next writer clear up, and check again."""
    check(folder, told, seen)
    check_nothing_is_left(folder)
    check(folder, told, seen)


def check_nothing_is_left(folder: Path) -> None:
    """Age what killed writers left by more than the time after which the next writer removes it, and write."""
    long_ago = time.time() - 2 * STALE
    for file in folder.glob(".*.partial"):
        os.utime(file, (long_ago, long_ago))
    ReferenceCache(folder, IDENTITY).commit(scored([ROWS - 1], 0))
    left = [file.name for file in folder.iterdir() if file.name.endswith(".partial")]
    assert not left, f"{left} are left"


def failed(child: int) -> bool:
    """Wait for a process; whether it ended in any way but well or by our kill."""
    status = os.waitpid(child, 0)[1]
    return not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) and status != 0


def write_to_the_end(folder: Path, told: Told, moment: int, done: Path) -> None:
    """Commit six batches, among which shards are merged, unless the moment comes first."""
    merging.COMMITTED = 3
    die_at(moment)
    cache = ReferenceCache(folder, IDENTITY)
    for begin in range(0, 60, 10):
        rows = list(range(begin, begin + 12))
        cache.commit(scored(rows, begin % 7))
        told.add(rows)
    done.touch()


def sweep(folder: Path) -> int:
    """Kill one writer at each of its calls in turn."""
    folder.mkdir(parents=True)
    wrong, moment, ended = 0, 0, False
    while not ended:
        cache, told = folder / str(moment), Told(folder / f"{moment}.told")
        done, seen = folder / f"{moment}.done", folder / f"{moment}.npy"
        wrong += failed(forked(write_to_the_end, cache, told, moment, done))
        ended = done.exists()
        wrong += failed(forked(check_all, cache, told, seen))
        moment += 1
    calls = (moment - 1) // 2
    print(f"sweep: one writer killed at {moment - 1} moments around {calls} calls, {wrong} wrong", flush=True)
    return wrong


def rounds(folder: Path, arguments: argparse.Namespace) -> int:
    """Kill one of several writers in each round."""
    folder.mkdir(parents=True)
    cache, told, seen = folder / "cache", Told(folder / "told"), folder / "seen.npy"
    generator = random.Random(arguments.seed)
    wrong = 0
    for number in range(arguments.kills):
        until = time.monotonic() + arguments.seconds
        at_random = number % 2 == 0
        moments = [-1] * arguments.writers
        if not at_random:
            moments[0] = generator.randrange(60)
        writers = [
            forked(write, cache, told, (3 * number + writer) % STAMPS, 1000 * number + writer, until, moment)
            for writer, moment in enumerate(moments)
        ]
        reader = forked(read, cache, until)
        if at_random:
            time.sleep(generator.uniform(0.02, 0.9 * arguments.seconds))
            os.kill(writers[0], signal.SIGKILL)
        wrong += sum(failed(child) for child in [*writers, reader])
        wrong += failed(forked(check, cache, told, seen))
    left = len(list(cache.glob(".*.partial")))
    wrong += failed(forked(check_all, cache, told, seen))
    print(
        f"rounds: {arguments.kills} kills among {arguments.writers} writers and a reader, {len(told.rows()):,} rows "
        f"committed, {left} unfinished files until the next writer after an hour; {wrong} wrong",
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
