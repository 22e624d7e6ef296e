"""Folders of runs that look finished, written in milliseconds: what a report reads, with results of one's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prefopt.held_out import HeldOut, write_held_out
from prefopt.recipe import recipe_from_mapping
from prefopt.run_folder import recipe_text, write_json, write_lines

PROMPTS = 60


def finished_run(
    folder: Path,
    *,
    loss: object = "dpo",
    seed: int = 0,
    skill: float = 0.5,
    chance: Callable[[int], np.random.Generator] = np.random.default_rng,
    prompts: int = PROMPTS,
    data: str = "pairs.jsonl",
    answer: str = "an answer",
    gold: bool = False,
    **train: object,
) -> Path:
    """Write a run that ranks each held-out pair rightly with the probability `skill`."""
    folder.mkdir(parents=True)
    recipe = recipe_from_mapping(
        {
            "model": "some/model",
            "data": {"train": data},
            "loss": loss,
            "seed": seed,
            "train": {"max_steps": 10, **train},
            "eval": {"gold_reward": "sandbox" if gold else None},
            "output": str(folder),
        },
        name="test",
    )
    generator = chance(seed)
    right = generator.random(prompts) < skill
    rows = [
        HeldOut(
            prompt=f"{number:016x}", group=number, comparison=0, chosen_tokens=10 + number % 3, rejected_tokens=12,
            chosen_logratio=-0.5, rejected_logratio=-1.0 if good else 0.0, margin=0.05 if good else -0.05,
            correct=float(good),
        )
        for number, good in enumerate(right)
    ]  # fmt: skip
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    write_held_out(folder / "held_out.parquet", rows)
    samples = [
        {
            "prompt": f"question {number}",
            "reference": "one two three four five one two three four",
            "policy": answer,
            "gold_reward": {"reference": 0.0, "policy": float(good) if gold else None},
            "tokens": {"reference": 9, "policy": 3},
            "finished": {"reference": True, "policy": False},
        }
        for number, good in enumerate(right)
    ]
    write_lines(folder / "samples.jsonl", samples)
    measures = {
        "loss": 0.6, "accuracy": float(right.mean()), "margin": 0.1, "kl": 2.0, "kl_standard_error": 0.1,
        "chosen_drift_per_token": -0.3, "rejected_drift_per_token": -0.6, "displacement": 0.7, "length": 3.0,
        "finished": 0.0, "comparisons": prompts,
    }  # fmt: skip
    if gold:
        measures["gold_reward"] = {"reference": 0.0, "policy": float(right.mean())}
    lines = []
    for step in (0, 5, 10):
        lines.append({"step": step, **{f"eval/{k}": v * step / 10 for k, v in measures.items() if k != "gold_reward"}})
        if gold:
            lines[-1]["eval/gold_reward/policy"] = step / 10
        lines.append({"step": step + 1, "loss": 0.6, "learning_rate": 1e-5, "grad_norm": 0.5 + step})
    write_lines(folder / "metrics.jsonl", lines)
    train_part = {"loss": 0.6, "comparisons": 640, "seconds": 12.0, "computed_tokens_per_second": 1000.0,
                  "peak_memory_bytes": 2**30}  # fmt: skip
    write_json(folder / "result.json", {"status": "finished", "steps": 10, "train": train_part, "eval": measures,
                                        "reference": {"tokens_scored": 0}})  # fmt: skip
    return folder


def finished_sweep(folder: Path, runs: dict[str, dict], *, notes: tuple[str, ...] = ()) -> Path:
    """Write a sweep of such runs: label -> what `finished_run` takes; None instead of it is a run that failed."""
    (folder / "status").mkdir(parents=True)
    entries = []
    for label, facts in runs.items():
        failed, state = facts.pop("failed", None), facts.pop("state", "failed")
        finished_run(folder / "runs" / label, **facts)
        if failed:
            (folder / "runs" / label / "result.json").unlink()
            status = {"state": state, "reason": failed, "exit": 2, "seconds": 3.0}
            (folder / "status" / f"{label}.json").write_text(json.dumps(status))
        entries.append({"label": label, "changes": {}, "folder": f"runs/{label}"})
    content = {"name": folder.name, "commands": ["prefopt sweep mine"], "notes": list(notes), "runs": entries}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder
