"""prefopt beside TRL's DPOTrainer: each tool in its own process, whole runs alternating, ratios with their spread.

    python benchmarks/compare_trl.py --workload reference body-256-128 --precision fp32 --runs 5 --markdown FILE
    python benchmarks/compare_trl.py --workload alpaca --data PAIRS.jsonl.gz

Both tools get the same weights, the same rows in the same order, the same batch, AdamW (fused), learning rate and
clipping, through their own training loops; their losses must agree to 1e-4 in fp32, or the program fails. The order
of tools alternates A B C, A B C, ...; ratios are taken run by run, the interval is that of the median (bootstrap,
95 %). Beside each run the machine's matrix products are timed: `eff` is the share of that rate that a step reached.

    prefopt                  reference cached (scored before the first step), token budget and layout as it chooses
    prefopt-unshared         the same with every prompt computed twice, ragged: what sharing alone is worth
    trl                      online reference: its default (for LoRA with the adapter off)
    trl-precomputed          reference log-probs computed before the first step
    trl-precomputed-compact  the same, patched to score completion positions only, as it does on CUDA
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from cost_model import Pair, naive, shared
from speed_workloads import (
    BATCH,
    WORKLOADS,
    Workload,
    bpe_tokenizer,
    make_model,
    read_real_pairs,
    word_tokenizer,
    write_random_pairs,
    write_real_pairs,
)

HERE = Path(__file__).parent
TOOLS = ("prefopt", "prefopt-unshared", "trl", "trl-precomputed", "trl-precomputed-compact")
AGREE = 1e-4
"""Largest difference of two tools' losses in fp32."""


def main() -> None:
    arguments = parse_arguments()
    lines, raw = [conditions(arguments)], []
    for name in arguments.workload:
        for precision in arguments.precision:
            runs = measure(name, precision, arguments)
            raw += runs
            lines += table(name, precision, runs, arguments)
            print("\n".join(lines[-(len(arguments.tools) + 6) :]), flush=True)
            if arguments.markdown:
                arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
            if arguments.json:
                arguments.json.write_text(json.dumps(raw), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["reference"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["prefopt", "trl", "trl-precomputed"])
    parser.add_argument("--runs", type=int, default=5, help="runs of each tool")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run; one more comes first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="preference pairs for alpaca: .jsonl.gz")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default: recompute activations")
    parser.add_argument("--json", type=Path, help="every number")
    parser.add_argument("--markdown", type=Path, help="the tables")
    return parser.parse_args()


def conditions(arguments: argparse.Namespace) -> str:
    """Say what was measured, and on what."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, cwd=HERE)
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in described.splitlines() if "model name" in line), "")
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in described]
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}{' with changes' if changed.stdout else ''}; "
        f"{name or platform.machine()} ({', '.join(flags)}), {os.cpu_count()} cores, {arguments.threads} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}; "
        f"{arguments.runs} alternating runs of {arguments.steps} timed steps, {BATCH} pairs a step"
        f"{'; TRL with gradient checkpointing' if arguments.trl_checkpointing else ''}\n"
    )


def measure(name: str, precision: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every tool in turn, each in a process of its own; returns their figures."""
    workload, steps = WORKLOADS[name], arguments.steps + 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs = prepare(folder, name, workload, steps * BATCH, arguments)
        runs = []
        for number in range(arguments.runs):
            for tool in arguments.tools:
                job = {
                    "tool": tool, "workload": name, "run": number, "precision": precision, "lora": workload.lora,
                    "model": str(folder / "model"), "pairs": str(folder / "pairs.jsonl"), "folder": str(folder),
                    "output": str(folder / f"{tool}-{number}"), "steps": steps, "batch": BATCH,
                    "max_length": arguments.max_length, "learning_rate": 1e-3 if workload.lora else 1e-4,
                    "threads": arguments.threads, "trl_checkpointing": arguments.trl_checkpointing,
                }  # fmt: skip
                runs.append(run(job, folder / "figures.json") | {"operations": operations(workload, pairs, tool)})
        if precision == "fp32":
            refuse_other_losses(runs)
        return runs


def prepare(folder: Path, name: str, workload: Workload, count: int, arguments: argparse.Namespace) -> list[Pair]:
    """Write the model and the pairs; returns the pairs' lengths."""
    if name != "alpaca":
        tokenizer = word_tokenizer(workload.vocab)
        pairs = write_random_pairs(folder / "pairs.jsonl", workload, count)
    elif arguments.data is None:
        raise SystemExit("--workload alpaca: expected --data PAIRS.jsonl.gz with prompt, chosen and rejected")
    else:
        rows = read_real_pairs(arguments.data)
        tokenizer = bpe_tokenizer([text for row in rows for text in row.values()], workload.vocab)
        pairs = write_real_pairs(folder / "pairs.jsonl", rows, tokenizer, count, arguments.max_length)
    make_model(folder / "model", workload, tokenizer)
    return pairs


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run one job in a fresh process.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    command = [sys.executable, str(HERE / "speed_run.py"), json.dumps(job), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise SystemExit(f"{job['tool']} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(out.read_text())
    print(f"  {job['workload']} {job['precision']} {job['tool']}: {figures['median_s']:.2f} s a step", file=sys.stderr)
    return figures


def operations(workload: Workload, pairs: list[Pair], tool: str) -> float:
    """Operations of the mean timed step of a tool, without padding."""
    timed, k, u = pairs[BATCH:], 2 if workload.lora else 3, 2 if workload.lora else 3
    steps = len(timed) / BATCH
    if tool == "prefopt":
        return shared(workload.shape, timed, k=k, u=u) / steps
    recomputed = 0 if tool.startswith("prefopt") else 1
    return naive(workload.shape, timed, k=k, u=u + recomputed, reference=tool == "trl") / steps


def refuse_other_losses(runs: list[dict[str, Any]]) -> None:
    """Raise SystemExit where two tools did not train the same."""
    first = runs[0]["losses"]
    for other in runs[1:]:
        apart = max(abs(a - b) for a, b in zip(first, other["losses"], strict=True))
        if not apart <= AGREE:
            raise SystemExit(
                f"losses of {runs[0]['tool']} and {other['tool']} differ by {apart:.2g} in fp32 (at most {AGREE} "
                f"allowed), so their times say nothing:\n{first}\n{other['losses']}"
            )


def table(name: str, precision: str, runs: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """Lay the figures out, with prefopt's ratio to each other tool."""
    ours = [run for run in runs if run["tool"] == arguments.tools[0]]
    lines = [
        f"\n## {name}, {precision}\n",
        "| tool | s/step (median; least to most) | pairs/s | eff | peak GiB | first step s "
        f"| x {arguments.tools[0]} (median; 95 % interval; least to most) | operations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tool in arguments.tools:
        own = [run for run in runs if run["tool"] == tool]
        times = [run["median_s"] for run in own]
        median = statistics.median(times)
        eff = statistics.median(
            run["operations"] / statistics.mean(run["steps_s"]) / statistics.mean(run["matmul_rate"]) for run in own
        )
        ratios = [theirs["median_s"] / mine["median_s"] for theirs, mine in zip(own, ours, strict=True)]
        low, high = interval(ratios)
        lines.append(
            f"| {tool} | {median:.2f}; {min(times):.2f} to {max(times):.2f} | {BATCH / median:.2f} | {eff:.2f} "
            f"| {max(run['peak_bytes'] for run in own) / 2**30:.2f} "
            f"| {statistics.median(run['first_step_s'] for run in own):.0f} "
            f"| {statistics.median(ratios):.2f}; {low:.2f} to {high:.2f}; {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {own[0]['operations'] / ours[0]['operations']:.2f} x |"
        )
    apart = max(abs(a - b) for run in runs for a, b in zip(runs[0]["losses"], run["losses"]))
    return [*lines, f"\nLargest difference of two tools' losses: {apart:.1e}"]


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """Bootstrap interval of the median, 95 %."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40 - 1]


if __name__ == "__main__":
    main()
