"""The reference cache beside TRL's `precompute_ref_log_probs`: reference scorings over a sweep, peak memory.

    python benchmarks/reference_against_trl.py DATA MODEL [--pairs 16 --max-length 256 --repeats 3 --small]

DATA is JSON lines, plain or gzipped, with `prompt`, `chosen` and `rejected` (strings), MODEL a folder of a model and
its tokenizer with a chat template (benchmarks/make_small_llama.py makes one). Four parts, each left out by `--skip`:

    build     benchmarks/reference_build.py: tokens/s of building the cache, none, int8, nf4
    storage   benchmarks/reference_cache_storage.py: opening and look-up at 1,000,000 completions
    sweep     what the reference computes in 12 runs of dpo (4 betas, 3 learning rates), then 12 of ipo
    memory    peak memory of a few steps with the reference in memory and with its log-probs precomputed

Both trainers get the same rows, batch size and max length, fp32 and a CPU. The rows are the first pairs that fit
max length, so that neither trainer cuts one, whether it is told the length or not. Every run and every measurement
is a fork of this process, which has imported both trainers and computed nothing: a process of its own that does not
pay for the imports. Runs of one trainer follow each other and find what the earlier ones left on disk.

How scorings and peak memory are counted stands in benchmarks/runs_of_two_trainers.py. The row of a tiny model in the
table of memory shows how much of a peak is not the model's.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", ACCELERATE_USE_CPU="true")

import datasets
import torch
import transformers
import trl
from make_small_llama import new_model
from runs_of_two_trainers import Cost, Job, train
from transformers import AutoTokenizer

HERE = Path(__file__).parent
PARTS = ("build", "storage", "sweep", "memory")
BETAS, LEARNING_RATES, LOSSES = (0.01, 0.05, 0.1, 0.5), (1e-7, 5e-7, 2e-6), ("dpo", "ipo")
SWEEP_BATCH, MEMORY_BATCH = 4, 2
"""Pairs per step."""


def main() -> None:
    arguments = parse_arguments()
    parts = [part for part in PARTS if part not in arguments.skip]
    print_conditions(arguments)
    if "build" in parts:
        sizes = ["--prompts", arguments.prompts, "--repeats", arguments.repeats, "--max-length", arguments.max_length]
        run_program("reference_build.py", arguments.data, arguments.model, *sizes)
    if "storage" in parts:
        run_program("reference_cache_storage.py", "--rows", arguments.rows)
    if not {"sweep", "memory"} & set(parts):
        return
    with tempfile.TemporaryDirectory() as temporary, get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        folder = Path(temporary)
        print(pool.apply(write_pairs, (arguments, folder)), flush=True)
        if "sweep" in parts:
            sweep(pool, arguments, folder)
        if "memory" in parts:
            compare_memory(pool, arguments, folder)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="preference pairs: .jsonl or .jsonl.gz")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of the sweep")
    parser.add_argument("--max-length", type=int, default=256, help="longest prompt with completion, in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="builds and memory runs of each kind")
    parser.add_argument("--prompts", type=int, default=2, help="different prompts of the build")
    parser.add_argument("--rows", type=int, default=1_000_000, help="completions in the storage")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model whose memory is measured")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--steps", type=int, default=2, help="steps of a memory run")
    parser.add_argument(
        "--small", action="store_true", help="a little of everything, two runs a sweep: whether it works"
    )
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    arguments = parser.parse_args()
    if arguments.small:
        small = {"pairs": 4, "repeats": 1, "prompts": 1, "rows": 50_000, "hidden": 64, "layers": 2, "steps": 1}
        vars(arguments).update(small)
    return arguments


def print_conditions(arguments: argparse.Namespace) -> None:
    print(
        f"{time.strftime('%Y-%m-%d')}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, TRL {trl.__version__}, datasets {datasets.__version__}; fp32, "
        f"max_length {arguments.max_length}",
        flush=True,
    )


def run_program(name: str, *arguments: object) -> None:
    """Run a neighbouring benchmark and let it print."""
    print(f"\n## {name} {' '.join(map(str, arguments))}\n", flush=True)
    subprocess.run([sys.executable, str(HERE / name), *map(str, arguments)], check=True)


def write_pairs(arguments: argparse.Namespace, folder: Path) -> str:
    """Write the first pairs that no trainer cuts, as messages: all, half, and those of the memory runs.

    Returns:
        What they are.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    content = arguments.data.read_bytes()
    lines = (gzip.decompress(content) if arguments.data.suffix == ".gz" else content).splitlines()
    taken: list[dict[str, Any]] = []
    for row in map(json.loads, filter(None, lines)):
        prompt = [{"role": "user", "content": row["prompt"]}]
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        longest = max(
            len(tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"])
            for answer in sides.values()
        )
        if longest <= arguments.max_length and row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]:
            taken.append({"prompt": prompt, **sides})
        if len(taken) == arguments.pairs:
            break
    for name, count in {"all": len(taken), "half": len(taken) // 2, "few": arguments.steps * MEMORY_BATCH}.items():
        text = "".join(json.dumps(row) + "\n" for row in taken[:count])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    different = {json.dumps((row["prompt"], row[side])) for row in taken for side in ("chosen", "rejected")}
    prompts = {json.dumps(row["prompt"]) for row in taken}
    return f"\n{len(taken)} pairs, {len(prompts)} prompts, {len(different)} different completions"


def sweep(pool: Pool, arguments: argparse.Namespace, folder: Path) -> None:
    """Count what the reference of each trainer computes in a sweep, in one run once more, and with half of the rows."""
    points = list(itertools.product(BETAS, LEARNING_RATES))[: 2 if arguments.small else None]
    print(
        f"\n## sweep: {len(BETAS)} betas x {len(LEARNING_RATES)} learning rates, one step of {SWEEP_BATCH} pairs each\n"
    )
    print(
        "| trainer | max_length | runs | runs that score | completions | completion tokens | positions "
        "| of the step-0 check |\n|---|---|---|---|---|---|---|---|"
    )
    for trainer, max_length in (("prefopt", arguments.max_length), ("TRL", arguments.max_length), ("TRL", None)):
        disk = folder / f"sweep-{trainer}-{max_length}"
        job = Job(trainer, arguments.model, folder / "all.jsonl", disk, disk / "run", max_length, SWEEP_BATCH, steps=1)
        show = partial(print_scorings, trainer, max_length)
        for loss in LOSSES:
            grid = [
                replace(job, loss=loss, beta=beta, learning_rate=rate, output=disk / f"{loss}-{beta}-{rate}")
                for beta, rate in points
            ]
            show(f"{len(grid)} of {loss}", pool.map(train, grid, chunksize=1))
        # A finished run of prefopt is not run again in its folder. TRL gets every setting as it was, the folder too.
        again = replace(grid[-1], output=disk / "again") if trainer == "prefopt" else grid[-1]
        show("the last once more", [pool.apply(train, (again,))])
        half = replace(grid[-1], pairs=folder / "half.jsonl", output=disk / "half")
        show("with the first half of the rows", [pool.apply(train, (half,))])


def print_scorings(trainer: str, max_length: int | None, runs: str, costs: list[Cost]) -> None:
    names = ("completions", "tokens", "positions", "check_positions")
    sums = " | ".join(f"{sum(getattr(cost, name) for cost in costs):,}" for name in names)
    scoring = sum(cost.completions > 0 for cost in costs)
    print(f"| {trainer} | {max_length} | {runs} | {scoring} of {len(costs)} | {sums} |", flush=True)


def compare_memory(pool: Pool, arguments: argparse.Namespace, folder: Path) -> None:
    """Measure the peak of each trainer with the reference in memory, precomputing, and with all found on disk."""
    small, model = folder / "small", folder / "model"
    small_size = pool.apply(save_new_model, (arguments.model, small, 64, 1))
    size = pool.apply(save_new_model, (arguments.model, model, arguments.hidden, arguments.layers))
    print(f"\n## memory: {arguments.steps} steps of {MEMORY_BATCH} pairs, weights of {size:.0f} MiB\n", flush=True)
    costs: dict[tuple[str, str], list[Cost]] = {}
    for repeat, trainer in itertools.product(range(arguments.repeats), ("prefopt", "TRL")):
        disk = folder / f"memory-{trainer}-{repeat}"
        rows, length, steps = folder / "few.jsonl", arguments.max_length, arguments.steps
        cached = Job(trainer, model, rows, disk, disk / "run", length, MEMORY_BATCH, steps)
        online = replace(cached, precomputed=False, output=disk / "online")
        again = replace(cached, output=disk / "again") if trainer == "prefopt" else cached
        cases = {
            f"in memory, but a model of {small_size:.1f} MiB": replace(online, model=small, output=disk / "small"),
            "in memory": online,
            "precomputed by this run": cached,
            "precomputed by an earlier run": again,
        }
        for case, job in cases.items():
            costs.setdefault((trainer, case), []).append(pool.apply(train, (job,)))
    print_memory(costs)


def print_memory(costs: dict[tuple[str, str], list[Cost]]) -> None:
    print(
        "| trainer | reference | peak, MiB: median | lowest | highest | less than in memory | precomputed completions |"
    )
    print("|---|---|---|---|---|---|---|")
    for (trainer, case), runs in costs.items():
        peaks = [run.mebibytes for run in runs]
        saved = [one.mebibytes - peak for one, peak in zip(costs[trainer, "in memory"], peaks)]
        difference = f"{min(saved):,.0f} to {max(saved):,.0f}" if case.startswith("precomputed") else ""
        scored = ", ".join(map(str, sorted({run.completions for run in runs})))
        print(
            f"| {trainer} | {case} | {statistics.median(peaks):,.0f} | {min(peaks):,.0f} | {max(peaks):,.0f} | "
            f"{difference} | {scored} |"
        )


def save_new_model(given: Path, folder: Path, hidden: int, layers: int) -> float:
    """Save an untrained Llama with the tokenizer of the given model; returns the MiB of its weights."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given)
    model = new_model(tokenizer, hidden, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters() * 4 / 2**20


if __name__ == "__main__":
    main()
