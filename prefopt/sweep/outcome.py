"""What came of a run's process, and why, in one line."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "failed", "killed", "interrupted", "stopped"]
INTERRUPTED = 130
MENDABLE = 2
LABELS = ("expected", "given", "to do")


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    state: State
    """finished; failed: an error, repeated only on request; killed and interrupted: continued by the next command;
    stopped: early, by the scheduler."""
    reason: str = ""
    exit: int | None = None
    seconds: float = 0.0
    """Of the last attempt."""
    spent: float = 0.0
    """Seconds of all attempts."""

    def as_dict(self) -> dict[str, Any]:
        """Return what is stored of it."""
        return asdict(self)


def outcome_of(code: int, finished: bool, log: str, seconds: float) -> Outcome:
    """Return what an exit code and a log amount to.

    Args:
        code: of the process; negative where a signal ended it.
        finished: whether the run's result says so.
        log: what this attempt wrote to both streams.
        seconds: the process took.
    """
    if finished:  # its result is written last
        return Outcome("finished", exit=code, seconds=seconds)
    if code == INTERRUPTED:
        return Outcome("interrupted", "stopped by Ctrl-C; it goes on from what it has saved", code, seconds)
    if code < 0:
        return Outcome("killed", killed_by(-code), code, seconds)
    if code == MENDABLE:
        return Outcome("failed", _problems(log) or _last_line(log), code, seconds)
    said = "ended without a result" if code == 0 else _last_line(log)
    return Outcome("failed", _plainer(said), code, seconds)


def killed_by(number: int) -> str:
    """Say which signal ended a process, and what that usually means."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    often = {"SIGKILL": ": often the system ran out of memory", "SIGTERM": ": somebody or a scheduler ended it"}
    return f"killed by {name}{often.get(name, '')}"


def _problems(log: str) -> str:
    """Return the last block of problems, each on one line: where: expected ..., given ...; what to do."""
    heads = list(re.finditer(r"^\d+ problems?$", log, re.MULTILINE))
    if not heads:
        return ""
    said: list[str] = []
    for line in log[heads[-1].end() :].splitlines():
        label = next((each for each in LABELS if line.strip().startswith(f"{each} ")), None)
        if label is not None and said:
            said[-1] += f"{': ' if said[-1][-1:] != ';' and label == 'expected' else '; '}{' '.join(line.split())}"
        elif line.startswith("  ") and line.strip():
            said.append(line.strip())
    return " | ".join(said)


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def _plainer(line: str) -> str:
    """Name what is meant where Python's word for it is long."""
    if "OutOfMemoryError" in line or "DefaultCPUAllocator: can't allocate" in line or line == "MemoryError":
        return f"out of memory: lower train.token_budget or processes ({line[:200]})"
    return line[:500]


def read_outcome(file: Path) -> Outcome | None:
    """Return a stored outcome; None where there is none that can be read."""
    try:
        return Outcome(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
