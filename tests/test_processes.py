"""Whole runs as processes: several at once, killed at any moment, interrupted from the keyboard."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from world import make_pairs, make_recipe

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def environment(cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "losses")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PREFOPT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def write_recipe(folder: Path, **changes: object) -> Path:
    file = folder / "test.yaml"
    file.write_text(make_recipe(folder, **changes).to_yaml())
    return file


def command(recipe: Path, output: Path, *launcher: str) -> list[str]:
    start = list(launcher) or [sys.executable]
    return [*start, "-m", "prefopt", "train", str(recipe), f"output={output}"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_two_processes_train_what_one_does(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 6, "token_budget": 60})
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    for name, launcher in (("one", ()), ("two", launch)):
        subprocess.run(
            command(recipe, tmp_path / name, *launcher),
            check=True,
            capture_output=True,
            env=environment(tmp_path / "cache"),
        )
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5, msg=name)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    # Lose the end of the two-process run, and let two processes go on from the checkpoint before it.
    (tmp_path / "two" / "result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "two" / "checkpoints").glob("step-*"))[-1])
    subprocess.run(
        command(recipe, tmp_path / "two", *launch), check=True, capture_output=True, env=environment(tmp_path / "cache")
    )
    again = weights(tmp_path / "two")
    assert all(torch.equal(two[name], again[name]) for name in two)


@pytest.mark.parametrize("name", ["kto", "aot", "bco", [{"name": "dro"}, {"name": "kto"}]], ids=str)
def test_a_loss_over_the_whole_step_is_the_same_in_two_processes(tmp_path, name):
    """A step of five pairs in micro-batches of one or two: the second process has a spare one.

    DRO beside KTO: a value head is trained too, of which the spare one must know.
    """
    make_pairs(tmp_path / "pairs.jsonl", chosen_score=2.0, rejected_score=1.0)
    train = {"max_steps": 4, "batch_size": 5, "token_budget": 60}
    recipe = write_recipe(tmp_path, loss=name, train=train, eval={"every": 2, "samples": 0})
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    for output, launcher in (("one", ()), ("two", launch)):
        ran = subprocess.run(
            command(recipe, tmp_path / output, *launcher),
            capture_output=True,
            text=True,
            env=environment(tmp_path / "cache"),
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=2e-5, msg=key)
    results = [json.loads((tmp_path / output / "result.json").read_text()) for output in ("one", "two")]
    assert results[0]["train"]["loss"] == pytest.approx(results[1]["train"]["loss"], rel=1e-5)
    states = [
        json.loads((sorted((tmp_path / output / "checkpoints").iterdir())[-1] / "state.json").read_text())["loss_state"]
        for output in ("one", "two")
    ]
    assert states[0] == pytest.approx(states[1], rel=1e-5)


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 60}, checkpoint={"every": 5}, eval={"every": 20})
    env = environment(tmp_path / "cache")
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True, env=env)
    generator = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen(
            command(recipe, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
        )
        time.sleep(generator.uniform(4, 12))
        child.kill()
        child.wait()
    subprocess.run(command(recipe, tmp_path / "killed"), check=True, capture_output=True, env=env)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["eval"] == results[1]["eval"]


def test_ctrl_c_exits_with_130_and_leaves_a_checkpoint(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 5000}, checkpoint={"every": 0}, eval={"every": 0})
    child = subprocess.Popen(
        command(recipe, tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp_path / "cache"),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130, output
    assert "Traceback" not in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
