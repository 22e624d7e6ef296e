"""One training run of prefopt or of TRL's DPOTrainer with the same settings, and what its reference cost.

Scorings are counted twice. Each trainer's own count: `cache_misses` and `tokens_scored` of result.json, and the rows
and completion tokens given to TRL's `compute_ref_log_probs`. The same ruler on both: the positions that pass the
embedding of any model while no gradient is recorded, prompts and padding included. Those of prefopt's step-0 check,
in which the untouched policy scores the first 32 pairs of a run, stand apart: they are not the reference's. prefopt's
probe of every model that it loads (one group, with its prompt shared and not) is among the positions.

Peak memory is `ru_maxrss` at the end of the run minus that of the process when it begins: everything from reading the
data to saving model and optimizer, with weights, gradients, AdamW, activations, what the allocator keeps and what a
trainer imports late.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
from rich.console import Console
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt.invariant import StepZero, step_zero
from prefopt.recipe import recipe_from_mapping
from prefopt.train import run_training


@dataclass(frozen=True)
class Job:
    """One training run of one trainer."""

    trainer: str
    """prefopt or TRL."""
    model: Path
    pairs: Path
    disk: Path
    """What the runs of a sweep share: caches."""
    output: Path
    max_length: int | None
    batch_size: int
    steps: int
    precomputed: bool = True
    """Reference log-probs from the cache or from precomputing; otherwise the reference in memory."""
    loss: str = "dpo"
    beta: float = 0.1
    learning_rate: float = 5e-7


@dataclass(frozen=True)
class Cost:
    """What the reference of one run computed, and the run's peak memory."""

    completions: int
    tokens: int
    """Completion tokens scored, by the trainer's own count."""
    positions: int
    """Positions through any embedding without a gradient, prompts and padding included; without the step-0 check."""
    check_positions: int
    """Those of prefopt's step-0 check."""
    mebibytes: float


def train(job: Job) -> Cost:
    """Train in this process, silently."""
    before = peak()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), counting() as positions:
        completions, tokens, checked = (train_prefopt if job.trainer == "prefopt" else train_trl)(job, positions)
    return Cost(completions, tokens, sum(positions) - checked, checked, peak() - before)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Collect the positions that pass any embedding while no gradient is recorded."""
    positions: list[int] = []

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and not torch.is_grad_enabled():
            positions.append(inputs[0].numel())

    handle = register_module_forward_pre_hook(look)
    try:
        yield positions
    finally:
        handle.remove()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def train_prefopt(job: Job, positions: list[int]) -> tuple[int, int, int]:
    """Return the completions and completion tokens that the reference scored, and the step-0 check's positions."""
    checked = 0

    def noted_check(*given: Any, **named: Any) -> StepZero:
        nonlocal checked
        before = sum(positions)
        found = step_zero(*given, **named)
        checked += sum(positions) - before
        return found

    os.environ["PREFOPT_CACHE"] = str(job.disk / "data")
    recipe = recipe_from_mapping(
        {
            "model": str(job.model),
            "data": {"train": str(job.pairs), "max_length": job.max_length, "eval_fraction": 0.0},
            "loss": {"name": job.loss, "beta": job.beta},
            "reference": {"cache": str(job.disk / "reference") if job.precomputed else "off"},
            "train": {
                "max_steps": job.steps,
                "batch_size": job.batch_size,
                "learning_rate": job.learning_rate,
                "precision": "fp32",
                "gradient_checkpointing": False,
                "token_budget": 2 * job.batch_size * (job.max_length or 1),  # all rows of a step at once, as TRL
            },
            "eval": {"samples": 0, "show": 0},
            "output": str(job.output),
        },
        name="benchmark",
    )
    with mock.patch("prefopt.train.step_zero", noted_check):
        reference = run_training(recipe, Console(quiet=True))["reference"]
    return reference["cache_misses"], reference["tokens_scored"], checked


class CountedTrainer(DPOTrainer):
    """TRL's trainer, which notes what its reference scores."""

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        """Note rows and completion tokens of the batch, then score it."""
        self.scored = getattr(self, "scored", [])
        self.scored.append((len(inputs["input_ids"]), int(inputs["completion_mask"][:, 1:].sum())))
        return super().compute_ref_log_probs(model, inputs)


def train_trl(job: Job, positions: list[int]) -> tuple[int, int, int]:
    """Return the completions and completion tokens that the reference scored, and 0: nothing else is checked."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    rows = datasets.load_dataset("json", data_files=str(job.pairs), split="train", cache_dir=str(job.disk / "data"))
    settings = DPOConfig(
        output_dir=str(job.output),
        max_length=job.max_length,
        loss_type=[{"dpo": "sigmoid"}.get(job.loss, job.loss)],
        beta=job.beta,
        learning_rate=job.learning_rate,
        precompute_ref_log_probs=job.precomputed,
        per_device_train_batch_size=job.batch_size,
        max_steps=job.steps,
        save_strategy="steps",
        save_steps=job.steps,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CountedTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    trainer.train()
    scored = getattr(trainer, "scored", [])
    return sum(completions for completions, _ in scored), sum(tokens for _, tokens in scored), 0
