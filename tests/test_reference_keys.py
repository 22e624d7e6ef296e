"""Whose log-probs: what changes a forward pass changes the fingerprint, and nothing else does; weights by content."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import group, tiny_model
from world import make_model, make_recipe, quiet

from prefopt.adapters import AdapterSource
from prefopt.batching import make_batch
from prefopt.errors import CacheError, ModelError
from prefopt.forward import Scorer
from prefopt.models import ModelSource, load_model
from prefopt.quantization import quantization_settings
from prefopt.reference import identity as identity_room
from prefopt.reference.commands import build_cache, verify_cache
from prefopt.reference.identity import file_hashes, identify, weight_files


def fingerprint(folder: Path, **settings: object) -> str:
    return identify(ModelSource(str(folder), **settings)).fingerprint


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# --- configuration ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("rope_theta", 5e5),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("sliding_window", 9),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 24),
        ("logit_scale", 0.5),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.2),
        ("tie_word_embeddings", True),
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("num_experts_per_tok", 1),
        ("model_type", "mistral"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("text_config", {"sliding_window": 9}),
        ("a_field_of_next_year", 1),
    ],
)
def test_a_field_that_can_change_the_forward_pass_changes_the_fingerprint(tmp_path, field, value):
    folder = make_model(tmp_path / "base")
    before = fingerprint(folder)
    change_config(folder, **{field: value})
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transformers_version", "9"),
        ("use_cache", False),
        ("_name_or_path", "elsewhere"),
        ("architectures", ["Other"]),
        ("attention_dropout", 0.1),
        ("torch_dtype", "float16"),
        ("eos_token_id", 5),
        ("initializer_range", 0.3),
    ],
)
def test_names_and_settings_of_training_and_generation_change_nothing(tmp_path, field, value):
    folder = make_model(tmp_path / "base")
    change_config(folder, text_config={"rms_norm_eps": 1e-6})
    before = fingerprint(folder)
    change_config(folder, **{field: value}, text_config={"rms_norm_eps": 1e-6, field: value})
    assert fingerprint(folder) == before


def test_the_conventions_of_position_and_eos_are_part_of_the_identity(tmp_path):
    one = identify(ModelSource(str(make_model(tmp_path / "base"))))
    for name in ("positions", "eos", "format"):
        assert replace(one, **{name: 0}).fingerprint != one.fingerprint
    assert one.differences(asdict(replace(one, eos="never scored"))) == [
        "eos: never scored there, scored where the completion's ids hold it here"
    ]


# --- quantization ---


@pytest.mark.parametrize(
    ("quantization", "name", "value"),
    [
        ("int8", "llm_int8_threshold", 6.0),
        ("int8", "llm_int8_skip_modules", ["lm_head", "down_proj"]),
        ("nf4", "bnb_4bit_use_double_quant", False),
        ("nf4", "bnb_4bit_compute_dtype", "float16"),
        ("nf4", "llm_int8_skip_modules", ["lm_head", "down_proj"]),
        ("fp4", "bnb_4bit_quant_type", "nf4"),
    ],
)
def test_every_quantization_setting_is_part_of_the_identity(tmp_path, monkeypatch, quantization, name, value):
    folder = make_model(tmp_path / "base")
    before = fingerprint(folder, quantization=quantization)
    monkeypatch.setattr(
        identity_room,
        "quantization_settings",
        lambda *given, **more: {**quantization_settings(*given, **more), name: value},
    )
    assert fingerprint(folder, quantization=quantization) != before


def test_the_compute_dtype_of_an_unquantized_reference_counts_too(tmp_path):
    folder = make_model(tmp_path / "base")
    seen = {
        fingerprint(folder, quantization=quantization, compute=compute)
        for quantization in ("none", "int8", "nf4", "fp4")
        for compute in (torch.float32, torch.bfloat16)
    }
    assert len(seen) == 8


def change_by_neighbours(folder: Path) -> float:
    """Largest change of an int8 completion's log-prob between alone and among others, nats."""
    scorer = Scorer(load_model(ModelSource(str(folder), quantization="int8"))).eval()
    groups = [group(5, [9, 4], seed=1), group(17, [30, 2], seed=2), group(3, [40], seed=3)]
    with torch.no_grad():
        together = scorer(make_batch(groups)).sums
        alone = torch.cat([scorer(make_batch([one])).sums for one in groups])
    return float((together - alone).abs().max())


def test_an_int8_row_does_not_depend_on_its_neighbours(tmp_path):
    """Weights are expanded on a CPU; what is left is the rounding of fp32 sums."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    assert change_by_neighbours(tmp_path / "base") < 1e-4


# --- weights ---


def test_weights_count_by_content_wherever_the_folder_is(tmp_path):
    folder = make_model(tmp_path / "base")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "link")


def test_sharded_weights_are_those_that_the_index_names(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    source = ModelSource(str(tmp_path / "base"))
    files = weight_files(source, tmp_path / "base")
    assert len(files) > 2
    before = identify(source).fingerprint
    shutil.copy(files[0], tmp_path / "base" / "consolidated.safetensors")  # from_pretrained does not read it
    assert identify(source).fingerprint == before
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert identify(source).fingerprint != before
    files[1].unlink()
    with pytest.raises(ModelError, match=files[1].name):
        identify(source)


def test_bin_weights_are_hashed_where_there_are_no_others(tmp_path):
    folder = make_model(tmp_path / "base")
    safe = fingerprint(folder)
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    assert fingerprint(folder) == safe
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder) != safe
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="model weights"):
        fingerprint(folder)


def test_an_adapter_counts_with_its_scaling(tmp_path):
    folder = make_model(tmp_path / "base")
    seen = [fingerprint(folder)]
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "lora_dropout": 0.0}
    for change in ({}, {"lora_alpha": 32}, {"r": 4}, {"use_rslora": True}, {"target_modules": ["q_proj"]}):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)
    cosmetic = {"lora_dropout": 0.5, "base_model_name_or_path": "elsewhere", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **cosmetic}))
    assert fingerprint(folder) == seen[1]
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    assert fingerprint(folder) not in seen


def test_an_adapter_that_is_put_on_counts_and_its_place_does_not(tmp_path):
    folder = make_model(tmp_path / "base")
    seen = [fingerprint(folder)]
    for name, alpha in (("one", 16), ("copy", 16), ("other", 32)):
        adapter = tmp_path / name
        adapter.mkdir()
        shutil.copy(folder / "model.safetensors", adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
        seen.append(fingerprint(folder, adapter=AdapterSource(str(adapter))))
    plain, one, copy, other = seen
    assert one == copy
    assert len({plain, one, other}) == 3


def test_a_hub_blob_brings_its_own_hash_and_rehash_reads_it(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    name = "ab" * 32
    (blobs / name).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / name)
    file = snapshot / "model.safetensors"
    assert file_hashes([file]) == [name]
    assert file_hashes([file], rehash=True) != [name]


def test_a_hash_is_remembered_by_path_size_and_time_and_a_fresh_file_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"first!")
    fresh = file_hashes([file])
    assert not (tmp_path / "cache" / "hashes.json").exists()
    os.utime(file, (1e9, 1e9))
    assert file_hashes([file]) == fresh
    file.write_bytes(b"second")
    os.utime(file, (1e9, 1e9))  # size and time kept
    assert file_hashes([file]) == fresh
    assert file_hashes([file], rehash=True) != fresh
    assert file_hashes([file]) != fresh  # the correction is remembered


def test_verify_rehash_finds_weights_that_changed_with_size_and_time_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    os.utime(weights, (1e9, 1e9))
    build_cache(recipe, quiet())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1e9, 1e9))
    with pytest.raises(CacheError, match=r"model\.safetensors"):
        verify_cache(recipe, Console(quiet=True), rehash=True)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
def test_how_a_cpu_multiplies_with_quantized_weights_is_part_of_the_identity(tmp_path, quantization):
    """Before 2026-11-28 it rounded otherwise: what was cached then is another reference's."""
    one = identify(ModelSource(str(make_model(tmp_path / "base")), quantization=quantization))
    assert ("cpu" in one.quantization) == (quantization != "none")
