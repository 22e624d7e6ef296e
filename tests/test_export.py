"""A run's model leaves as one plain folder."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_model, train

from prefopt.errors import ModelError
from prefopt.export import export_run

IDS = torch.arange(5, 20)[None]


def test_an_adapter_is_merged(tmp_path):
    train(tmp_path, adapter={"rank": 4}, train={"learning_rate": 1e-2})
    target = export_run(tmp_path / "run")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert not list(target.glob("adapter*"))
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-4)
    AutoTokenizer.from_pretrained(target)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["lm_head", "q_proj"]),
        ("llama", ["embed_tokens", "q_proj"]),
        ("llama", "all-linear"),
        ("gpt2", ["lm_head", "c_attn"]),
        ("gemma2", ["embed_tokens", "q_proj"]),
    ],
)
def test_an_adapter_on_one_of_two_tied_layers_does_not_change_the_other(tmp_path, architecture, targets):
    make_model(tmp_path / "base", architecture, tie_word_embeddings=True)
    train(tmp_path, adapter={"rank": 4, "targets": targets, "merge": True}, train={"learning_rate": 3e-2})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "run" / "model")(IDS).logits
        for folder in (tmp_path / "run" / "model-merged", export_run(tmp_path / "run")):
            merged = AutoModelForCausalLM.from_pretrained(folder)
            torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-4)
            tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
            assert tied == (targets == "all-linear")


def test_a_quantized_base_is_merged_in_full_precision(tmp_path):
    train(
        tmp_path,
        model={"path": str(tmp_path / "base"), "quantization": "nf4"},
        adapter={"rank": 4},
        reference={"quantization": "nf4"},
    )
    model = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_another_dtype_and_folder(tmp_path):
    train(tmp_path)
    target = export_run(tmp_path / "run", output=tmp_path / "out", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(target)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (target / "README.md").exists()


def test_an_unfinished_run_has_nothing_to_export(tmp_path):
    with pytest.raises(ModelError, match="no model/"):
        export_run(tmp_path)
