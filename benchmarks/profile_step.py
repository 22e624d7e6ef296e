"""Where a step of prefopt goes: which operations, and how much of it is not the model.

    python benchmarks/profile_step.py --workload reference [--precision bf16 --steps 6 --rows 20]

Two runs of the same training, each in a fresh process. The first has timers around the pieces of a step and nothing
else; a piece's time is its own, without that of pieces inside it, and what is in no piece is `else`. The model is
what multiplies: decoder, attention, head, backward pass, clipping and optimizer. All else is outside: planning, data
layout, reference look-up, loss, metrics, logging, trimming, and everything nobody thought of. Its share should be at
most 3 % on the reference workload. Backward passes of attention and head are in `backward`; the second run, under
torch.profiler, says by operation what they cost. The profiler itself takes time, so its total is no step time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from speed_workloads import BATCH, WORKLOADS, make_model, word_tokenizer, write_random_pairs

MOST_OUTSIDE = 0.03
INSIDE = ("decoder", "attention", "head", "backward", "clipping", "optimizer")


class Watch:
    """Own time of named pieces, by wrapping the functions that are the pieces."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner: list[float] = []
        """Per piece that is running: time of the pieces inside it."""

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a timer around it."""

        def wrapper(*given: Any, **named: Any) -> Any:
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent = time.perf_counter() - began
                self.seconds[name] += spent - self.inner.pop()
                if self.inner:
                    self.inner[-1] += spent

        return wrapper

    def around(self, stack: ExitStack, owner: Any, attribute: str, name: str) -> None:
        """Time a function of a module or a class while the stack is open."""
        function = getattr(owner, attribute)
        stack.enter_context(mock.patch.object(owner, attribute, self.timed(name, function)))


def watch_pieces(stack: ExitStack, watch: Watch) -> None:
    """Put timers around the pieces of a step."""
    import accelerate
    import accelerate.optimizer
    from transformers import AttentionInterface

    import prefopt.gradients
    import prefopt.train
    from prefopt.attention import NAME, tree_attention
    from prefopt.feed import Feed
    from prefopt.forward import Scorer
    from prefopt.kept_gradients import KeptGradients
    from prefopt.memory import Trimmer
    from prefopt.planning import StepPlanner
    from prefopt.reference.source import CachedLogps

    pieces = [
        (StepPlanner, "step", "planning"),
        (Feed, "_laid_out", "data layout"),
        (CachedLogps, "__call__", "reference look-up"),
        (Scorer, "_shared", "decoder"),
        (Scorer, "_unshared", "decoder"),
        (Scorer, "_token_logps", "head"),
        (accelerate.Accelerator, "backward", "backward"),
        (accelerate.Accelerator, "clip_grad_norm_", "clipping"),
        (accelerate.optimizer.AcceleratedOptimizer, "step", "optimizer"),
        (accelerate.optimizer.AcceleratedOptimizer, "zero_grad", "optimizer"),
        (KeptGradients, "reset", "optimizer"),
        (prefopt.gradients, "loss_record", "loss"),
        (prefopt.gradients, "loss_values", "loss"),
        (prefopt.gradients, "add_comparison_metrics", "metrics"),
        (prefopt.train, "_log", "logging"),
        (Trimmer, "after_step", "trimming"),
    ]
    for owner, attribute, name in pieces:
        watch.around(stack, owner, attribute, name)
    AttentionInterface.register(NAME, watch.timed("attention", tree_attention))
    stack.callback(AttentionInterface.register, NAME, tree_attention)


class Bounds:
    """The steps that count: where they begin and end, in place of a benchmark's clock.

    A log is in the middle of its own piece when it says so: what the uncounted step's took is added to the first step
    that counts, and that of the last one is missing instead.
    """

    reference_s = 0.0

    def __init__(self, warmup: int, total: int, begin: Callable[[], None], end: Callable[[float], None]) -> None:
        self.warmup, self.total, self.step, self.started, self.ended = warmup, total, 0, begin, end

    def begin(self) -> None:
        """Nothing is loaded yet."""

    def note(self, tokens: int, checksum: int) -> None:
        """What a micro-batch holds is of no interest here."""

    def tick(self, loss: float) -> None:
        """A step has been logged."""
        self.step += 1
        if self.step == self.total:
            self.ended(time.perf_counter() - self.since)
        if self.step == self.warmup:
            self.started()
            self.since = time.perf_counter()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.part is None:
        for part in ("timers", "profiler"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)
    elif arguments.part == "timers":
        show_pieces(arguments)
    else:
        show_operations(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    able = [name for name, workload in WORKLOADS.items() if name != "alpaca" and not workload.large]
    parser.add_argument("--workload", choices=able, default="reference")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20, help="operations in the table")
    parser.add_argument("--part", choices=("timers", "profiler"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.warmup, arguments.threads) < 1:
        parser.error("--steps, --warmup, --threads: expected at least 1")
    return arguments


def train(arguments: argparse.Namespace, bounds: Bounds) -> None:
    """Train prefopt on a workload in this process."""
    from speed_trainers import train_prefopt

    workload, steps = WORKLOADS[arguments.workload], arguments.warmup + arguments.steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", workload, word_tokenizer(workload.vocab))
        write_random_pairs(folder / "pairs.jsonl", workload, steps * BATCH, uncounted=arguments.warmup * BATCH)
        job = {
            "tool": "prefopt", "model": str(folder / "model"), "pairs": str(folder / "pairs.jsonl"), "max_length": 4096,
            "output": str(folder / "run"), "steps": steps, "batch": BATCH, "beta": 0.1, "lora": workload.lora,
            "learning_rate": 1e-4, "precision": arguments.precision, "quantization": workload.quantization,
            "held_in": "auto",
        }  # fmt: skip
        train_prefopt(job, bounds)  # type: ignore[arg-type]


def show_pieces(arguments: argparse.Namespace) -> None:
    """Print what each piece of a step took, and the share outside the model."""
    watch = Watch()
    found: dict[str, float] = {}

    def end(spent: float) -> None:
        found.update(watch.seconds, **{"else": spent - sum(watch.seconds.values())})

    with ExitStack() as stack:
        watch_pieces(stack, watch)
        train(arguments, Bounds(arguments.warmup, arguments.warmup + arguments.steps, watch.seconds.clear, end))
    whole = sum(found.values())
    print(f"\n## {arguments.workload}, {arguments.precision}: {whole / arguments.steps:.4f} s a step, by timers\n")
    print("| piece | | ms a step | share |\n|---|---|---|---|")
    for name, spent in sorted(found.items(), key=lambda item: -item[1]):
        where = "model" if name in INSIDE else "outside"
        print(f"| {name} | {where} | {1e3 * spent / arguments.steps:.2f} | {spent / whole:.2%} |")
    outside = sum(spent for name, spent in found.items() if name not in INSIDE) / whole
    verdict = "yes" if outside <= MOST_OUTSIDE else "NO"
    print(f"\nOutside the model {outside:.2%} of a step; at most {MOST_OUTSIDE:.0%}: {verdict}.", flush=True)


def show_operations(arguments: argparse.Namespace) -> None:
    """Print what each operation took in all counted steps, under the profiler."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def end(spent: float) -> None:
        profiler.stop()

    train(arguments, Bounds(arguments.warmup, arguments.warmup + arguments.steps, profiler.start, end))
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    print(f"\n## {arguments.workload}, {arguments.precision}: self time by operation, under the profiler\n")
    print("| operation | calls a step | ms a step | share |\n|---|---|---|---|")
    for event in events[: arguments.rows]:
        spent = event.self_cpu_time_total
        calls, milliseconds = event.count / arguments.steps, spent / 1e3 / arguments.steps
        print(f"| {event.key} | {calls:.1f} | {milliseconds:.2f} | {spent / whole:.1%} |", flush=True)


if __name__ == "__main__":
    main()
