"""The same training in prefopt's own loop and in TRL's, both in the order of the file.

Order: TRL has `train_sampling_strategy="sequential"`; prefopt's planner is given the identity for its permutation.
Adapters: both begin from the same numbers, drawn after the same seed. Quantized bases are quantized alike; what else
a quantized model is prepared with is each tool's own: prefopt's norms, embedding, head and adapters are fp32, TRL's
adapters are bf16 where training is. All else that is patched looks and changes nothing, except in two tools that are
not for sale: `prefopt-unshared` lays every prompt out once per completion, and `trl-precomputed-compact` scores
completion positions only, as TRL does on CUDA.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from speed_run import Clock, Job

CHOSEN = ("layout", "attention", "token_budget", "gradient_checkpointing")
"""What prefopt decides by itself, by its names in a run's result."""


def train(job: Job, clock: Clock) -> None:
    """Train with one tool in this process."""
    (train_prefopt if job["tool"].startswith("prefopt") else train_trl)(job, clock)


def train_prefopt(job: Job, clock: Clock) -> None:
    """Train with prefopt: its reference cached, scored before the first step; budget and layout as it chooses."""
    import numpy as np
    from rich.console import Console

    import prefopt.feed
    import prefopt.train
    from prefopt.planning import StepPlanner
    from prefopt.recipe import recipe_from_mapping
    from prefopt.tracking import Tracker

    log, order, open_reference = Tracker.log, StepPlanner._order, prefopt.train.open_reference
    make_batch = prefopt.feed.make_batch

    def noted_log(tracker: Tracker, step: int, metrics: Any) -> None:
        log(tracker, step, metrics)
        if "loss" in metrics:
            clock.tick(metrics["loss"])

    def order_of_the_file(planner: StepPlanner, epoch: int) -> Any:
        with mock.patch("numpy.random.default_rng", return_value=SimpleNamespace(permutation=np.arange)):
            return order(planner, epoch)

    def noted_batch(*given: Any, **named: Any) -> Any:
        batch = make_batch(*given, **named)
        prompts = sum(
            int(batch.input_ids[tree.start : tree.start + tree.prompt].sum()) * len(tree.branches)
            for tree in batch.trees
        )
        clock.note(len(batch.targets), prompts + int(batch.targets.sum()))
        return without_sharing(batch) if job["tool"] == "prefopt-unshared" else batch

    def timed_reference(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        opened = open_reference(*given, **named)
        clock.reference_s = time.perf_counter() - began
        return opened

    os.environ["PREFOPT_CACHE"] = job["output"] + "-cache"  # its own: every run scores its reference itself
    recipe: dict[str, Any] = {
        "model": {"path": job["model"], "quantization": job["quantization"], "dtype": job["held_in"]},
        "reference": {"quantization": job["quantization"]}, "loss": {"name": "dpo", "beta": job["beta"]},
        "data": {"train": job["pairs"], "max_length": job["max_length"], "eval_fraction": 0.0, "processes": 1},
        "adapter": {"rank": 16, "alpha": 32.0} if job["lora"] else None,
        "train": {"max_steps": job["steps"], "batch_size": job["batch"], "learning_rate": job["learning_rate"],
                  "precision": job["precision"], "schedule": "linear", "warmup": 0},
        "eval": {"samples": 0, "show": 0, "every": 0}, "checkpoint": {"every": 0}, "tracking": {"every": 1},
        "output": job["output"],
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tracker, "log", noted_log))
        stack.enter_context(mock.patch.object(StepPlanner, "_order", order_of_the_file))
        stack.enter_context(mock.patch("prefopt.feed.make_batch", noted_batch))
        stack.enter_context(mock.patch("prefopt.train.open_reference", timed_reference))
        clock.begin()
        prefopt.train.run_training(recipe_from_mapping(recipe, name="speed"), Console(quiet=True))
    result = json.loads((Path(job["output"]) / "result.json").read_text())
    clock.chosen = {name: result["train"][name] for name in CHOSEN}


def without_sharing(batch: Any) -> Any:
    """Lay the same pairs out with the prompt once for each completion: ragged rows that share nothing."""
    from prefopt.batching import Tree

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


def train_trl(job: Job, clock: Clock) -> None:
    """Train with TRL's DPOTrainer."""
    import datasets
    import transformers
    import trl.trainer.dpo_trainer
    import trl.trainer.utils
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    precomputed = job["tool"].startswith("trl-precomputed")
    exact: list[torch.Tensor] = []
    counted: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Ticks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                for seen in counted:
                    clock.note(*(int(each) for each in seen))
                clock.tick(sum(float(each) for each in exact))  # each is divided by their number
                counted.clear(), exact.clear()

    class NotedTrainer(DPOTrainer):
        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *given: Any, **named: Any) -> Any:
            ids, completion = inputs["input_ids"], inputs["completion_mask"]
            counted.append((completion[:, 1:].sum(), (ids * inputs["attention_mask"]).sum()))
            loss = super().training_step(model, inputs, *given, **named)
            exact.append(loss.detach())  # the log rounds it; read there, for reading waits for an accelerator
            return loss

        def _precompute_ref_logps(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            rows = super()._precompute_ref_logps(*given, **named)
            clock.reference_s = time.perf_counter() - began
            return rows

    def seeded_adapter(*given: Any, **named: Any) -> Any:
        torch.manual_seed(0)  # where prefopt's begins too
        return get_peft_model(*given, **named)

    settings: dict[str, Any] = {
        "output_dir": job["output"], "max_length": job["max_length"], "beta": job["beta"], "max_steps": job["steps"],
        "learning_rate": job["learning_rate"], "lr_scheduler_type": "linear", "warmup_steps": 0, "seed": 0,
        "optim": "adamw_torch_fused", "per_device_train_batch_size": job["trl_micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["trl_micro_batch"], "bf16": job["precision"] == "bf16",
        "gradient_checkpointing": job["trl_checkpointing"], "precompute_ref_log_probs": precomputed,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
        "use_cpu": job["device"] == "cpu", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if job["lora"] else None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trl.trainer.dpo_trainer, "get_peft_model", seeded_adapter))
        if job["tool"].endswith("compact"):  # this name is asked by the head's choice of positions and by nothing else
            stack.enter_context(mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True))
        clock.begin()
        rows = datasets.load_dataset("json", data_files=job["pairs"], split="train", cache_dir=job["output"] + "-data")
        trainer = NotedTrainer(
            model=model_for_trl(job),
            args=DPOConfig(**settings), train_dataset=rows, callbacks=[Ticks()], peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )  # fmt: skip
        trainer.train()


def model_for_trl(job: Job) -> Any:
    """Load the model in prefopt's dtype; on a CPU, bitsandbytes' products without gradient are kept out of both."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from prefopt.quantization import expand_on_cpu, quantization_settings

    dtype = torch.float32 if job["held_in"] == "auto" else getattr(torch, job["held_in"])
    if job["quantization"] == "none":
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    compute = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    settings = BitsAndBytesConfig(**quantization_settings(job["quantization"], compute))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, quantization_config=settings)
    expand_on_cpu(model)
    return model


class Turns:
    """Lets threads run one at a time, each until it passes its turn on."""

    def __init__(self, count: int) -> None:
        self.doors = [threading.Semaphore(0) for _ in range(count)]
        self.present = list(range(count))
        self.doors[0].release()

    def enter(self, own: int) -> None:
        """Wait for the turn."""
        self.doors[own].acquire()

    def pass_on(self, own: int) -> None:
        """Let the next one run, and wait."""
        self.doors[self._after(own)].release()
        self.enter(own)

    def leave(self, own: int) -> None:
        """Let the next one run, for good."""
        following = self._after(own)
        self.present.remove(own)
        self.doors[following].release()

    def _after(self, own: int) -> int:
        return self.present[(self.present.index(own) + 1) % len(self.present)]


def interleave(job: Job) -> dict[str, Clock]:
    """Train with several tools in this process, step by step in turn; only the first may be prefopt's loop."""
    from accelerate.state import AcceleratorState

    tools: list[str] = job["tool"]
    turns = Turns(len(tools))
    clocks = {tool: Clock(job, lambda number=number: turns.pass_on(number)) for number, tool in enumerate(tools)}
    failed: list[BaseException] = []

    def work(number: int) -> None:
        own = {**job, "tool": tools[number], "output": f"{job['output']}-{number}"}
        turns.enter(number)
        try:
            AcceleratorState._reset_state()  # prefopt asks accelerate for no mixed precision, TRL for bf16
            train(own, clocks[tools[number]])
        except BaseException as error:
            failed.append(error)
        turns.leave(number)

    others = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(1, len(tools))]
    for thread in others:
        thread.start()
    work(0)  # in the main thread, for it handles signals
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]
    return clocks
