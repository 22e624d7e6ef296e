"""Models load, or a person is told why not and what to do."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import tiny_model
from world import make_model

from prefopt.adapters import add_lora
from prefopt.errors import ModelError
from prefopt.models import ModelSource, load_model, load_tokenizer, switch_off_dropout


def refusal(call, *arguments):
    with pytest.raises(ModelError) as error:
        call(*arguments)
    (problem,) = error.value.problems
    assert problem.expected
    assert problem.given
    assert problem.fix
    return str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    assert "nowhere" in refusal(load_model, ModelSource(str(tmp_path / "nowhere")))


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in refusal(load_model, ModelSource(str(tmp_path)))


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert "save_pretrained" in refusal(load_tokenizer, ModelSource(str(tmp_path)))


def test_a_folder_without_weights(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refusal(load_model, ModelSource(str(folder)))


def test_damaged_weights(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not weights")
    refusal(load_model, ModelSource(str(folder)))


def test_adapter_targets_that_no_module_has():
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        add_lora(tiny_model("llama"), rank=2, alpha=4, dropout=0.0, targets=["no_such_layer"])


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_quantized_weights_are_quantized(tmp_path, quantization):
    model = load_model(ModelSource(str(make_model(tmp_path / "model")), quantization=quantization))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype in (torch.int8, torch.uint8)
    assert model.lm_head.weight.dtype == torch.float32


def test_int8_is_a_function_of_the_row(tmp_path):
    """With bitsandbytes' usual threshold, outlier columns are looked for over the whole batch."""
    model = load_model(ModelSource(str(make_model(tmp_path / "model")), quantization="int8"))
    layer = model.model.layers[0].mlp.up_proj
    rows = torch.randn(4, layer.in_features)
    rows[3] *= 50
    with torch.no_grad():
        assert torch.equal(layer(rows)[:3], layer(rows[:3]))


def test_bitsandbytes_leaves_no_hub_kernel_behind():
    assert sys.modules.get("kernels", "absent") is not None


def test_dropout_is_switched_off_in_modules():
    model = tiny_model("gpt2")
    assert switch_off_dropout(model) > 0
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
