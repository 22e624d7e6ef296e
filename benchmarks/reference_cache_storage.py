"""Time and memory of the reference cache's storage at a million completions.

    python benchmarks/reference_cache_storage.py [--rows 1000000 --tokens 60 --per-commit 5000 --folder FOLDER]

Prints: commits per second, shards and bytes, opening with a cold and a warm file cache, 100,000 look-ups of sums and
counts (half of them absent), token log-probs of 10,000 completions spread over all, merging all shards, and peak
resident memory of the process that opens. Two rows share a prompt, as in pairs. Log-probs are drawn: a third close to
zero, the rest from a gamma distribution.

The file cache is made cold with posix_fadvise(DONTNEED) on every shard, which evicts its pages on Linux but leaves
what the disk itself remembers. Each measurement of opening is a process of its own; the time is taken inside it, after
imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from prefopt.reference.cache import ReferenceCache, ScoredRows
from prefopt.reference.identity import ReferenceIdentity

IDENTITY = ReferenceIdentity("0" * 64, "0" * 64, {}, "float32", "float32")
LOOKED_UP, TOKEN_ROWS = 100_000, 10_000


def main() -> None:
    arguments = parse_arguments()
    if arguments.open:
        print(json.dumps(measure_opening(Path(arguments.folder), arguments.rows)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary) / "cache"
        seconds = build(folder, arguments)
        report(folder, arguments, seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=60, help="mean length of a completion")
    parser.add_argument("--per-commit", type=int, default=5_000)
    parser.add_argument("--folder", help="where to build; a temporary folder by default")
    parser.add_argument("--open", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def keys(begin: int, end: int) -> list[bytes]:
    """Two completions to a prompt; hashes drawn, as hashes are."""
    prompts = np.random.Generator(np.random.Philox(1)).bytes(16 * (end // 2 + 1))
    answers = np.random.Generator(np.random.Philox(2)).bytes(16 * end)
    return [prompts[16 * (n // 2) : 16 * (n // 2) + 16] + answers[16 * n : 16 * n + 16] for n in range(begin, end)]


def build(folder: Path, arguments: argparse.Namespace) -> float:
    every = keys(0, arguments.rows)
    generator = np.random.default_rng(0)
    cache = ReferenceCache(folder, IDENTITY)
    spent = 0.0
    for begin in range(0, arguments.rows, arguments.per_commit):
        some = every[begin : begin + arguments.per_commit]
        lengths = generator.integers(1, 2 * arguments.tokens, len(some))
        total = int(lengths.sum())
        certain = generator.random(total) < 1 / 3
        flat = -np.where(certain, generator.exponential(0.02, total), generator.gamma(1.2, 1.6, total))
        logps = np.split(flat.astype(np.float32), lengths.cumsum()[:-1])
        rows = ScoredRows(some, np.array([one.sum() for one in logps]), lengths, logps)
        began = time.perf_counter()
        cache.commit(rows)
        spent += time.perf_counter() - began
    return spent


def measure_opening(folder: Path, rows: int) -> dict[str, float]:
    """Open, look up, read token log-probs; seconds, and MiB of resident memory."""
    every = keys(0, rows)
    chosen = np.random.default_rng(1).choice(rows, LOOKED_UP // 2, replace=False)
    wanted = [every[place] for place in chosen] + [os.urandom(32) for _ in range(LOOKED_UP // 2)]
    few = [every[place] for place in np.linspace(0, rows - 1, TOKEN_ROWS).astype(int)]
    del every
    before = resident()
    began, spent = time.perf_counter(), time.process_time()
    cache = ReferenceCache(folder, IDENTITY)
    opened, spent = time.perf_counter(), time.process_time() - spent
    held, after = resident(), peak()
    found, _, _ = cache.lookup(wanted)
    looked_up = time.perf_counter()
    assert found[: LOOKED_UP // 2].all()
    assert not found[LOOKED_UP // 2 :].any()
    cache.token_logps(few)
    return {
        "open": opened - began,
        "open_cpu": spent,
        "lookup": looked_up - opened,
        "token_logps": time.perf_counter() - looked_up,
        "held": held - before,
        "peak": after - before,
        "peak_tokens": peak() - before,
    }


def resident() -> float:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(folder: Path, arguments: argparse.Namespace, seconds: float) -> None:
    cache = ReferenceCache(folder, IDENTITY)
    print(f"{len(cache):,} completions, {cache.summary()['tokens']:,} tokens")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"committed in {seconds:.1f} s, {arguments.per_commit:,} at a time, merging included")
    describe(cache)
    for state in ("cold", "warm"):
        show(state, opened_elsewhere(folder, arguments.rows, cold=state == "cold"))
    began = time.perf_counter()
    cache.compact()
    print(f"merged all in {time.perf_counter() - began:.1f} s")
    describe(cache)
    for state in ("cold", "warm"):
        show(state, opened_elsewhere(folder, arguments.rows, cold=state == "cold"))


def describe(cache: ReferenceCache) -> None:
    summary = cache.summary()
    size, tokens = int(summary["bytes"]), int(summary["tokens"])
    print(
        f"{summary['shards']} shards, {size / 2**20:,.0f} MiB, {(size - 40 * len(cache)) / tokens:.2f} bytes per token"
    )


def opened_elsewhere(folder: Path, rows: int, *, cold: bool) -> dict[str, float]:
    if cold:
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    command = [sys.executable, __file__, "--open", "--folder", str(folder), "--rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def show(state: str, figures: dict[str, float]) -> None:
    print(f"  {state} file cache: open {figures['open']:.2f} s ({figures['open_cpu']:.2f} s of CPU)")
    print(f"    {LOOKED_UP:,} look-ups {figures['lookup']:.2f} s")
    print(f"    token log-probs of {TOKEN_ROWS:,} completions {figures['token_logps']:.2f} s")
    print(
        f"    memory +{figures['held']:.0f} MiB when open, peak +{figures['peak']:.0f} MiB while opening, "
        f"+{figures['peak_tokens']:.0f} MiB in all"
    )


if __name__ == "__main__":
    main()
