"""Compiled layers compute what the layers compute, whatever the length of a row; what cannot run here is refused."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny import group, tiny_model
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM
from world import make_recipe, quiet, train

from prefopt.acceleration import (
    compile_layers,
    eager,
    gave_up,
    refuse_what_cannot_run,
    saying_what_cannot_be_compiled,
)
from prefopt.batching import make_batch
from prefopt.errors import RecipeError
from prefopt.forward import Scorer
from prefopt.preflight import check_recipe
from prefopt.train import run_training

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_a_compiler_a_recipe_is_refused_before_anything_loads(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, train={"compile": True})
    monkeypatch.setattr("prefopt.acceleration.shutil.which", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.compile: a C\+\+ compiler[^|]*install one"):
        check_recipe(recipe, quiet())
    refuse_what_cannot_run(recipe, CUDA)  # Triton brings its own


def test_kernels_of_the_hub_are_refused_where_they_cannot_run(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    wish = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kernels": True})})
    with pytest.raises(RecipeError, match=r"model\.kernels: an accelerator"):
        run_training(wish, quiet())
    monkeypatch.setattr("prefopt.acceleration.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install kernels"):
        refuse_what_cannot_run(wish, CUDA)
    monkeypatch.setattr("prefopt.acceleration.find_spec", lambda name: object())
    refuse_what_cannot_run(wish, CUDA)


def test_a_compiler_that_cannot_build_is_said_to_with_a_way_out(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CppCompileError\nfatal error: Python.h: No such file or directory")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(RecipeError, match=r"Python\.h[^|]*python3-dev"):
        compile_layers(tiny_model("llama"))


def test_what_the_compiler_cannot_do_is_no_traceback():
    said = r"train\.compile: layers that this torch can compile[^|]*1 < s33"
    with pytest.raises(RecipeError, match=said), saying_what_cannot_be_compiled():
        raise TorchDynamoException("TypeError: cannot determine truth value of Relational: 1 < s33")


def gradients(scorer, batch):
    sums = scorer(batch).sums
    sums.sum().backward()
    found = {name: p.grad.clone() for name, p in scorer.named_parameters()}
    scorer.zero_grad(set_to_none=True)
    return sums.detach(), found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "recomputed"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_compiled_layers_give_the_same_for_rows_of_every_length(name, recomputed):
    scorers = [Scorer(tiny_model(name)).train() for _ in range(2)]
    names = list(scorers[1].state_dict())
    for scorer in scorers if recomputed else []:
        scorer.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        scorer.language_model.enable_input_require_grads()
    torch._dynamo.reset()
    scorers[1].last_layer.compute_whole()
    compile_layers(scorers[1].language_model, recomputed=recomputed)
    assert list(scorers[1].state_dict()) == names
    torch._dynamo.utils.counters.clear()
    for number in range(6):
        rows = [group(5 + 3 * number, [4 + number, 7], seed=number), group(9, [6, 3 + 2 * number], seed=number + 50)]
        (plain, slopes), (compiled, others) = (gradients(one, make_batch(rows[: 1 + number % 2])) for one in scorers)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-4)
        for parameter in slopes:
            torch.testing.assert_close(others[parameter], slopes[parameter], rtol=1e-3, atol=1e-4, msg=parameter)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 16  # not one more for every length
    assert not gave_up()


@pytest.mark.slow
def test_a_compiled_run_is_an_eager_one_and_says_when_dynamo_gives_up(tmp_path, monkeypatch):
    plain = train(tmp_path, train={"max_steps": 3}, output=str(tmp_path / "plain"))
    monkeypatch.setattr("prefopt.acceleration.RECOMPILE_LIMIT", 1)
    torch._dynamo.reset()
    screen = StringIO()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = run_training(
            make_recipe(tmp_path, train={"max_steps": 3, "compile": True}), Console(file=screen, width=200)
        )
    assert "ran uncompiled from then on" in screen.getvalue()
    assert compiled["train"]["loss"] == pytest.approx(plain["train"]["loss"], abs=1e-4)
    assert compiled["eval"]["kl"] == pytest.approx(plain["eval"]["kl"], abs=1e-2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")  # names of weights are the model's own


def test_a_model_that_is_not_compiled_is_left_alone():
    with eager(tiny_model("llama")):
        assert torch.compiler.is_compiling() is False
