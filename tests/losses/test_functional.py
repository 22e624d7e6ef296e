"""Every method as one function: the same values, a signature of its own, a docstring that says all."""

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published.records import make_lists, make_record

import prefopt_losses
from prefopt_losses import METHODS, LossError, functional, get_loss, readme
from prefopt_losses.hyperparameters import schema
from prefopt_losses.tensors import LIST_TENSORS, PAIR_TENSORS

every_method = pytest.mark.parametrize("name", METHODS)
README = Path(readme.__file__).parents[1] / "README.md"


PAIR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


@pytest.fixture
def record():
    return make_record(torch.float32)


def function(name):
    return getattr(prefopt_losses, f"{name}_loss")


def test_every_method_has_its_function_and_no_function_lacks_a_method():
    named = {name.removesuffix("_loss") for name in prefopt_losses.__all__ if name.endswith("_loss")}
    assert named - {"get"} == set(METHODS) == {name.removesuffix("_loss") for name in functional.__all__}


@every_method
def test_it_gives_what_the_loss_gives(name, record):
    loss = get_loss(name)
    lists = make_lists(torch.float32)
    needed = [getattr(lists if loss.needs.lists else record, each) for each in loss.needs.tensors]
    if loss.needs.lists:
        assert torch.equal(function(name)(*needed, lists.lists), loss(lists))
    else:
        assert torch.equal(function(name)(*needed), loss(record))


@every_method
def test_tensors_come_first_in_the_order_of_the_record_and_hyper_parameters_by_keyword(name):
    parameters = list(inspect.signature(function(name)).parameters.values())
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    table = [*LIST_TENSORS, "lists"] if get_loss(name).needs.lists else list(PAIR_TENSORS)
    assert set(positional) <= set(table)
    required = [
        each for each in positional if inspect.signature(function(name)).parameters[each].default is inspect._empty
    ]
    assert required == [each for each in table if each in required]
    keyword_only = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    for key, each in schema(METHODS[name].make).items():
        assert keyword_only[key] == each.default


def test_the_signatures_people_know():
    pair = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    lengths = ["chosen_lengths", "rejected_lengths"]
    assert list(inspect.signature(prefopt_losses.dpo_loss).parameters)[:5] == [*pair, "beta"]
    assert list(inspect.signature(prefopt_losses.ipo_loss).parameters)[:7] == [*pair, *lengths, "beta"]
    assert list(inspect.signature(prefopt_losses.simpo_loss).parameters)[:5] == [*pair[:2], *lengths, "beta"]
    assert list(inspect.signature(prefopt_losses.sft_loss).parameters)[:2] == [
        "chosen_logps",
        "chosen_lengths",
    ]


def test_hyper_parameters_options_and_refinements_pass_through(record):
    pair = [getattr(record, each) for each in PAIR]
    summed = prefopt_losses.ipo_loss(*pair, normalize="sum", beta=0.05)
    assert torch.equal(summed, get_loss("ipo", normalize="sum", beta=0.05)(record))
    probability = record.preference_probability
    softened = prefopt_losses.dpo_loss(*pair, soft_labels=True, preference_probability=probability)
    assert torch.equal(softened, get_loss("dpo", soft_labels=True)(record))
    shared = prefopt_losses.sft_loss(pair[0], record.chosen_lengths, tokens_per_example=4.0)
    assert torch.equal(shared, get_loss("sft")(replace(record, tokens_per_example=4.0)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_are_made_and_called_while_evaluating(record, mode):
    with mode():
        for name in METHODS:
            loss = get_loss(name)
            assert loss(make_lists(torch.float32) if loss.needs.lists else record).isfinite().all()
        own = prefopt_losses.gpo_loss(*(getattr(record, each) for each in PAIR), f=lambda x: torch.exp(-x))
        assert torch.equal(own, prefopt_losses.gpo_exponential_loss(*(getattr(record, each) for each in PAIR)))


def test_mistakes_are_told(record):
    pair = [getattr(record, each) for each in PAIR]
    with pytest.raises(LossError, match="Did you mean"):
        prefopt_losses.dpo_loss(*pair, bta=0.1)
    with pytest.raises(TypeError, match="ref_chosen_logps"):
        prefopt_losses.dpo_loss(*pair[:2])
    with pytest.raises(TypeError, match="too many positional"):
        prefopt_losses.dpo_loss(*pair, 0.1)


@every_method
def test_help_names_every_argument_shape_unit_formula_and_source(name):
    text = inspect.getdoc(function(name))
    for parameter in inspect.signature(function(name)).parameters:
        assert re.search(rf"^    {parameter}: .+", text, re.MULTILINE), parameter
    assert f"loss = {METHODS[name].formula}" in text
    assert "(completions,)" in text or "(batch,)" in text
    assert "nats" in text
    assert METHODS[name].paper in text


def test_the_stub_for_editors_is_up_to_date():
    assert readme.STUB.read_text(encoding="utf-8") == readme.stub(), "run `make docs`"
    stubbed = [node.name for node in ast.parse(readme.stub()).body if isinstance(node, ast.FunctionDef)]
    assert stubbed == ["loss_function", *(f"{name}_loss" for name in METHODS)]


@pytest.mark.skipif(not README.exists(), reason="installed without the source tree")
def test_the_readme_is_up_to_date():
    assert README.read_text(encoding="utf-8") == readme.readme(), "run `make docs`"


def test_the_example_of_the_readme_runs_and_gives_gradients():
    scope = {}
    exec(compile(readme.EXAMPLE, "README.md", "exec"), scope)
    assert scope["logps"].chosen_logps.grad.isfinite().all()
