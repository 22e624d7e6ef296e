"""Metrics reach every sink that a recipe asks for, once each."""

from __future__ import annotations

import builtins

import pytest
from world import make_recipe, train

from prefopt.errors import RecipeError
from prefopt.tracking import Tracker, read_metrics


def test_lines_after_the_step_a_run_resumes_at_are_written_again_and_not_twice(tmp_path):
    recipe = make_recipe(tmp_path)
    first = Tracker(tmp_path, recipe, resumed_at=-1, resolved={})
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = Tracker(tmp_path, recipe, resumed_at=2, resolved={})
    second.log(3, {"loss": 9.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 9.0),
    ]


def test_the_last_lines_are_found_without_reading_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)) + '{"step": 10')
    assert [line["step"] for line in read_metrics(file, last=40)] == [998, 999]
    assert read_metrics(file, last=10**6) == read_metrics(file)


def test_a_sink_that_is_not_installed_is_said(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"tracking\.tensorboard"):
        train(tmp_path, tracking={"tensorboard": True})


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path):
    train(tmp_path, tracking={"wandb": "offline"})
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
