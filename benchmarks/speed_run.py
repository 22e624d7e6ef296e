"""One timed run of one trainer in this process; a job in JSON comes in, figures in JSON go out.

    python benchmarks/speed_run.py '{"tool": "prefopt", ...}' OUT.json

A step's time is from one log to the next: data, forward, backward, clipping, optimizer and logging are all in it.
The first step is not counted. Peak memory is that of the process at the end.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

BEGAN = time.perf_counter()
os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")

import torch  # noqa: E402
from cost_model import matmul_rate  # noqa: E402


def main() -> None:
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    rates = [matmul_rate(dtype)]
    times, losses, extra = (run_prefopt if job["tool"].startswith("prefopt") else run_trl)(job)
    rates.append(matmul_rate(dtype))
    steps = [after - before for before, after in pairwise(times)]
    figures = {
        **job, **extra, "steps_s": steps, "median_s": statistics.median(steps), "losses": losses,
        "matmul_rate": rates, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_step_s": times[0] - BEGAN, "load": os.getloadavg()[0],
    }  # fmt: skip
    out.write_text(json.dumps(figures))


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_prefopt(job: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Any]]:
    """Train with prefopt's own loop; the data in the order of the file, as the other trainer reads it."""
    import numpy as np
    from rich.console import Console

    from prefopt.planning import StepPlanner
    from prefopt.recipe import recipe_from_mapping
    from prefopt.tracking import Tracker
    from prefopt.train import run_training

    os.environ["PREFOPT_CACHE"] = str(Path(job["folder"]) / "prefopt-cache")
    times, losses, memory = [], [], []
    log = Tracker.log

    def noted(tracker: Tracker, step: int, metrics: Any) -> None:
        log(tracker, step, metrics)
        if "loss" in metrics:
            times.append(time.perf_counter())
            losses.append(metrics["loss"])
            memory.append(resident())

    order = StepPlanner._order

    def unshuffled(planner: StepPlanner, epoch: int) -> Any:
        in_order = SimpleNamespace(permutation=np.arange)
        with mock.patch("numpy.random.default_rng", return_value=in_order):
            return order(planner, epoch)

    mapping: dict[str, Any] = {
        "model": job["model"], "loss": {"name": "dpo", "beta": 0.1},
        "data": {"train": job["pairs"], "max_length": job["max_length"], "eval_fraction": 0.0, "processes": 1,
                 "group_by_prompt": False},
        "adapter": {"rank": 16, "alpha": 32.0} if job["lora"] else None,
        "train": {"max_steps": job["steps"], "batch_size": job["batch"], "learning_rate": job["learning_rate"],
                  "precision": job["precision"], "schedule": "linear", "warmup": 0},
        "eval": {"samples": 0, "show": 0, "every": 0}, "checkpoint": {"every": 0}, "output": job["output"],
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tracker, "log", noted))
        stack.enter_context(mock.patch.object(StepPlanner, "_order", unshuffled))
        if job["tool"] == "prefopt-unshared":
            stack.enter_context(mock.patch("prefopt.feed.make_batch", unshared_batch))
        result = run_training(recipe_from_mapping(mapping, name="speed"), Console(quiet=True))
    return times, losses, {"resident": memory, "result": result["train"]}


def unshared_batch(groups: Any, slices: Any = None, **options: Any) -> Any:
    """Lay the same pairs out with the prompt once for each completion: ragged rows that share nothing."""
    from dataclasses import replace

    from prefopt.batching import Tree, make_batch

    batch = make_batch(groups, slices, **options)
    index, trees, predict, begun = [], [], [], 0
    for tree in batch.trees:
        for begin, count in tree.branches:
            index += [*range(tree.start, tree.start + tree.prompt), *range(begin, begin + count)]
            predict += range(begun + tree.prompt - 1, begun + tree.prompt + count)
            trees.append(Tree(begun, tree.prompt, ((begun + tree.prompt, count),)))
            begun += tree.prompt + count
    rows = torch.tensor(index)
    return replace(
        batch, input_ids=batch.input_ids[rows], position_ids=batch.position_ids[rows], trees=tuple(trees),
        predict_index=torch.tensor(predict),
    )  # fmt: skip


def run_trl(job: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Any]]:
    """Train with TRL's DPOTrainer, in the order of the file."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if job["tool"].endswith("compact"):  # the head of completion positions only, which it has on CUDA
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                times.append(time.perf_counter())
                losses.append(float(logs["loss"]))

    precomputed = "precomputed" in job["tool"]
    rows = datasets.load_dataset("json", data_files=job["pairs"], split="train", cache_dir=job["output"] + "-data")
    if precomputed:
        rows = rows.select(range(min(len(rows), job["steps"] * job["batch"])))
    settings = DPOConfig(
        output_dir=job["output"], max_length=job["max_length"], beta=0.1, learning_rate=job["learning_rate"],
        per_device_train_batch_size=job["batch"], max_steps=job["steps"], save_strategy="no", logging_steps=1,
        logging_nan_inf_filter=False, gradient_checkpointing=job["trl_checkpointing"],
        bf16=job["precision"] == "bf16", use_cpu=True, report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential", precompute_ref_log_probs=precomputed, optim="adamw_torch_fused",
        lr_scheduler_type="linear", warmup_steps=0, seed=0,
    )  # fmt: skip
    peft = None
    if job["lora"]:
        from peft import LoraConfig

        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), args=settings,
        train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Clock()],
        peft_config=peft,
    )  # fmt: skip
    losses_exact = exact_losses(trainer)
    began = time.perf_counter()
    trainer.train()
    return times, losses_exact or losses, {"train_call_s": time.perf_counter() - began}


def exact_losses(trainer: Any) -> list[float]:
    """Note every step's loss before the trainer rounds it for its log."""
    noted: list[float] = []
    step = trainer.training_step

    def stepped(*given: Any, **named: Any) -> Any:
        loss = step(*given, **named)
        noted.append(float(loss))
        return loss

    trainer.training_step = stepped
    return noted


if __name__ == "__main__":
    main()
