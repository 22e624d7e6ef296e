"""Whatever is wrong with a recipe is said at once: key path, what was expected and given, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import load_recipe, recipe_from_mapping

RIGHT: dict[str, Any] = {"model": "sandbox", "data": {"train": "sandbox"}, "loss": "dpo"}


def problems_of(name_or_path: str, *overrides: str) -> dict[str, Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    return {problem.where: problem for problem in caught.value.problems}


def problems_with(**sections: Any) -> dict[str, Problem]:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({**RIGHT, **sections})
    return {problem.where: problem for problem in caught.value.problems}


def test_two_mistakes_are_two_problems_each_with_a_way_out() -> None:
    found = problems_of("dpo", "loss.btea=0.2", "data.train=/nope")
    assert list(found) == ["loss.btea", "data.train"]
    assert "beta" in found["loss.btea"].fix
    assert "/nope" in found["data.train"].given
    assert found["data.train"].fix


def test_mistakes_of_every_kind_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "model: {path: sandbox, quantization: nf4}\n"  # without an adapter, and another reference
        "data: {train: ./nowhere.jsonl, eval_fraction: 1.5}\n"
        "loss: {name: dpo, beta: -1}\n"
        "train: {epochs: 1, max_steps: 5, learning_rat: 1e-5}\n"
        "tracking: {wandb: sometimes}\n"
    )
    assert set(problems_of(str(path), "just_a_word", "seed=-1")) == {
        "command line",
        "seed",
        "model.quantization",
        "reference.quantization",
        "data.train",
        "data.eval_fraction",
        "loss.beta",
        "train.epochs",
        "train.learning_rat",
        "tracking.wandb",
    }


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("train", "learning_rat", "learning_rate"),
        ("train", "lr", "train.learning_rate"),
        ("train", "beta", "loss.beta"),
        ("eval", "learning_rate", "train.learning_rate"),
        ("adapter", "lora_r", "adapter.rank"),
        ("reference", "quantisation", "quantization"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(section: str, key: str, meant: str) -> None:
    found = problems_with(**{section: {key: 1}})
    assert found[f"{section}.{key}"].fix == f'did you mean "{meant}"?'


def test_an_unknown_key_at_the_top_is_refused_too() -> None:
    assert problems_with(trian={})["trian"].fix == 'did you mean "train"?'
    assert problems_with(learning_rate=1e-5)["learning_rate"].fix == 'did you mean "train.learning_rate"?'


def test_a_sweep_section_points_to_the_command_that_runs_it() -> None:
    assert "prefopt sweep" in problems_with(sweep={"loss.beta": [0.1, 0.2]})["sweep"].fix


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "batch_size", 0, "a whole number of at least 1"),
        ("train", "batch_size", 0.5, "a whole number of at least 1"),
        ("train", "batch_size", "64", "a whole number of at least 1"),
        ("train", "batch_size", True, "a whole number of at least 1"),
        ("train", "learning_rate", 0.0, "a number above 0"),
        ("train", "learning_rate", float("nan"), "a number above 0"),
        ("train", "token_budget", "much", "auto or a whole number of at least 1"),
        ("train", "warmup", 1.0, "a number from 0 to below 1 or a whole number of at least 1"),
        ("train", "warmup", 2.5, "a number from 0 to below 1 or a whole number of at least 1"),
        ("train", "precision", "fp16", "bf16, fp32 or bf16-pure"),
        ("train", "gradient_checkpointing", "yes", "auto, true or false"),
        ("eval", "gold_reward", "my_module", "sandbox, module:function or null"),
        ("checkpoint", "best", "accuracy", "a metric such as eval.accuracy or null"),
        ("data", "eos", None, "auto, always or never"),
        ("adapter", "targets", "attention", "all-linear or a list (each entry text)"),
        ("reference", "cache", False, "text"),
    ],
)
def test_a_wrong_value_is_met_with_what_the_key_allows(section: str, key: str, value: Any, expected: str) -> None:
    rest = RIGHT["data"] if section == "data" else {}
    found = problems_with(**{section: {**rest, key: value}})
    assert list(found) == [f"{section}.{key}"]
    assert found[f"{section}.{key}"].expected == expected


def test_a_word_that_is_nearly_an_optimizer_and_a_list_that_is_too_short_are_said_in_their_own_words() -> None:
    optimizer = problems_with(train={"optimizer": "adamw_4bit"})["train.optimizer"]
    assert optimizer.expected == "adamw, adamw_8bit, paged_adamw_8bit or a mapping"
    assert "adamw_8bit" in optimizer.fix
    betas = problems_with(train={"optimizer": {"betas": [0.9]}})["train.optimizer.betas"]
    assert betas.expected == "a list of 2, each a number from 0 to below 1"
    assert betas.given == "[0.9]"


def test_a_quoted_number_and_a_false_are_explained() -> None:
    assert problems_with(train={"batch_size": "64"})["train.batch_size"].fix == "write 64 without quotes"
    assert problems_with(tracking={"wandb": False})["tracking.wandb"].fix == 'write "off"'


def test_a_problem_in_a_list_bears_its_number() -> None:
    found = problems_with(data={"train": ["a/b", {"path": "c/d", "wieght": 2}]})
    assert found["data.train.1.wieght"].fix == 'did you mean "weight"?'
    assert list(problems_with(data={"train": [{"weight": 2.0}]})) == ["data.train.0.path"]
    assert list(problems_with(data={"train": [5]})) == ["data.train.0"]


def test_what_is_required_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"model": {"dtype": "auto"}, "data": {}})
    assert [problem.where for problem in caught.value.problems] == ["model.path", "data.train", "loss"]


@pytest.mark.parametrize(
    ("loss", "where"),
    [
        ("dop", "loss"),
        ({"name": "dpo", "label_smoothing": 0.1}, "loss.label_smoothing"),
        ({"name": "dpo", "beta": "big"}, "loss.beta"),
        ({"name": "dpo", "beta": True}, "loss.beta"),
        ({"beta": 0.1}, "loss"),
        ([], "loss"),
        (7, "loss"),
        ([{"name": "dpo"}, {"name": "sft", "btea": 1, "weight": 1.0}], "loss.1.btea"),
        ([{"name": "dpo", "weight": -1.0}, {"name": "sft"}], "loss.0.weight"),
        ([{"name": "dpo"}, {"name": "stf"}], "loss.1"),
    ],
)
def test_a_problem_of_the_loss_names_its_key(loss: Any, where: str) -> None:
    assert list(problems_with(loss=loss)) == [where]


def test_all_problems_of_a_loss_are_listed() -> None:
    found = problems_with(loss={"name": "dpo", "beta": -1.0, "tau": 3, "label_smoothing": 0.1})
    assert set(found) == {"loss.beta", "loss.tau", "loss.label_smoothing"}
    assert (found["loss.beta"].expected, found["loss.beta"].given) == ("a number > 0", "-1.0")
    assert (found["loss.tau"].expected, found["loss.tau"].given) == (
        "a hyper-parameter of this loss: beta, soft_labels",
        "3",
    )
    assert "cdpo" in found["loss.label_smoothing"].fix
    assert problems_with(loss="hing")["loss"].fix == 'did you mean "hinge"?'
    assert "robust_dpo" in problems_with(loss="rdpo")["loss"].fix


def test_epochs_and_max_steps_exclude_each_other() -> None:
    assert "max_steps" in problems_with(train={"epochs": 1, "max_steps": 10})["train.epochs"].expected
    assert problems_with(train={"epochs": None})["train.epochs"].given == "neither"


def test_quantized_weights_need_an_adapter_and_the_same_reference() -> None:
    assert (
        "adapter"
        in problems_with(model={"path": "a/b", "quantization": "nf4"}, reference={"quantization": "nf4"})[
            "model.quantization"
        ].expected
    )
    qlora = {"model": {"path": "a/b", "quantization": "nf4"}, "adapter": {}}
    refused = problems_with(**qlora)["reference.quantization"]
    assert refused.fix.startswith("set reference.quantization=nf4; or leave the policy unquantized")
    assert "tenths of a nat" in refused.given
    assert list(problems_with(**qlora, reference={"quantization": "int8"})) == ["reference.quantization"]
    assert list(problems_with(**qlora, reference={"model": "a/b"})) == ["reference.quantization"]
    recipe_from_mapping({**RIGHT, **qlora, "reference": {"quantization": "nf4"}})
    recipe_from_mapping({**RIGHT, **qlora, "reference": {"model": "another/model"}})
    recipe_from_mapping({**RIGHT, "reference": {"quantization": "nf4"}})


def test_other_keys_that_make_no_sense_together() -> None:
    assert list(problems_with(output="runs/{loss}")) == ["output"]
    assert list(problems_with(reference={"revision": "main"})) == ["reference.revision"]
    assert list(problems_with(checkpoint={"best": "eval.accuracy"}, eval={"every": 0})) == ["checkpoint.best"]
    unshared = {"path": "a/b", "attention": "unshared", "attention_backend": "sdpa"}
    assert list(problems_with(model=unshared)) == ["model.attention_backend"]
    recipe_from_mapping({**RIGHT, "model": {**unshared, "attention": "auto"}})
    recipe_from_mapping({**RIGHT, "model": {**unshared, "attention_backend": "auto"}})


def test_keys_wrong_for_themselves_are_not_blamed_twice() -> None:
    found = problems_with(model={"path": "a/b", "quantization": "nf4"}, adapter={"rank": 0})
    assert set(found) == {"adapter.rank", "reference.quantization"}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: a\nmodel: b\n", "line 2, column 1", 'duplicate key "model"'),
        ("model: [a\n", "line 2, column 1", "expected"),
        ("train:\n\tepochs: 1\n", "line 2, column 1", "cannot start any token"),
        ("model: a: b\n", "line 1, column 9", "mapping values are not allowed"),
        ("model: !!python/object:os.system x\n", "line 1, column 8", "python/object"),
    ],
)
def test_what_is_not_yaml_is_shown_by_line_and_column(text: str, line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    (problem,) = problems_of(str(path)).values()
    assert problem.where == f"{path}, {line}"
    assert said in problem.given


@pytest.mark.parametrize("text", ["", "dpo", "- model: sandbox\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert list(problems_of(str(path))) == [str(path)]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("# größer\n".encode("latin-1"))
    assert problems_of(str(path))[str(path)].expected == "UTF-8 text"


def test_an_unknown_recipe_lists_what_is_shipped_and_what_was_meant() -> None:
    problem = problems_of("quikstart")["recipe"]
    assert "lora-7b" in problem.expected
    assert problem.fix == 'did you mean "quickstart"?'


@pytest.mark.parametrize(
    "path", ["/nope", "./nope", "../nope", "~/nope", "nope.jsonl", "nope.csv.gz", "nope/*.parquet"]
)
def test_data_written_as_a_path_must_exist(path: str) -> None:
    assert list(problems_of("dpo", f"data.train={path}")) == ["data.train"]
    assert list(problems_of("dpo", f"data.eval=[a/b, {path}]")) == ["data.eval.1"]
    load_recipe("dpo", [f"data.train={path}"], check_files=False)


def test_hub_names_are_not_looked_up_and_files_are_found(tmp_path: Path) -> None:
    load_recipe("dpo", ["data.train=owner/name"])
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    load_recipe("dpo", [f"data.train={tmp_path}/pairs.jsonl", f"data.eval={tmp_path}", f"model={tmp_path}"])
    nearly = problems_of("dpo", f"data.train={tmp_path}/pair.jsonl")["data.train"]
    assert nearly.fix == f'did you mean "{tmp_path}/pairs.jsonl"?'


def test_a_model_written_as_a_path_must_be_a_folder() -> None:
    assert list(problems_of("dpo", "model=./no-model", "reference.model=/no/model")) == [
        "model.path",
        "reference.model",
    ]
