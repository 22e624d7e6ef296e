"""`key=value` on the command line changes exactly what it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import RecipeError
from prefopt.recipe import Source, load_recipe


def problem_of(*overrides: str, recipe: str = "dpo") -> Any:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture
def words(tmp_path: Path) -> str:
    """Return a file that uses every shorthand."""
    path = tmp_path / "words.yaml"
    path.write_text("model: a/b\ndata: {train: c/d}\nloss: dpo\ntrain: {optimizer: adamw_8bit}\n")
    return str(path)


def test_values_are_yaml() -> None:
    recipe = load_recipe("dpo", ["train.learning_rate=5e-6", "eval.every=null", "tracking.wandb=offline", "seed=3"])
    assert (recipe.train.learning_rate, recipe.eval.every) == (5e-6, None)
    assert (recipe.tracking.wandb, recipe.seed) == ("offline", 3)
    columns = load_recipe("dpo", ["data.columns={chosen: best, rejected: worst}"]).data.columns
    assert columns == {"chosen": "best", "rejected": "worst"}


def test_the_value_may_hold_an_equals_sign() -> None:
    assert load_recipe("dpo", ["output=runs/beta=0.1"]).output == "runs/beta=0.1"


def test_a_name_replaces_the_whole_loss_and_a_key_changes_one_number(words: str) -> None:
    assert load_recipe("simpo", ["loss=dpo"]).loss == load_recipe("dpo").loss
    assert load_recipe(words, ["loss.beta=0.2"]).loss[0]["beta"] == 0.2
    both = load_recipe("simpo", ["loss=ipo", "loss.beta=0.3"]).loss
    assert (both[0]["name"], both[0]["beta"]) == ("ipo", 0.3)


def test_a_word_opens_into_a_mapping_when_a_key_of_it_is_set(words: str) -> None:
    recipe = load_recipe(words, ["model.dtype=bfloat16", "train.optimizer.weight_decay=0.1", "adapter.rank=4"])
    assert (recipe.model.path, recipe.model.dtype) == ("a/b", "bfloat16")
    assert (recipe.train.optimizer.name, recipe.train.optimizer.weight_decay) == ("adamw_8bit", 0.1)
    assert recipe.adapter is not None
    assert recipe.adapter.rank == 4


def test_a_word_replaces_a_whole_mapping() -> None:
    assert load_recipe("lora-7b").model.dtype == "bfloat16"
    replaced = load_recipe("lora-7b", ["model=another/model"]).model
    assert (replaced.path, replaced.dtype) == ("another/model", "auto")


def test_entries_of_a_list_have_numbers(words: str) -> None:
    assert load_recipe(words, ["data.train.0.weight=2.0"]).data.train == [Source(path="c/d", weight=2.0)]
    listed = ["data.train=[a/b, {path: c/d}]", "data.train.1.split=test"]
    assert load_recipe(words, listed).data.train == ["a/b", Source(path="c/d", split="test")]
    sums = load_recipe(words, ["loss=[dpo, {name: sft, weight: 0.5}]", "loss.1.weight=0.25"])
    assert sums.loss[1]["weight"] == 0.25


def test_a_list_says_which_entries_it_has(words: str) -> None:
    assert "data.train.0" in problem_of("data.train.1.weight=2.0", recipe=words).expected
    assert "data.train.0" in problem_of("data.train.weight=2.0", recipe=words).expected
    assert "loss.1" in problem_of("loss=[dpo, sft]", "loss.beta=0.2", recipe=words).expected


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("loss.beta", "write loss.beta=value"),
        ("--loss.beta=0.2", "keys are written without dashes: loss.beta=0.2"),
        ("=0.2", "put the key in front of the ="),
        ("loss..beta=0.2", "one dot between two keys"),
    ],
)
def test_a_word_that_is_no_override_is_explained(word: str, fix: str) -> None:
    problem = problem_of(word)
    assert (problem.where, problem.given, problem.fix) == ("command line", word, fix)


def test_a_key_and_a_value_that_were_written_apart_are_put_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("dpo", ["loss.beta", "0.2", "--train.epochs", "2"])
    assert [problem.fix for problem in caught.value.problems] == [
        "write loss.beta=0.2",
        "keys are written without dashes: train.epochs=2",
    ]


def test_no_override_is_lost_to_a_later_one() -> None:
    assert problem_of("loss.beta=0.2", "loss=ipo").fix == "write loss=ipo first"
    assert problem_of("seed=1", "seed=2").fix == "keep one of them"


def test_a_value_has_no_keys_below_it() -> None:
    assert problem_of("train.batch_size.more=1").fix == "set train.batch_size"
    assert problem_of("seed.more=1").where == "seed"


def test_a_value_that_is_no_yaml_is_shown_with_its_key() -> None:
    assert problem_of("data.filter={language: en").where.startswith("data.filter, line 1")


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [("dpo", "train.max_steps=200", (None, 200)), ("quickstart", "train.epochs=2", (2.0, None))],
)
def test_a_length_on_the_command_line_takes_the_place_of_the_files(recipe, override, expected):
    train = load_recipe(recipe, [override], check_files=False).train
    assert (train.epochs, train.max_steps) == expected


def test_two_lengths_on_the_command_line_are_refused():
    with pytest.raises(RecipeError, match="either epochs or max_steps"):
        load_recipe("dpo", ["train.max_steps=200", "train.epochs=2"], check_files=False)


def test_one_hyper_parameter_of_a_sum_says_how_to_write_it():
    with pytest.raises(RecipeError, match=r"loss\.0\.beta"):
        load_recipe("quickstart", ["loss=simpo+sft", "loss.beta=2"])
