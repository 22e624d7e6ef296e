"""A recipe file becomes a Recipe: defaults, shorthands, YAML 1.2, the record of a run, the shipped files."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from prefopt.recipe import Recipe, Source, load_recipe, recipe_from_mapping, recipe_schema, shipped_recipes
from prefopt.recipe.document import recipe_reference
from prefopt.recipe.text import dump_yaml, parse_yaml

ROOT = Path(__file__).parents[1]
SMALL = "model: sandbox\ndata: {train: sandbox}\nloss: dpo\n"


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_three_keys_are_a_recipe_and_the_rest_has_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL))
    assert (recipe.model.path, recipe.model.quantization, recipe.adapter) == ("sandbox", "none", None)
    assert (recipe.data.train, recipe.data.eval_fraction, recipe.data.max_length) == ("sandbox", 0.02, 2048)
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.batch_size) == (1.0, None, 64)
    assert (recipe.train.learning_rate, recipe.train.optimizer.name) == (5e-7, "adamw")
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.reference.cache) == (0.1, 0.25, "auto")
    assert (recipe.tracking.wandb, recipe.seed, recipe.name) == ("off", 0, "mine")


def test_a_bare_word_is_short_for_a_mapping(tmp_path: Path) -> None:
    short = load_recipe(written(tmp_path, SMALL + "train: {optimizer: adamw_8bit}\n"))
    whole = load_recipe(
        written(
            tmp_path,
            "model: {path: sandbox}\ndata: {train: sandbox}\nloss: {name: dpo}\n"
            "train: {optimizer: {name: adamw_8bit}}\n",
        )
    )
    assert short == whole


def test_a_list_of_sources_keeps_words_and_weights(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, SMALL.replace("{train: sandbox}", "{train: [a/b, {path: c/d, weight: 2.0}]}"))
    )
    assert recipe.data.train == ["a/b", Source(path="c/d", weight=2.0)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("no", "no"),
        ("5e-7", 5e-7),
        ("5.0e-07", 5e-7),
        ("010", 10),
        ("null", None),
    ],
)
def test_yaml_is_version_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}", where="test")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("value", [0.0, 1e-8, 5e-07, 1e22, "off", "5e-7", "null", "", "a: b", None, True, 3, [], {}])
def test_what_is_written_is_read_back(value: object) -> None:
    again = parse_yaml(dump_yaml({"key": value}), where="test")["key"]
    assert again == value
    assert type(again) is type(value)


def test_a_number_as_a_key_is_the_name_of_a_column() -> None:
    assert load_recipe("dpo", ["data.filter={3: a}"]).data.filter == {"3": "a"}


SWEEPS = {name for name in shipped_recipes() if name.startswith("sweep-")}


def test_zero_is_a_value_and_not_an_absence(tmp_path: Path) -> None:
    zeros = "eval: {every: 0, samples: 0}\ncheckpoint: {every: 0}\ntrain: {warmup: 0}\n"
    recipe = load_recipe(written(tmp_path, SMALL + zeros))
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    for each in (recipe, again):
        assert (each.eval.every, each.eval.samples, each.checkpoint.every, each.train.warmup) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - SWEEPS))
def test_every_shipped_recipe_is_valid_and_its_record_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    run = tmp_path / name
    run.mkdir()
    record = load_recipe(written(run, recipe.to_yaml(), "recipe.yaml"))
    assert record.output_folder() == recipe.output_folder() == Path("runs") / name
    assert record.name == recipe.name == name
    assert record == recipe.model_copy(update={"output": f"runs/{name}"})
    assert record.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_key_that_a_shipped_recipe_sets_has_a_sentence_above_it(name: str) -> None:
    lines = [line for line in shipped_recipes()[name].read_text().splitlines() if line.strip()]
    for above, line in pairwise(lines):
        key, colon, value = line.strip().partition(": ")
        if colon and value and not key.startswith("#") and key not in {"name", "path", "type"}:
            assert above.lstrip().startswith("# "), line


def test_the_record_spells_out_every_hyper_parameter_of_the_loss() -> None:
    record = parse_yaml(load_recipe("dpo", ["loss=ipo"]).to_yaml(), where="record")
    assert record["loss"].items() >= {"name": "ipo", "beta": 0.1, "normalize": "mean"}.items()


def test_a_weighted_sum_of_losses_survives_the_record(tmp_path: Path) -> None:
    text = SMALL.replace("loss: dpo", "loss: [{name: dpo, beta: 0.2}, {name: sft, weight: 0.5}]")
    recipe = load_recipe(written(tmp_path, text))
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    assert again.to_mapping() == recipe.to_mapping()
    assert [term["name"] for term in recipe.loss] == ["dpo", "sft"]
    assert again.build_loss().config == recipe.build_loss().config


def test_the_loss_of_the_recipe_is_the_loss_of_the_library() -> None:
    from prefopt_losses import loss_from_config

    built = load_recipe("quickstart", ["loss.beta=0.25"]).build_loss()
    assert built.config == loss_from_config({"name": "dpo", "beta": 0.25}).config


def test_max_steps_take_the_place_of_the_default_epochs(tmp_path: Path) -> None:
    train = load_recipe(written(tmp_path, SMALL + "train: {max_steps: 7}\n")).train
    assert (train.epochs, train.max_steps) == (None, 7)


def test_the_run_folder_bears_the_name_of_the_file(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, SMALL)).output_folder() == Path("runs/mine")
    elsewhere = load_recipe(written(tmp_path, SMALL), ["output=~/out/{recipe}-1"])
    assert elsewhere.output_folder() == Path.home() / "out/mine-1"


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    run = tmp_path / "second"
    run.mkdir()
    written(run, SMALL, "recipe.yaml")
    assert load_recipe(str(run)).name == "second"


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = load_recipe("dpo")
    with pytest.raises(ValidationError):
        recipe.train.learning_rate = 1.0  # type: ignore[misc]


def test_a_mapping_in_python_passes_the_same_checks_and_is_left_alone() -> None:
    mapping = {"model": "sandbox", "data": {"train": "sandbox"}, "loss": "dpo"}
    recipe = recipe_from_mapping(mapping, name="inline")
    assert isinstance(recipe, Recipe)
    assert recipe.name == "inline"
    assert mapping == {"model": "sandbox", "data": {"train": "sandbox"}, "loss": "dpo"}


def test_the_documentation_is_made_from_the_schema_of_today() -> None:
    remedy = "run: python -m prefopt.recipe.document docs"
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == recipe_reference(), remedy
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema(), remedy


def test_every_key_of_the_schema_has_a_sentence() -> None:
    from prefopt.recipe.allowed import all_keys, schema_at

    silent = [path for path in all_keys() if not schema_at(path).get("description")]
    assert silent == []


def test_reading_recipes_loads_neither_transformers_nor_torch() -> None:
    program = (
        "import sys, prefopt.recipe\n"
        "prefopt.recipe.shipped_recipes(); prefopt.recipe.recipe_schema()\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
