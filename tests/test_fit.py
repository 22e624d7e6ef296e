"""Data, loss, recipe and models that do not go together are refused before any model loads, with every reason."""

from __future__ import annotations

import json
import random

import pytest
from world import WORDS, make_model, make_pairs, make_recipe, quiet

from prefopt.errors import DataError, ModelError, RecipeError, UserError
from prefopt.train import run_training

SCORED = {"chosen_score": 2.0, "rejected_score": 1.0}


@pytest.fixture(autouse=True)
def no_model_loads(monkeypatch):
    def crash(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("prefopt.reference.opening.load_model", crash)
    monkeypatch.setattr("prefopt.policy.load_model", crash)


def refused(folder, error=DataError, **changes) -> dict[str, str]:
    """What was refused, by where it stands; each problem says what to do."""
    with pytest.raises(UserError) as refusal:
        run_training(make_recipe(folder, **changes), quiet())
    assert refusal.type is error
    assert all(problem.expected and problem.fix for problem in refusal.value.problems)
    return {problem.where: f"{problem.expected}; {problem.given}; {problem.fix}" for problem in refusal.value.problems}


def edited(file, change, rows=20):
    """Pairs with scores and a value, changed row by row (counted from 1)."""
    make_pairs(file, rows, **SCORED, value=0.5)
    lines = [change(number, json.loads(line)) for number, line in enumerate(file.read_text().splitlines(), start=1)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_what_is_taken_over_several_examples_needs_them_in_both_sets(tmp_path):
    held_out = {"eval": str(make_pairs(tmp_path / "held.jsonl", 1, seed=1)), "eval_fraction": 0.0}
    found = refused(tmp_path, loss="aot", data=held_out)
    assert found.keys() == {"data.eval"}
    assert "at least 2 comparisons" in found["data.eval"]
    make_pairs(tmp_path / "pairs.jsonl", 3)
    epochs = {"max_steps": None, "epochs": 0.3}
    assert refused(tmp_path, loss="aot", data={"eval_fraction": 0.0}, train=epochs).keys() == {"data.train"}


def test_one_prompt_has_no_partner_and_its_set_is_named_beside_everything_else(tmp_path):
    held_out = make_pairs(tmp_path / "held.jsonl", 3)
    lines = [{**json.loads(line), "prompt": "w1"} for line in held_out.read_text().splitlines()]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"eval": str(held_out), "eval_fraction": 0.0}
    found = refused(tmp_path, loss="kto", data=data, train={"dropout": True}, adapter={"rank": 2, "dropout": 0.1})
    assert found.keys() == {"data.eval", "train.dropout", "adapter.dropout"}
    assert "different prompts" in found["data.eval"]


def test_values_come_with_every_row_or_are_learned(tmp_path):
    def some(number, row):
        return row if number % 2 else row | {"value": None}

    edited(tmp_path / "pairs.jsonl", some)
    found = refused(tmp_path, loss="dro", data={"eval_fraction": 0.0})
    assert "10 rows without" in found["data.train"]
    assert "V(x) is then learned" in found["data.train"]
    edited(tmp_path / "pairs.jsonl", lambda _, row: row)
    held_out = edited(tmp_path / "held.jsonl", lambda _, row: row | {"value": None})
    assert refused(tmp_path, loss="dro", data={"eval": held_out, "eval_fraction": 0.0}).keys() == {"data.eval"}


def test_scores_that_the_loss_refuses_are_named_by_row_beside_those_that_are_missing(tmp_path):
    def wrong(number, row):
        if number in (3, 7):
            return row | {"chosen_score": 0.0}
        return row | {"chosen_score": None} if number == 5 else row

    edited(tmp_path / "pairs.jsonl", wrong)
    with pytest.raises(DataError) as refusal:
        run_training(make_recipe(tmp_path, loss="odpo", data={"eval_fraction": 0.0}), quiet())
    missing, order = refusal.value.problems
    assert missing.given == "1 rows without"
    assert order.given == "others in rows 3, 7"
    assert "at least rejected_scores" in order.expected


def test_the_same_scores_are_no_problem_to_a_loss_that_takes_any(tmp_path):
    edited(tmp_path / "pairs.jsonl", lambda _, row: row | {"chosen_score": 0.0})
    recipe = make_recipe(tmp_path, loss="rpo_bwd_kl", checkpoint={"best": "eval.nonsense"})
    with pytest.raises(RecipeError, match=r"checkpoint\.best"):  # the next thing that is looked at
        run_training(recipe, quiet())


def test_a_metric_that_nobody_measures_is_refused_before_the_reference_is_scored(tmp_path):
    assert refused(tmp_path, RecipeError, checkpoint={"best": "eval.nonsense"}).keys() == {"checkpoint.best"}


def test_whole_distributions_are_compared_over_one_vocabulary(tmp_path):
    reference = {"model": str(make_model(tmp_path / "padded", vocab_size=64))}
    found = refused(tmp_path, ModelError, loss="tdpo1", reference=reference)
    assert "61 rows" in found["reference.model"]
    assert "64 rows" in found["reference.model"]


def test_a_prompt_with_the_completion_of_another_one_fits_into_the_positions(tmp_path):
    """A long prompt with a short completion, and the other way round: their rows fit, their partners do not."""
    make_model(tmp_path / "base", max_position_embeddings=40)
    generator = random.Random(0)

    def words(count):
        return " ".join(generator.choices(WORDS, k=count))

    sizes = [(30, 3), (3, 30)] * 4
    lines = [{"prompt": words(size), "chosen": words(side), "rejected": words(side)} for size, side in sizes]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"data": {"eval_fraction": 0.0}, "eval": {"samples": 0}}
    assert "40 tokens" in refused(tmp_path, ModelError, loss="kto", **settings)["data.max_length"]
