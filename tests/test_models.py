"""Models load, or a person is told why not and what to do."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny import tiny_model
from world import make_model, train

from prefopt.adapters import add_lora
from prefopt.errors import ModelError
from prefopt.models import ModelSource, load_model, load_tokenizer, switch_off_dropout
from prefopt.quantization import quantization_settings


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
    """With bitsandbytes' usual threshold, an accelerator looks for outlier columns over the whole batch."""
    assert quantization_settings("int8", torch.float32)["llm_int8_threshold"] == 0
    model = load_model(ModelSource(str(make_model(tmp_path / "model")), quantization="int8"))
    layer = model.model.layers[0].mlp.up_proj
    rows = torch.randn(4, layer.in_features)
    rows[3] *= 50
    with torch.no_grad():
        torch.testing.assert_close(layer(rows)[:3], layer(rows[:3]), rtol=0, atol=1e-5)


def test_bitsandbytes_leaves_no_hub_kernel_behind():
    assert sys.modules.get("kernels", "absent") is not None


DROPPING = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "mixtral": {"attention_dropout": 0.3, "router_jitter_noise": 0.3},
    "granite": {"attention_dropout": 0.3},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "biogpt": {"layerdrop": 0.5, "activation_dropout": 0.3, "hidden_dropout_prob": 0.3},
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_model_without_dropout_trains_on_what_it_evaluates(name):
    model = tiny_model(name, **DROPPING[name])
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits
    assert not torch.equal(model.train()(ids).logits, expected)
    assert switch_off_dropout(model) > 0
    for _ in range(5):  # a layer is dropped now and then
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert switch_off_dropout(model) == 0


def test_a_saved_model_keeps_the_dropout_it_came_with(tmp_path):
    make_model(tmp_path / "base", "gpt2", n_embd=32, attn_pdrop=0.2, resid_pdrop=0.3)
    train(tmp_path)
    saved, came = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("run/model", "base"))
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
        assert saved[key] == came[key] > 0
