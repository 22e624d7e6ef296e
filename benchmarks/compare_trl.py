"""prefopt beside TRL's DPOTrainer: each run in a fresh process, whole runs alternating, ratios paired run by run.

    python benchmarks/compare_trl.py --workload reference body-256-128 lora --precision fp32 bf16 --json FILE
    python benchmarks/compare_trl.py --workload alpaca --data PAIRS.jsonl.gz
    python benchmarks/compare_trl.py --workload body-256-128 --sharing
    python benchmarks/compare_trl.py --workload reference --growth 200
    python benchmarks/compare_trl.py --device cuda --workload llama-8b-lora --precision bf16 --runs 3 --steps 4

Both tools get the same weights, token ids, order, batch, loss, AdamW (fused), learning rate and clipping, and train
in their own loops. The pairs are the draw whose padding and sharing are most like those of all pairs, and a run's
time is the mean of its steps, for they differ in length. Every counted step must score the same tokens in both; in
fp32 the losses must agree to 1e-4. Otherwise the program fails and prints no table.

    prefopt                  reference cached (scored before the first step), token budget and layout as it chooses
    prefopt-unshared         the same ragged rows with every prompt computed twice: what sharing alone is worth
    trl                      online reference: its default; with LoRA it is `trl-adapter-off`
    trl-precomputed          reference log-probs computed before the first step
    trl-precomputed-compact  the same, patched to score completion positions only, as it does on CUDA

On an accelerator the frozen weights under LoRA are bf16 in both tools, TRL computes one pair of a large model at a time
(--trl-micro-batch; --trl-checkpointing where that does not fit), and TRL's head scores completions only, as it does
there; run `pytest tests/test_attention.py` first: its last tests hold that machine's flash kernel against one by hand.
TRL runs without gradient checkpointing unless --trl-checkpointing, though it is its default: that favours TRL.
How a step is timed stands in speed_run.py, what is patched in speed_trainers.py, `eff` and `predicted` in
cost_model.py. The lower bound of a ratio is exact (order statistics); `at equal rate` counts
time in matrix products that the machine could have done meanwhile. --interleaved runs two tools in one process,
step by step in turn: a second opinion that flatters whoever allocates less, which is us.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cost_model import TOOLS, Pair, operations, seconds_a_step
from speed_tables import growth, largest_difference, sharing, table
from speed_workloads import (
    BATCH,
    WORKLOADS,
    bpe_tokenizer,
    held_in,
    make_model,
    read_real_pairs,
    waste,
    word_tokenizer,
    write_random_pairs,
    write_real_pairs,
)

HERE = Path(__file__).parent
AGREE = 1e-4
"""Largest difference of two tools' losses in fp32."""
LEAST_GROWTH = 20
"""Steps of a run whose memory in its quarters is compared."""
Figures = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    lines, runs = [conditions(arguments)], []
    print(lines[0], flush=True)

    def show(more: list[str]) -> None:
        lines.extend(more)
        if more:
            print("\n".join(more), flush=True)
        if arguments.markdown:
            arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if arguments.json:
            arguments.json.write_text(json.dumps({"conditions": lines[0], "runs": runs}), encoding="utf-8")

    for name in arguments.workload:
        for precision in arguments.precision:
            with tempfile.TemporaryDirectory() as temporary:
                measure(name, precision, arguments, Path(temporary), runs, show)
    show([f"\nLoad average at the end {os.getloadavg()[0]:.1f}"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["reference"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, help="all but prefopt-unshared")
    parser.add_argument("--sharing", action="store_true", help="only prefopt with and without shared prompts")
    parser.add_argument("--interleaved", action="store_true", help="both tools in one process (flatters us)")
    parser.add_argument("--growth", type=int, metavar="STEPS", help="only prefopt, once: memory over many steps")
    parser.add_argument("--runs", type=int, default=5, help="runs of each tool")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, at least one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trl-micro-batch", type=int, help=f"pairs that TRL computes at a time; {BATCH}, large ones 1")
    parser.add_argument("--data", type=Path, help="preference pairs for alpaca: JSON lines, plain or .gz")
    parser.add_argument("--max-length", type=int, help="longest prompt with completion; 512 for alpaca, else unlimited")
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default: recompute activations")
    parser.add_argument("--small", action="store_true", help="a tiny model, two runs: whether it works")
    parser.add_argument("--json", type=Path, help="every number")
    parser.add_argument("--markdown", type=Path, help="the tables")
    arguments = parser.parse_args()
    large = any(WORKLOADS[name].large for name in arguments.workload)
    if arguments.trl_micro_batch is None:
        arguments.trl_micro_batch = 1 if large else BATCH
    if arguments.tools is None:  # on CUDA TRL's head is compact anyway
        left_out = {"prefopt-unshared"} | ({"trl-precomputed-compact"} if arguments.device == "cuda" else set())
        arguments.tools = [tool for tool in TOOLS if tool not in left_out]
    if arguments.small:
        vars(arguments).update(workload=["small", "small-lora", "small-qlora"], runs=min(arguments.runs, 2), steps=2)
    if arguments.sharing:
        arguments.tools = ["prefopt", "prefopt-unshared"]
    if arguments.growth:
        vars(arguments).update(tools=["prefopt"], runs=1, steps=arguments.growth - arguments.warmup)
    refuse_what_cannot_run(parser, arguments)
    return arguments


def refuse_what_cannot_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program with what was expected, where something cannot be measured."""
    if arguments.interleaved and (len(arguments.tools) != 2 or arguments.tools[1] == "prefopt-unshared"):
        parser.error("--interleaved: expected --tools prefopt and one of TRL's, for what is patched holds process-wide")
    real = "alpaca" in arguments.workload
    if real and (arguments.data is None or not arguments.data.is_file()):
        parser.error("--workload alpaca: expected --data PAIRS.jsonl.gz with prompt, chosen and rejected, a file")
    if arguments.max_length and not real:
        parser.error("--max-length: expected --workload alpaca, for made pairs are as long as their workload says")
    for name, file in (("--json", arguments.json), ("--markdown", arguments.markdown)):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"{name}: expected a file in a folder that is there, given {file}")
    if arguments.growth and arguments.growth < LEAST_GROWTH:
        parser.error(f"--growth: expected at least {LEAST_GROWTH} steps, of which quarters are compared")
    workloads = [WORKLOADS[name] for name in arguments.workload]
    if any(workload.large for workload in workloads) and arguments.device == "cpu":
        parser.error("--workload: expected --device cuda, for a model of that size")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected an accelerator that torch sees, found none")
    lora = any(workload.lora for workload in workloads)
    if arguments.device == "cuda" and "fp32" in arguments.precision and lora:
        parser.error("--precision: expected bf16 with --device cuda and LoRA, whose frozen weights are bf16 there")
    if arguments.device == "cuda" and arguments.sharing:
        parser.error("--sharing: expected --device cpu: a budget that fills the device holds no rows without sharing")
    if arguments.trl_micro_batch < 1 or BATCH % arguments.trl_micro_batch:
        parser.error(f"--trl-micro-batch: expected a divisor of {BATCH}")
    if arguments.tools[0] != "prefopt":
        parser.error("--tools: expected prefopt as the first, for the others are compared with it")
    if min(arguments.warmup, arguments.runs, arguments.steps, arguments.threads) < 1:
        parser.error("--warmup, --runs, --steps, --threads: expected at least 1")


def conditions(arguments: argparse.Namespace) -> str:
    """Say what was measured, and on what."""
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    commit += " with changes" if git("status", "--porcelain", "-uno") else ""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in described.splitlines() if "model name" in line), "")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = ", ".join(f"{'' if f' {flag}' in described else 'no '}{flag}" for flag in known)
    if arguments.device == "cuda":
        name = f"{torch.cuda.get_device_name()} beside {name}"
    processes = "both tools in ONE process (flatters us)" if arguments.interleaved else "each in a process of its own"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl", "peft"))
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {commit}; "
        f"{name or platform.machine()} ({flags}), {os.cpu_count()} cores, {arguments.threads} threads, load average "
        f"{os.getloadavg()[0]:.1f}; {versions}; {arguments.runs} alternating runs of {arguments.warmup} + "
        f"{arguments.steps} steps of {BATCH} pairs, {processes}; TRL "
        f"{'with' if arguments.trl_checkpointing else 'without'} gradient checkpointing, "
        f"{arguments.trl_micro_batch} at a time"
    )


def git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=HERE).stdout.strip()


def measure(
    name: str, precision: str, arguments: argparse.Namespace, folder: Path, runs: list[Figures],
    show: Callable[[list[str]], None],
) -> None:  # fmt: skip
    """Run every tool in turn, and show what came of it."""
    workload, steps, on_gpu = WORKLOADS[name], arguments.warmup + arguments.steps, arguments.device == "cuda"
    max_length = arguments.max_length or (512 if name == "alpaca" else 4096)
    uncounted = arguments.warmup * BATCH
    usual, pairs = prepare(folder, name, steps * BATCH, uncounted, arguments, max_length)
    counted = pairs[uncounted:]
    tools = ["trl-adapter-off" if tool == "trl" and workload.lora else tool for tool in arguments.tools]
    own: list[Figures] = []
    for number in range(arguments.runs):
        for tool in [tools] if arguments.interleaved else tools:
            job = {
                "tool": tool, "workload": name, "run": number, "precision": precision, "lora": workload.lora,
                "model": str(folder / "model"), "pairs": str(folder / "pairs.jsonl"), "max_length": max_length,
                "output": str(folder / f"{'-'.join(tool) if arguments.interleaved else tool}-{number}"),
                "steps": steps, "warmup": arguments.warmup, "batch": BATCH, "beta": 0.1,
                "learning_rate": 1e-3 if workload.lora else 1e-4, "threads": arguments.threads,
                "device": arguments.device, "quantization": workload.quantization,
                "held_in": "bfloat16" if held_in(workload, arguments.device) == torch.bfloat16 else "auto",
                "trl_micro_batch": arguments.trl_micro_batch,
                "trl_checkpointing": arguments.trl_checkpointing, "interleaved": arguments.interleaved,
            }  # fmt: skip
            for figures in run(job, folder / "figures.json"):
                figures["operations"], figures["model_operations"] = (
                    operations(
                        figures["tool"], workload.shape, counted, batch=BATCH, lora=workload.lora,
                        checkpointing=recomputed(figures, arguments), whole_model=whole,
                        whole_attention=on_gpu or (precision == "bf16" and torch.cpu._is_amx_tile_supported()),
                        compact=on_gpu,
                    ) for whole in (False, True)
                )  # fmt: skip
                own.append(figures)
                runs.append(figures)
            show([])  # what is measured is written, whatever befalls the next
            clear_away(folder)
    refuse_another_training(own, precision)
    if arguments.growth:
        show(growth(own[0]))
        return
    show(table(name, precision, own))
    show([typical(counted, usual)])
    if "prefopt-unshared" in tools:
        show([sharing(own)])
    if name == "alpaca":
        from speed_grouping import count_tokens

        show(count_tokens(arguments.data, folder, max_length))


def clear_away(folder: Path) -> None:
    """Remove what runs wrote: models, checkpoints and caches of every one would fill a disk."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != "model":
            shutil.rmtree(path)


def recomputed(figures: Figures, arguments: argparse.Namespace) -> bool:
    """Say whether a run computed its activations again in the backward pass: as prefopt chose, or as TRL was told."""
    chosen = figures["chosen"].get("gradient_checkpointing", False)
    return bool(chosen if figures["tool"].startswith("prefopt") else arguments.trl_checkpointing)


def typical(counted: list[Pair], usual: tuple[float, float]) -> str:
    """Say how the counted pairs compare with all."""
    (padding, sharing), (all_padding, all_sharing) = waste(counted), usual
    return (
        f"\nThe counted pairs (all such pairs): rows padded to the longest of a batch have {padding:.2f} "
        f"({all_padding:.2f}) times the tokens, with every prompt twice {sharing:.2f} ({all_sharing:.2f}) times."
    )


def prepare(
    folder: Path, name: str, count: int, uncounted: int, arguments: argparse.Namespace, max_length: int
) -> tuple[tuple[float, float], list[Pair]]:
    """Write the model and the pairs; returns the `waste` of all such pairs and these pairs' lengths."""
    file, workload = folder / "pairs.jsonl", WORKLOADS[name]
    if name == "alpaca" and arguments.data is not None:
        rows = read_real_pairs(arguments.data)
        tokenizer = bpe_tokenizer([text for row in rows for text in row.values()], workload.vocab)
        written = write_real_pairs(file, rows, tokenizer, count, max_length, uncounted=uncounted)
    else:
        tokenizer = word_tokenizer(workload.vocab)
        written = write_random_pairs(file, workload, count, uncounted=uncounted)
    make_model(folder / "model", workload, tokenizer, device=arguments.device)
    return written


def run(job: Figures, out: Path) -> list[Figures]:
    """Run one job in a fresh process.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, str(HERE / "speed_run.py"), json.dumps(job), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"{job['tool']} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    figures: list[Figures] = json.loads(out.read_text())
    for one in figures:
        said = (
            f"run {one['run'] + 1} {one['workload']} {one['precision']} {one['tool']}: {seconds_a_step(one):.3f} s/step"
        )
        print(f"  {said}", file=sys.stderr, flush=True)
    return figures


def refuse_another_training(runs: list[Figures], precision: str) -> None:
    """Raise SystemExit where two runs did not train on the same tokens, or in fp32 not with the same losses."""
    first = runs[0]
    for other in runs[1:]:
        if other["scored"] != first["scored"]:
            raise SystemExit(
                f"{first['tool']} and {other['tool']} trained on different tokens (per step: completion tokens, sum "
                f"of ids):\n{first['scored']}\n{other['scored']}"
            )
        apart = largest_difference([first, other])
        if precision == "fp32" and not apart <= AGREE:
            raise SystemExit(
                f"losses of {first['tool']} and {other['tool']} differ by {apart:.2g} in fp32 (at most {AGREE} "
                f"allowed), so their times say nothing:\n{first['losses']}\n{other['losses']}"
            )


if __name__ == "__main__":
    main()
