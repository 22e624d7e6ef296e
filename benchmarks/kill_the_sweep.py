"""Whether a sweep survives: it and its runs are killed at random moments, and its results held against a calm one's.

    python benchmarks/kill_the_sweep.py --kills 10 --work /tmp/kill

Two sweeps of the same recipe: one undisturbed; in the other SIGKILL strikes the sweep's process or one of its runs, in
turn by chance, and the same command is given again. Held against each other: `eval`, the training loss and the weights
of every run; counted: how often each run's result was written, and reference tokens scored by runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SMALL = ["sweep.loss.beta=[0.1]", "sweep.train.learning_rate=[1e-4]"]


def command(recipe: str, overrides: list[str], processes: int, ray: str | None) -> list[str]:
    """The sweep as a person types it."""
    words = [sys.executable, "-m", "prefopt", "sweep", recipe, "-n", str(processes), "--threads", "1", *overrides]
    return words + (["--ray", ray] if ray else [])


def outcome(folder: Path) -> dict[str, dict]:
    """What each run came to: measures, training loss, a digest of its weights."""
    found = {}
    for file in sorted(folder.glob("runs/*/runs/*/result.json")):
        result = json.loads(file.read_text())
        weights = hashlib.sha256()
        for part in sorted((file.parent / "model").glob("*.safetensors")):
            weights.update(part.read_bytes())
        found[file.parent.name] = {
            "eval": result["eval"], "loss": result["train"]["loss"], "weights": weights.hexdigest(),
            "scored": result["reference"]["tokens_scored"],
        }  # fmt: skip
    return found


def children_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Processes of runs that are under way."""
    try:
        every = psutil.Process(process.pid).children(recursive=False)
        return [each for each in every if "prefopt.sweep.child" in " ".join(each.cmdline())]
    except psutil.NoSuchProcess:
        return []


def disturbed(words: list[str], folder: Path, kills: int, seed: int) -> tuple[list[str], dict[str, set[int]]]:
    """Run the sweep to its end through kills; returns what was done, and every time at which a result was written."""
    chance, done, written = random.Random(seed), [], dict[str, set[int]]()
    process, due = None, time.monotonic() + chance.uniform(4, 18)
    while True:
        if process is None:
            log = (folder / "out.txt").open("a")
            process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        time.sleep(0.2)
        for file in folder.glob("runs/*/runs/*/result.json"):
            written.setdefault(file.parent.name, set()).add(file.stat().st_mtime_ns)
        ended = process.poll()
        if ended is not None:
            if ended == 0 and len(done) >= kills:
                return done, written
            process = None if ended != 2 else sys.exit((folder / "out.txt").read_text()[-3000:])
        elif len(done) < kills and time.monotonic() > due:
            runs = children_of(process)
            if runs and chance.random() < 0.5:
                chance.choice(runs).kill()
                done.append("a run")
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                process = None
                done.append("the sweep")
            due = time.monotonic() + chance.uniform(2, 15)
            print(f"killed {done[-1]} ({len(done)} of {kills})", flush=True)


def main() -> None:
    """Run both sweeps and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="sweep-gpo")
    parser.add_argument("--overrides", nargs="*", default=SMALL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ray", help="do the second sweep on Ray, undisturbed: local, or an address")
    chosen = parser.parse_args()
    calm, rough = chosen.work / "calm", chosen.work / "rough"
    for folder in (calm, rough):
        folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    words = command(chosen.recipe, chosen.overrides, chosen.processes, None)
    with (calm / "out.txt").open("a") as log:
        subprocess.run(words, cwd=calm, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=True)
    spent = [time.monotonic() - began]
    kills = 0 if chosen.ray else chosen.kills
    done, written = disturbed(command(chosen.recipe, chosen.overrides, chosen.processes, chosen.ray), rough, kills,
                              chosen.seed)  # fmt: skip
    spent.append(time.monotonic() - began - spent[0])
    one, other = outcome(calm), outcome(rough)
    print(f"killed: {done.count('the sweep')} times the sweep, {done.count('a run')} times a run")
    print(f"seconds: {spent[0]:.0f} undisturbed, {spent[1]:.0f} {'on Ray' if chosen.ray else 'through the kills'}")
    print(f"runs finished: {len(one)} and {len(other)}")
    for what in ("eval", "loss", "weights"):
        same = [label for label in one if label in other and one[label][what] == other[label][what]]
        print(f"equal {what}: {len(same)} of {len(one)}")
    print(f"results written once: {sum(len(times) == 1 for times in written.values())} of {len(other)}")
    print(f"reference tokens scored by runs: {sum(each['scored'] for each in other.values())}")


if __name__ == "__main__":
    main()
