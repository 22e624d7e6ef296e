"""The loop gives every loss what it needs: whole steps, tokens, distributions, lists, partners, scores."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from published.records import make_lists, make_record
from rich.console import Console
from safetensors.torch import load_file
from world import WORDS, make_pairs, make_recipe, quiet

import prefopt.train as loop
from prefopt.checkpoint import latest_state
from prefopt.errors import DataError, Interrupted, ModelError
from prefopt.evaluate_run import evaluate_run
from prefopt.preflight import check_recipe
from prefopt.step_record import from_all_processes, joined, step_gradients, without_effect
from prefopt.tracking import read_metrics
from prefopt.train import run_training
from prefopt_losses import METHODS, LogProbs, get_loss

COUPLED = [name for name in METHODS if get_loss(name).needs.batch]
DEMANDING = [*COUPLED, "wpo", "tdpo1", "tdpo2", "ld_dpo", "sampo", "d2po", "rrhf", "plackett_luce_dpo", "infonca"]
"""One micro-batch and several must train the same policy; these are the ones for which that is not plain."""
OTHERS = [name for name in METHODS if name not in DEMANDING]


def make_rows(file, rows=40, seed=0):
    """Pairs with everything that data can bring."""
    generator = random.Random(seed)

    def text(low, high):
        return " ".join(generator.choice(WORDS[low:high]) for _ in range(generator.randint(2, 12)))

    lines = []
    for _ in range(rows):
        score = generator.random()
        row = {
            "prompt": text(0, 57),
            "chosen": text(0, 35),
            "rejected": text(20, 57),
            "gold": text(0, 20),
            "preference_probability": 0.5 + generator.random() / 2,
            "chosen_score": [score + 0.1 + generator.random(), score + 0.2],
            "rejected_score": [score, score + 0.1],
            "value": generator.random(),
        }
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file


def make_ranked(file, rows=24, seed=0):
    generator = random.Random(seed)
    lines = []
    for _ in range(rows):
        count = generator.randint(2, 4)
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(count)]
        row = {
            "prompt": " ".join(generator.choices(WORDS, k=4)),
            "completions": texts,
            "scores": generator.sample(range(9), count),
        }
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file


def settings(name):
    """One reward model's scores where the loss does not ask for several."""
    return {"loss": name, "train": {"max_steps": 2, "batch_size": 8, "max_grad_norm": None, "optimizer": SGD}}


SGD = {"name": "adamw", "eps": 1.0}
"""Adam with so large an epsilon that a step is nearly linear in the gradient, as comparisons of gradients want."""


def train_with(folder, name, **train):
    make_rows(folder / "pairs.jsonl")
    changes = settings(name)
    changes["train"] |= train
    recipe = make_recipe(folder, **changes, eval={"every": 2, "samples": 0}, output=str(folder / f"run-{len(train)}"))
    result = run_training(recipe, quiet())
    return result, load_file(folder / f"run-{len(train)}" / "model" / "model.safetensors")


def assert_trains(result, name):
    assert result["status"] == "finished"
    assert result["steps"] == 2
    assert torch.tensor(result["train"]["loss"]).isfinite(), name
    assert torch.tensor(result["eval"]["loss"]).isfinite(), name


@pytest.mark.parametrize("name", DEMANDING)
def test_one_micro_batch_and_several_train_the_same_policy(name, tmp_path):
    together, whole = train_with(tmp_path, name)
    apart, pieces = train_with(tmp_path, name, token_budget=64)
    assert_trains(together, name)
    assert together["eval"]["loss"] == pytest.approx(apart["eval"]["loss"], rel=1e-4, abs=1e-6)
    assert together["train"]["loss"] == pytest.approx(apart["train"]["loss"], rel=1e-4, abs=1e-6)
    start = load_file(tmp_path / "base" / "model.safetensors")
    moved = torch.cat([(whole[key] - start[key]).flatten() for key in start])
    other = torch.cat([(pieces[key] - start[key]).flatten() for key in start])
    assert moved.norm() > 0
    assert (moved - other).norm() <= 1e-3 * moved.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method_trains(name, tmp_path):
    assert_trains(train_with(tmp_path, name)[0], name)


@pytest.mark.parametrize("name", ["dpo", "plackett_luce_dpo", "rrhf"])
def test_ranked_data_train_losses_of_pairs_and_of_lists(name, tmp_path):
    make_ranked(tmp_path / "pairs.jsonl")
    recipe = make_recipe(tmp_path, **settings(name), eval={"every": 2, "samples": 0})
    result = run_training(recipe, quiet())
    assert_trains(result, name)
    assert 0 <= result["eval"]["accuracy"] <= 1


@pytest.mark.parametrize("name", ["kto", "bco", "dro"])
def test_unpaired_feedback_trains_losses_of_single_completions(name, tmp_path):
    rows = [json.loads(line) for line in make_rows(tmp_path / "rows").read_text().splitlines()]
    lines = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "score": 0.5, "value": 0.1}
        for row, side in zip(rows, ["chosen", "rejected"] * 20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_training(make_recipe(tmp_path, **settings(name), eval={"every": 2, "samples": 0}), quiet())
    assert_trains(result, name)


def test_what_a_loss_carries_survives_an_interruption_and_no_evaluation_moves_it(tmp_path, monkeypatch):
    make_rows(tmp_path / "pairs.jsonl")
    changes = {"loss": "bco", "checkpoint": {"every": 1, "keep": 9}, "train": {"max_steps": 4, "batch_size": 8}}

    def states(output, every):
        recipe = make_recipe(tmp_path, **changes, eval={"every": every, "samples": 0}, output=str(tmp_path / output))
        run_training(recipe, quiet())
        folders = sorted((tmp_path / output / "checkpoints").iterdir())
        return [json.loads((folder / "state.json").read_text())["loss_state"] for folder in folders]

    seldom, often = states("seldom", 4), states("often", 1)
    assert seldom == often
    assert len({json.dumps(state) for state in often}) == 4

    take_step = loop._optimizer_step

    def stopping(run, *rest):
        run.stopping = run.state.step == 1
        return take_step(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimizer_step", stopping)
        with pytest.raises(Interrupted):
            states("broken", 4)
    assert latest_state(tmp_path / "broken")[1].loss_state == seldom[1]
    assert states("broken", 4) == seldom


def test_a_last_step_too_small_for_the_loss_is_left_out(tmp_path):
    make_rows(tmp_path / "pairs.jsonl", rows=17)
    changes = {"loss": "aot", "data": {"eval_fraction": 0.0}}
    recipe = make_recipe(tmp_path, **changes, train={"max_steps": None, "epochs": 1, "batch_size": 8})
    assert run_training(recipe, quiet())["steps"] == 2


def test_what_data_or_recipe_cannot_give_a_loss_is_said_before_any_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.run.load_policy", lambda *_: pytest.fail("a model was loaded"))
    cases = [
        ({"loss": "odpo"}, "chosen_score and rejected_score in every row"),
        ({"loss": "dro"}, "chosen_score and rejected_score in every row"),
        ({"loss": "a_star_po"}, "value in every row"),
        ({"loss": "tpo"}, "gold in every row"),
        ({"loss": "aot", "train": {"batch_size": 1}}, "train.batch_size: at least 2"),
        ({"loss": "kto", "train": {"dropout": True}}, "no dropout: kto couples"),
        ({"loss": "tdpo2", "reference": {"cache": str(tmp_path / "cache")}}, "which no cache holds"),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            run_training(make_recipe(tmp_path, **changes), quiet())


def test_dro_learns_the_value_that_the_data_do_not_bring(tmp_path):
    """V(x) starts at 0 and moves towards the mean score; what was learned is saved, resumed and evaluated."""
    rows = [json.loads(line) for line in make_rows(tmp_path / "rows").read_text().splitlines()]
    kept = ("prompt", "chosen", "rejected")
    lines = [{key: row[key] for key in kept} | {"chosen_score": 3.0, "rejected_score": 1.0} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = {"max_steps": 200, "batch_size": 8, "learning_rate": 1e-6}
    recipe = make_recipe(tmp_path, loss="dro", train=train, eval={"every": 50, "samples": 2, "max_new_tokens": 4})
    result = run_training(recipe, quiet())
    logged = [row["eval/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row]
    assert logged[0] == pytest.approx((3**2 + 1**2) / 2, rel=1e-3)  # V = 0 and policy = reference
    assert logged[-1] < 0.7 * logged[0]  # V = 2 would leave (1 + 1) / 2
    assert evaluate_run(tmp_path / "run", quiet())["loss"] == pytest.approx(result["eval"]["loss"], rel=1e-5)
    assert "value_head.weight" not in load_file(tmp_path / "run" / "model" / "model.safetensors")


def scored_pairs(folder, **columns):
    """Pairs with equal scores everywhere, and the columns given."""
    return make_pairs(folder / "pairs.jsonl", 40, chosen_score=3.0, rejected_score=1.0, **columns)


def test_a_value_head_is_clipped_apart_from_the_policy(tmp_path):
    """V = 0 is where a value head starts: the policy's first step is the one that values of 0 in the data give."""
    scored_pairs(tmp_path)
    changes = {"loss": "dro", "data": {"eval_fraction": 0.0}, "train": {"max_steps": 1, "max_grad_norm": 0.01}}
    run_training(make_recipe(tmp_path, **changes), quiet())
    scored_pairs(tmp_path, value=0.0)
    run_training(make_recipe(tmp_path, **changes, output=str(tmp_path / "given")), quiet())
    learned, given = (read_metrics(tmp_path / name / "metrics.jsonl")[-1]["grad_norm"] for name in ("run", "given"))
    assert learned == pytest.approx(given, rel=1e-4)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "given"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6, msg=key)


def test_where_values_are_learned_no_other_values_are_read(tmp_path):
    scored_pairs(tmp_path)
    held_out = make_pairs(tmp_path / "held.jsonl", 6, seed=3, chosen_score=3.0, rejected_score=1.0, value=50.0)
    data = {"eval": str(held_out), "eval_fraction": 0.0}
    run_training(make_recipe(tmp_path, loss="dro", data=data, eval={"samples": 0}), quiet())
    start = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["eval/loss"]
    assert start == pytest.approx((3**2 + 1**2) / 2, rel=1e-3)  # V = 0 and policy = reference


def test_before_the_first_step_a_loss_has_carried_nothing(tmp_path, monkeypatch):
    """AlphaDPO divides by a carried deviation, which starts at 0: the first look takes that of the held-out data."""
    given = []
    measure = loop.measure

    def noted(evaluator, policy, wrote, carried, **rest):
        given.append(carried)
        return measure(evaluator, policy, wrote, carried, **rest)

    monkeypatch.setattr(loop, "measure", noted)
    run_training(make_recipe(tmp_path, loss="alpha_dpo", eval={"every": 3, "samples": 0}), quiet())
    assert given[0] is None
    assert all(set(carried) == set(get_loss("alpha_dpo").needs.state) for carried in given[1:])


def test_a_run_is_evaluated_with_the_numbers_that_its_loss_carried_or_not_at_all(tmp_path):
    train = {"learning_rate": 1e-2, "max_steps": 6}
    result = run_training(make_recipe(tmp_path, loss="bco", train=train, eval={"samples": 0}), quiet())
    assert evaluate_run(tmp_path / "run", quiet())["loss"] == pytest.approx(result["eval"]["loss"], rel=1e-6)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ModelError, match="bco_mean_logratio"):
        evaluate_run(tmp_path / "run", quiet())


def test_check_counts_lists_where_the_loss_does(tmp_path):
    make_ranked(tmp_path / "pairs.jsonl")
    console = Console(record=True, width=200, file=io.StringIO())
    check_recipe(make_recipe(tmp_path, loss="infonca"), console)
    assert re.search(r"step +8 lists of \d\d comparisons", console.export_text())


def test_tdpo_computes_its_reference_in_every_step(tmp_path):
    make_rows(tmp_path / "pairs.jsonl")
    result = run_training(make_recipe(tmp_path, **settings("tdpo2"), eval={"every": 2, "samples": 0}), quiet())
    assert result["reference"]["cache_misses"] == result["reference"]["cache_hits"] == 0


@pytest.mark.parametrize("name", ["dpo", "aot", "kto", "plackett_luce_dpo", "tpo"])
def test_the_gradient_of_a_step_in_its_log_probs_is_that_of_the_whole(name):
    loss = get_loss(name)
    parts = [make_lists(sizes=(2, 3), seed=s) if loss.needs.lists else make_record(batch=3, seed=s) for s in range(3)]
    whole = joined(parts)
    units = 6 if loss.needs.lists else 9
    losses, slopes, _ = step_gradients(loss, parts, units, own=range(3), check=True)
    assert torch.equal(losses, loss(whole))
    field = "logps" if loss.needs.lists else "chosen_logps"
    leaf = getattr(whole, field).clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(replace(whole, **{field: leaf})).mean(), leaf)
    torch.testing.assert_close(torch.cat([slope[field] for slope in slopes]), expected)


def test_a_spare_micro_batch_reaches_every_parameter_and_moves_none():
    names = ("chosen_logps", "rejected_logps", "values", "gold_logps", "chosen_sequential_kl")
    leaves = {name: torch.randn(3, requires_grad=True) for name in names}
    without_effect(LogProbs(**leaves)).backward()
    assert all(torch.equal(leaf.grad, torch.zeros(3)) for leaf in leaves.values())


def test_alone_a_process_gathers_its_own_records():
    parts = [make_record(batch=2), make_record(batch=3)]
    assert from_all_processes(parts) == (parts, 0)
