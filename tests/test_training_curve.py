"""Loss, margin and gradient norm of every step of small fixed runs are what they were when the curves were written.

The curves stand in `tests/curves`. They are written anew, after a change that is meant to move them, by

    python tests/test_training_curve.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from world import make_recipe, quiet

from prefopt.tracking import read_metrics
from prefopt.train import run_training

CURVES = Path(__file__).parent / "curves"
COLUMNS = ("loss", "rewards/margins", "grad_norm")
HEADER = """\
# {name}: tiny Llama of tests/tiny.py, 60 pairs of tests/world.py, seed 0, fp32, CPU, one thread. Read and explained by
# tests/test_training_curve.py; written anew by: python tests/test_training_curve.py
# step {columns}
"""
RUNS = {
    "dpo": {},
    "dpo_lora": {"adapter": {"rank": 4}, "train": {"learning_rate": 3e-3}},
    "ipo": {"loss": {"name": "ipo", "beta": 0.3}},
}
STEPS = 12

# A log-prob of 40 nats in fp32 is known to 4e-6, whatever its order of summation; a margin is a tenth of the
# difference of four of them, and Adam carries what remains from step to step. Between SSE, AVX2 and AVX-512, one and
# two threads and the options below, at most a quarter of this was seen.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

SPEED = {
    "one row per completion": {"model": {"attention": "unshared"}},
    "many micro-batches": {"train": {"token_budget": 40}},
    "activations recomputed": {"train": {"gradient_checkpointing": True}},
    "a reference in every step": {"reference": {"cache": "off"}},
}


def curve(folder: Path, name: str, **changes: dict) -> torch.Tensor:
    """(steps, columns) of a run."""
    run = {section: {**value} for section, value in RUNS[name].items()}
    for section, value in changes.items():
        run[section] = {**run.get(section, {}), **value}
    run["train"] = {"max_steps": STEPS, **run.get("train", {})}
    if "model" in run:
        run["model"] = {"path": str(make_recipe(folder).model.path), **run["model"]}
    recipe = make_recipe(
        folder,
        eval={"every": STEPS, "samples": 0},
        checkpoint={"every": STEPS},
        seed=0,
        output=str(folder / name),
        **run,
    )
    run_training(recipe, quiet())
    lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[line[column] for column in COLUMNS] for line in lines], dtype=torch.float64)


def written(name: str) -> torch.Tensor:
    lines = (CURVES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    rows = [[float(word) for word in line.split()] for line in lines if not line.startswith("#")]
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor(rows, dtype=torch.float64)[:, 1:]


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_run_takes_the_steps_that_were_written_down(tmp_path, name):
    torch.testing.assert_close(curve(tmp_path, name), written(name), **TOLERANCE)


@pytest.mark.parametrize("option", SPEED)
@pytest.mark.parametrize("name", ["dpo", "dpo_lora"])
def test_no_choice_made_for_speed_or_memory_moves_the_curve(tmp_path, name, option):
    torch.testing.assert_close(curve(tmp_path, name, **SPEED[option]), written(name), **TOLERANCE)


def test_the_curves_tell_runs_apart_and_learn():
    """A tolerance that another learning rate or another loss would pass proves nothing."""
    dpo, lora, ipo = (written(name) for name in RUNS)
    for one, other in ((dpo, lora), (dpo, ipo)):
        assert float((one - other)[1:].abs().max()) > 1e3 * TOLERANCE["atol"]
    assert float(dpo[-1, 0]) < float(dpo[0, 0])


def write_curves() -> None:
    torch.set_num_threads(1)
    CURVES.mkdir(exist_ok=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PREFOPT_CACHE"] = str(Path(folder) / "cache")
            rows = curve(Path(folder), name).tolist()
        lines = [f"{step} " + " ".join(f"{value:.9g}" for value in row) for step, row in enumerate(rows, 1)]
        text = HEADER.format(name=name, columns=" ".join(COLUMNS)) + "\n".join(lines) + "\n"
        (CURVES / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_curves()
