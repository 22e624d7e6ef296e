"""One timed run of one trainer in this process: a job in JSON comes in, figures in JSON go out.

    python benchmarks/speed_run.py '{"tool": "prefopt", ...}' OUT.json

A step lasts from one log to the next: planning, data, forward, backward, clipping, optimizer, metrics and logging are
all in it, in both trainers, which both log every step. The steps before `warmup` do not count. The rate of matrix
products is measured between the last uncounted step and the first that counts, and after the last one.

Peak memory is the process's own high-water mark (VmHWM; `ru_maxrss` would begin with that of the process which
started it) at the end of the last step; the floor is what is resident when everything is imported and no model is
loaded. The time to the first step runs from the same moment to the end of step 1: tokenizing, scoring the reference
where it is scored first, loading.

On an accelerator a step ends when the device is done with it, and memory is what torch took of the device: peak and
floor are the device's, not the process's, and prefopt's peak follows from the token budget with which it fills it.

prefopt's command line starts over on a heap whose blocks merge and seldom collects garbage (`prefopt.process`), so its
process does here; TRL has no such thing, and its process starts as Python does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

if __name__ == "__main__":  # before torch takes memory, or looks for an accelerator
    asked = json.loads(sys.argv[1])
    if asked["device"] == "cuda":
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # TRL would spread over all
        os.environ.update(ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES=first)
    else:
        os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    if "prefopt" in str(asked["tool"]):
        from prefopt.process import collect_rarely, start_over_on_a_whole_heap

        start_over_on_a_whole_heap()
        collect_rarely()
else:  # imported by this program's neighbours, or by one for CPUs
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
from cost_model import matmul_rates, settle

Job = dict[str, Any]


class Clock:
    """Notes the end of every step of a trainer, and what it trained on."""

    def __init__(self, job: Job, hand_over: Callable[[], None] = lambda: None) -> None:
        self.warmup, self.total, self.hand_over = job["warmup"], job["steps"], hand_over
        self.dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
        self.device: str = job.get("device", "cpu")
        self.times: list[float] = []
        self.losses: list[float] = []
        self.resident: list[int] = []
        self.rates: list[tuple[float, float]] = []
        """What products keep up, and the fastest of them."""
        self.scored: list[list[int]] = [[0, 0]]
        """Per step: completion tokens, and the sum of all token ids of all rows; two trainers must agree."""
        self.chosen: dict[str, Any] = {}
        """What prefopt decided by itself."""
        self.floor = self.peak = 0
        self.reference_s = 0.0

    def begin(self) -> None:
        """Everything is imported, nothing is loaded."""
        self.floor, self.since = resident(self.device), time.perf_counter()

    def note(self, tokens: int, checksum: int) -> None:
        """Count a micro-batch of the step that is under way."""
        self.scored[-1][0] += tokens
        self.scored[-1][1] += checksum

    def tick(self, loss: float) -> None:
        """A step has been logged."""
        settle(self.device)
        self.times.append(time.perf_counter() - self.since)
        self.losses.append(loss)
        self.resident.append(resident(self.device))
        self.scored.append([0, 0])
        if len(self.times) in (self.warmup, self.total):
            self.peak = max(self.peak, peak(self.device))
            self.rates.append(matmul_rates(self.dtype, device=self.device))
            forget_products(self.device)
        self.hand_over()
        self.since = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Everything that was noted."""
        steps = self.times[self.warmup :]
        kept, fastest = map(list, zip(*self.rates, strict=True))
        return {
            "steps_s": steps, "first_step_s": self.times[0],
            "losses": self.losses, "scored": self.scored[self.warmup : self.total], "matmul_rate": kept,
            "fastest_matmul": fastest,
            "peak_bytes": self.peak, "floor_bytes": self.floor, "resident_bytes": self.resident,
            "reference_s": self.reference_s, "chosen": self.chosen, "load": os.getloadavg()[0],
        }  # fmt: skip


def resident(device: str) -> int:
    """Bytes of this process in memory now."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(device: str) -> int:
    """Most bytes of this process in memory so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_products(device: str) -> None:
    """Take what measuring a rate allocated out of an accelerator's peak."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> int:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def main() -> None:
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(job["threads"])
    from speed_trainers import interleave, train

    if isinstance(job["tool"], list):
        clocks = interleave(job)
    else:
        clocks = {job["tool"]: Clock(job)}
        train(job, clocks[job["tool"]])
    out.write_text(json.dumps([{**job, "tool": tool, **clock.figures()} for tool, clock in clocks.items()]))


if __name__ == "__main__":
    main()
