"""Quantization: every kind with its details is what the weights are, and enters the identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import group, tiny_model
from transformers import AutoConfig
from world import make_model, make_recipe, quiet, train

from prefopt.adapters import add_lora
from prefopt.batching import make_batch
from prefopt.errors import ModelError, RecipeError
from prefopt.forward import Scorer, autocast, compute_dtype, evaluating, score
from prefopt.models import ModelSource, load_model
from prefopt.prepare import prepare, reference_source
from prefopt.quantization import quantization_settings, skipped_layers
from prefopt.recipe import load_recipe, recipe_from_mapping
from prefopt.recipe.quantization import QuantizationRecipe
from prefopt.reference.commands import build_cache, verify_cache
from prefopt.reference.identity import identify

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
KINDS = {
    "int8": "int8",
    "nf4": "nf4",
    "fp4": "fp4",
    "nf4, plain scales": {"type": "nf4", "double": False},
    "fp4, plain scales": {"type": "fp4", "double": False},
    "nf4, some layers left": {"type": "nf4", "skip": ["lm_head", "down_proj"]},
    "int8, some layers left": {"type": "int8", "skip": ["lm_head", "layers.0.mlp"]},
    "nf4, head too": {"type": "nf4", "skip": []},
    "nf4 in bfloat16": {"type": "nf4", "compute": "bfloat16"},
}


def parsed(written):
    """A quantization as the recipe holds it."""
    return recipe_from_mapping(
        {"model": "sandbox", "data": {"train": "sandbox"}, "loss": "dpo", "reference": {"quantization": written}}
    ).reference.quantization


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "base", **SIZES)


def loaded(folder, written, compute=torch.float32):
    return load_model(ModelSource(str(folder), quantization=parsed(written), compute=compute))


def quantized_layers(model):
    return {name for name, module in model.named_modules() if getattr(module, "weight", torch.ones(1)).dtype in
            (torch.uint8, torch.int8)}  # fmt: skip


# --- what a recipe says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["none", "int8", "nf4", "fp4"])
def test_a_word_is_short_for_a_mapping_with_the_defaults(word):
    assert parsed(word) == parsed({"type": word}) == word


def test_a_record_spells_every_detail_out_and_loads_to_the_same():
    for written in KINDS.values():
        recipe = make_mapping(written)
        again = recipe.to_mapping()["reference"]["quantization"]
        assert again["skip"] is not None
        assert ("double" in again) == (again["type"] != "int8")
        assert parsed(again) == recipe.reference.quantization


def make_mapping(written):
    return recipe_from_mapping(
        {"model": "a/b", "data": {"train": "sandbox"}, "loss": "dpo", "reference": {"quantization": written}}
    )


def test_skipped_modules_are_a_set():
    assert parsed({"type": "nf4", "skip": ["b", "lm_head", "b"]}) == parsed({"type": "nf4", "skip": ["lm_head", "b"]})


def test_a_word_opens_into_a_mapping_on_the_command_line():
    words = ["model.quantization=nf4", "reference.quantization=nf4"]
    both = ["model.quantization.double=false", "reference.quantization.double=false"]
    recipe = load_recipe("lora-7b", [*words, *both])
    assert str(recipe.model.quantization) == "{type: nf4, double: false}"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"type": "int8", "double": True}, "nf4 or fp4"),
        ({"type": "none", "skip": []}, "int8, nf4 or fp4"),
        ({"double": False}, "int8, nf4 or fp4"),
        ("nf5", "nf4"),
    ],
)
def test_details_that_mean_nothing_are_refused(written, said):
    with pytest.raises(RecipeError, match=said):
        parsed(written)


# --- what the weights are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_and_scores_near_full_precision(folder, kind):
    batch = make_batch([group(9, [7, 12], seed=3)])
    (_, exact), (_, close) = (
        next(score(Scorer(model), [batch], precision="fp32"))
        for model in (load_model(ModelSource(str(folder))), loaded(folder, KINDS[kind]))
    )
    error = (exact.sums - close.sums).abs()
    assert bool(close.sums.isfinite().all())
    assert 0 < float(error.max()) < 8


def test_double_quantization_quantizes_the_scales(folder):
    for double in (True, False):
        state = loaded(folder, {"type": "nf4", "double": double}).model.layers[0].mlp.up_proj.weight.quant_state
        assert state.nested is double
        assert state.absmax.dtype == (torch.uint8 if double else torch.float32)


def test_double_quantization_adds_little_to_the_error_of_4_bit(folder):
    exact = load_model(ModelSource(str(folder))).model.layers[0].mlp.up_proj
    rows = torch.randn(64, exact.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = exact(rows)
        twice, once = (
            loaded(folder, {"type": "nf4", "double": double}).model.layers[0].mlp.up_proj(rows)
            for double in (True, False)
        )
    assert 0 < (twice - once).std() < 0.1 * (once - wanted).std()


def test_only_what_is_not_skipped_is_quantized(folder):
    everything = quantized_layers(loaded(folder, "nf4"))
    assert len(everything) == 14
    assert "lm_head" not in everything
    left = everything - quantized_layers(loaded(folder, {"type": "nf4", "skip": ["lm_head", "down_proj"]}))
    assert left == {f"model.layers.{number}.mlp.down_proj" for number in (0, 1)}
    left = everything - quantized_layers(loaded(folder, {"type": "int8", "skip": ["lm_head", "layers.1.mlp"]}))
    assert left == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert quantized_layers(loaded(folder, {"type": "fp4", "skip": []})) == everything | {"lm_head"}


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4", "nf4, plain scales", "int8, some layers left"])
def test_every_kind_is_a_function_of_the_row(folder, kind):
    layer = loaded(folder, KINDS[kind]).model.layers[1].mlp.up_proj
    rows = torch.randn(5, layer.in_features)
    rows[4] *= 100
    with torch.no_grad():
        alone = torch.cat([layer(row[None]) for row in rows])
        together = layer(rows)
    torch.testing.assert_close(together[:4], alone[:4], rtol=1e-5, atol=2e-6)


def test_the_compute_dtype_is_that_of_the_recipe(folder):
    recipe = make_recipe(folder.parent, reference={"quantization": {"type": "nf4", "compute": "bfloat16"}})
    source = reference_source(recipe)
    assert source.compute == torch.bfloat16
    assert load_model(source).model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert reference_source(make_recipe(folder.parent, reference={"quantization": "nf4"})).compute == torch.float32


def test_a_head_of_another_name_is_skipped_as_lm_head():
    config = tiny_model("llama").config
    assert skipped_layers(config, ["lm_head"], where="x") == ["lm_head"]
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    other = AutoConfig.for_model("bert", is_decoder=True, num_attention_heads=4, **sizes)
    assert skipped_layers(other, ["lm_head"], where="x") == ["cls.predictions.decoder"]


# --- names that are no modules --------------------------------------------------------------------------------------


def test_an_unknown_module_is_refused_with_the_nearest_names_before_weights_are_read(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, reference={"quantization": {"type": "nf4", "skip": ["lm_head", "dwn_proj", "proj"]}})
    monkeypatch.setattr("prefopt.models.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError) as refused:
        prepare(recipe, quiet=True)
    first, second = refused.value.problems
    assert first.where == second.where == "reference.quantization.skip"
    assert first.given == "dwn_proj"
    assert "down_proj" in first.fix
    assert second.given == "proj"


def test_a_head_tied_to_the_embedding_must_be_skipped():
    config = tiny_model("llama", tie_word_embeddings=True).config
    with pytest.raises(ModelError, match="add lm_head"):
        skipped_layers(config, [], where="model.quantization.skip")


# --- identity and mismatch ------------------------------------------------------------------------------------------


def test_every_detail_is_part_of_the_identity(folder):
    prints = {
        identify(ModelSource(str(folder), quantization=parsed(written), compute=compute)).fingerprint
        for written in ["none", *KINDS.values()]
        for compute in (torch.float32,)
    }
    compute = identify(ModelSource(str(folder), quantization="nf4", compute=torch.bfloat16)).fingerprint
    # "nf4 in bfloat16" says its dtype through the source that the recipe makes
    assert len(prints | {compute}) == len(KINDS) + 1


def test_settings_name_the_threshold_the_skipped_and_the_scales():
    int8 = quantization_settings("int8", torch.float32)
    assert int8 == {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": ["lm_head"]}
    nf4 = quantization_settings(QuantizationRecipe(type="nf4", double=False), torch.bfloat16)
    assert nf4["bnb_4bit_use_double_quant"] is False
    assert nf4["bnb_4bit_compute_dtype"] == "bfloat16"
    assert quantization_settings("none", torch.float32) == {}


@pytest.mark.parametrize(
    ("policy", "reference", "said"),
    [
        ("nf4", "none", "error of nf4 against none"),
        ("int8", "none", "error of int8 against none"),
        ("nf4", {"type": "nf4", "double": False}, "rounding of the scales"),
        ({"type": "nf4", "double": False}, "nf4", "rounding of the scales"),
        ("nf4", {"type": "nf4", "skip": ["lm_head", "q_proj"]}, "skips \\(q_proj\\)"),
        ("nf4", {"type": "nf4", "compute": "float32"}, "compute dtype"),
        ("nf4", "int8", "error of nf4 against int8"),
    ],
)
def test_another_quantization_of_the_same_start_is_explained_with_two_ways_out(policy, reference, said):
    mapping = {"data": {"train": "sandbox"}, "loss": "dpo", "adapter": {}}
    with pytest.raises(RecipeError, match=said) as refused:
        recipe_from_mapping(
            {**mapping, "model": {"path": "a/b", "quantization": policy}, "reference": {"quantization": reference}}
        )
    (problem,) = refused.value.problems
    way, other = problem.fix.split("; or ")
    assert "leave the policy unquantized" in other
    assert "max_margin_error" in other
    assert way == f"set reference.quantization={parsed(policy)}"
    recipe_from_mapping(
        {**mapping, "model": {"path": "a/b", "quantization": policy}, "reference": {"quantization": policy}}
    )


@pytest.mark.parametrize("kind", ["nf4, plain scales", "int8, some layers left"])
def test_cached_is_online_with_details(tmp_path, kind):
    make_model(tmp_path / "base", **SIZES)
    recipe = make_recipe(tmp_path, reference={"quantization": KINDS[kind]})
    build_cache(recipe, quiet())
    verify_cache(recipe, quiet(), rehash=True)


def test_qlora_with_details_starts_at_its_reference_and_learns(tmp_path):
    make_model(tmp_path / "base", **SIZES)
    details = {"type": "nf4", "double": False, "skip": ["lm_head", "down_proj"]}
    result = train(
        tmp_path,
        model={"path": str(tmp_path / "base"), "quantization": details},
        adapter={"rank": 4},
        reference={"quantization": details},
        train={"learning_rate": 1e-2, "max_steps": 8},
    )
    assert result["reference"]["max_abs_error"] < 1e-2
    assert result["reference"]["quantization"] == "{type: nf4, double: false, skip: [down_proj, lm_head]}"
    assert result["eval"]["chosen_drift_per_token"] > result["eval"]["rejected_drift_per_token"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_gives_the_same_up_to_its_rounding(folder, kind):
    batch = make_batch([group(9, [7, 12], seed=3)])
    source = ModelSource(str(folder), quantization=parsed(KINDS[kind]), compute=torch.float32)
    sums = [
        next(score(Scorer(load_model(source, torch.device(device))), [batch], precision="fp32"))[1].sums.cpu().numpy()
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(*sums, rtol=0, atol=0.2)


# --- training on it -------------------------------------------------------------------------------------------------


def expanded(model):
    """The same model with what its 4-bit weights stand for, in plain linear layers."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Linear4bit):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                plain.bias = layer.bias
                setattr(module, name, plain)
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("architecture", "written"), [("llama", "nf4"), ("llama", "fp4"), ("phi", "nf4")])
def test_an_adapter_on_4_bit_learns_what_it_learns_on_what_they_stand_for(tmp_path, architecture, written, precision):
    """Also after an evaluation, where bitsandbytes packs weights for a product without a gradient."""
    folder = make_model(tmp_path / "base", architecture, **SIZES)
    batch = make_batch([group(20, [9, 15], seed=1)])

    def gradient(change):
        model = change(loaded(folder, written, compute_dtype(precision)))
        scorer = Scorer(add_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear"))
        for name, weight in scorer.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        with autocast(torch.device("cpu"), precision):
            with evaluating(scorer):
                scorer(batch)
            sums = scorer.train()(batch).sums
        (sums[0] - sums[1]).backward()
        return torch.cat([p.grad.flatten().float() for p in scorer.parameters() if p.grad is not None])

    found, expected = gradient(lambda model: model), gradient(expanded)
    assert float((found - expected).norm() / expected.norm()) < (1e-4 if precision == "fp32" else 0.05)
