"""Training goes on from an adapter: its frozen copy is the reference, in the cache, online, and at evaluation."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import assert_same_weights, crash, stop_after
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from world import make_model, make_recipe, quiet, train

import prefopt.models as models
import prefopt.train as loop
from prefopt.adapters import (
    FROZEN,
    MOVING,
    AdapterSource,
    acting_with,
    add_lora,
    keep_frozen,
    keep_initial,
    load_adapter,
)
from prefopt.errors import ModelError, RecipeError
from prefopt.evaluate_run import evaluate_run
from prefopt.export import export_run
from prefopt.models import ModelSource, load_model
from prefopt.policy import load_policy
from prefopt.prepare import prepare, reference_source
from prefopt.probe import probe_group
from prefopt.reference.commands import build_cache, verify_cache
from prefopt.reference.identity import identify


def make_adapter(folder, base, *, seed=1, rank=3, alpha=6.0, architecture="llama", **changes):
    """An adapter of random, large weights: with it the model is another than its base."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = tiny_model(architecture, **changes) if base is None else AutoModelForCausalLM.from_pretrained(base)
        model = add_lora(start, rank=rank, alpha=alpha, dropout=0.1, targets="all-linear")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    make_recipe(tmp_path)
    return make_adapter(tmp_path / "sft", tmp_path / "base")


def from_adapter(adapter, **changes):
    return {"adapter": {"path": str(adapter)}, **changes}


def tensors(file):
    return load_file(file / "adapter_model.safetensors")


# --- a second adapter beside it --------------------------------------------------------------------------------------


def saved_by_peft(folder, architecture, **settings):
    """A base, and an adapter that peft made of it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        make_model(folder / "base", architecture)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
            LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], **settings),
        )
    model.save_pretrained(folder / "adapter")
    source = AdapterSource(str(folder / "adapter"))
    return load_adapter(load_model(ModelSource(str(folder / "base"))), source, trainable=True), source


@pytest.mark.parametrize("start", ["pissa", "olora", True])
def test_the_base_stays_what_it_is_however_the_adapter_started(tmp_path, start):
    model, source = saved_by_peft(tmp_path, "llama", init_lora_weights=start)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        keep_frozen(model, MOVING)
        keep_initial(model, source)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        for name in (MOVING, FROZEN):
            with acting_with(model, name):
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_trained_biases_get_a_gradient_and_no_second_adapter(tmp_path):
    model, source = saved_by_peft(tmp_path, "qwen2", bias="lora_only")
    model(torch.arange(3, 20)[None]).logits.square().mean().backward()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad]
    assert len(biases) == 2
    assert all(bool(p.grad.abs().sum()) for p in biases)
    with pytest.raises(ModelError, match="without trained biases"):
        keep_initial(model, source)


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_with_the_frozen_adapter(tmp_path, adapter):
    recipe = make_recipe(tmp_path, **from_adapter(adapter))
    source = reference_source(recipe)
    assert source.adapter == AdapterSource(str(adapter))
    reference = load_model(source)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    ids = torch.arange(5, 20)[None]
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    with torch.no_grad():
        assert torch.equal(reference(ids).logits, whole(ids).logits)
        assert not torch.allclose(reference(ids).logits, load_model(ModelSource(source.path))(ids).logits, atol=0.1)


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_margins_are_0_before_the_first_step(tmp_path, adapter, cache, precision):
    result = train(
        tmp_path, **from_adapter(adapter), reference={"cache": cache}, train={"precision": precision, "max_steps": 2}
    )
    assert result["reference"]["max_abs_error"] < (1e-4 if precision == "fp32" else 0.2)


def test_cached_and_online_train_the_same_adapter(tmp_path, adapter):
    cached = train(tmp_path, **from_adapter(adapter))
    online = train(tmp_path, **from_adapter(adapter), reference={"cache": "off"}, output=str(tmp_path / "online"))
    assert_same_weights(tensors(tmp_path / "run" / "model"), tensors(tmp_path / "online" / "model"), tolerance=2e-5)
    for name in ("loss", "margin", "kl", "chosen_drift_per_token"):
        assert online["eval"][name] == pytest.approx(cached["eval"][name], abs=1e-4)


def test_the_policys_own_path_as_the_reference_means_the_adapter_too(tmp_path, adapter):
    recipe = make_recipe(tmp_path, **from_adapter(adapter), reference={"model": str(tmp_path / "base")})
    assert reference_source(recipe).adapter is not None
    other = make_recipe(tmp_path, **from_adapter(adapter), reference={"model": "another/model"})
    assert reference_source(other).adapter is None


def test_the_adapter_and_its_scaling_are_part_of_the_identity(tmp_path, adapter):
    def fingerprint(folder):
        source = None if folder is None else AdapterSource(str(folder))
        return identify(ModelSource(str(tmp_path / "base"), adapter=source)).fingerprint

    alone, first = fingerprint(None), fingerprint(adapter)
    other = fingerprint(make_adapter(tmp_path / "other", tmp_path / "base", seed=2))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 12}))
    scaled = fingerprint(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.3}))
    assert fingerprint(adapter) == first
    assert len({alone, first, other, scaled}) == 4


def test_the_cache_knows_the_adapter(tmp_path, adapter, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(tmp_path, **from_adapter(adapter))
    build_cache(recipe, quiet())
    verify_cache(recipe, quiet(), rehash=True)
    again = train(tmp_path, **from_adapter(adapter), loss="ipo")
    assert again["reference"]["cache_misses"] == 0
    fresh = train(tmp_path, adapter={"rank": 3}, output=str(tmp_path / "fresh"))
    assert fresh["reference"]["cache_hits"] == 0


# --- the policy -----------------------------------------------------------------------------------------------------


def test_training_goes_on_from_the_adapter_and_saves_it_alone(tmp_path, adapter):
    result = train(tmp_path, adapter={"path": str(adapter), "merge": True}, train={"learning_rate": 1e-2})
    before, after = tensors(adapter), tensors(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    assert all(0 < float((before[name] - after[name]).abs().max()) < 0.2 for name in before)
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 6.0)
    assert not [one for one in (tmp_path / "run" / "model").iterdir() if one.is_dir()]
    ids = torch.arange(5, 20)[None]
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for merged in (tmp_path / "run" / "model-merged", export_run(tmp_path / "run")):
        merged_logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        torch.testing.assert_close(adapted(ids).logits, merged_logits, rtol=0, atol=1e-4)
    assert result["eval"]["chosen_drift_per_token"] > result["eval"]["rejected_drift_per_token"]


def test_the_run_is_evaluated_again_against_the_same_reference(tmp_path, adapter):
    result = train(tmp_path, **from_adapter(adapter))
    again = evaluate_run(tmp_path / "run", quiet())
    for name in ("loss", "kl", "chosen_drift_per_token"):
        assert again[name] == pytest.approx(result["eval"][name], abs=1e-4)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, adapter, monkeypatch):
    changes = from_adapter(adapter, reference={"sync": {"every": 2, "mix": 0.6}, "cache": "off"})
    train(tmp_path, **changes, output=str(tmp_path / "whole"))
    stop_after(monkeypatch, 5, crash)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **changes)
    monkeypatch.undo()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    train(tmp_path, **changes)
    assert_same_weights(tensors(tmp_path / "run" / "model"), tensors(tmp_path / "whole" / "model"))


def test_a_quantized_base_carries_the_adapter(tmp_path, adapter):
    model = {"path": str(tmp_path / "base"), "quantization": "nf4"}
    result = train(tmp_path, model=model, **from_adapter(adapter), reference={"quantization": "nf4"})
    assert result["reference"]["max_abs_error"] < 1e-2


def test_the_adapters_dropout_is_that_of_the_recipe(tmp_path, adapter):
    probe = probe_group(prepare(make_recipe(tmp_path, **from_adapter(adapter)), quiet=True).data.train)
    policy = load_policy(make_recipe(tmp_path, **from_adapter(adapter)), probe)
    assert {module.p for module in policy.scorer.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_the_adapter_says_itself_is_not_said_twice(tmp_path):
    with pytest.raises(RecipeError) as refused:
        make_recipe(tmp_path, adapter={"path": "some/adapter", "rank": 8, "alpha": 16, "targets": ["up_proj"]})
    assert [problem.where for problem in refused.value.problems] == ["adapter.rank", "adapter.alpha", "adapter.targets"]
    assert all("adapter={path: some/adapter}" in problem.fix for problem in refused.value.problems)


def test_the_record_of_a_run_loads_to_the_same_recipe(tmp_path):
    recipe = make_recipe(tmp_path, adapter={"path": "some/adapter", "revision": "v2"})
    assert "rank" not in recipe.to_mapping()["adapter"]
    assert make_recipe(tmp_path, **recipe.to_mapping()) == recipe


def refusal(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("prefopt.models.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError) as refused:
        prepare(make_recipe(tmp_path, adapter={"path": str(adapter)}), quiet=True)
    (problem,) = refused.value.problems
    assert problem.where == "adapter.path"
    assert problem.fix
    return f"{problem.expected} {problem.given}"


def test_an_adapter_of_other_sizes_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    make_recipe(tmp_path)
    wide = make_adapter(tmp_path / "wide", None, hidden_size=64)
    assert "in the adapter" in refusal(tmp_path, wide, monkeypatch)


def test_an_adapter_of_another_architecture_is_refused(tmp_path, monkeypatch):
    make_recipe(tmp_path)
    foreign = make_adapter(tmp_path / "foreign", None, architecture="gpt2")
    assert "which the base does not have" in refusal(tmp_path, foreign, monkeypatch)


def test_an_adapter_of_other_weights_is_refused(tmp_path, monkeypatch):
    make_recipe(tmp_path)
    other = make_model(tmp_path / "other", seed=7)
    adapter = make_adapter(tmp_path / "sft", other)
    said = refusal(tmp_path, adapter, monkeypatch)
    assert str(other) in said
    assert "other weights" in said


def test_a_copy_of_the_base_is_the_base(tmp_path):
    make_recipe(tmp_path)
    adapter = make_adapter(tmp_path / "sft", make_model(tmp_path / "copy"))
    prepare(make_recipe(tmp_path, adapter={"path": str(adapter)}), quiet=True)


def test_folders_that_hold_no_adapter_are_refused(tmp_path, monkeypatch):
    make_recipe(tmp_path)
    damaged = make_adapter(tmp_path / "damaged", tmp_path / "base") / "adapter_model.safetensors"
    assert "config.json" in refusal(tmp_path, tmp_path / "base", monkeypatch)
    damaged.write_bytes(b"nothing")
    assert "read back" in refusal(tmp_path, damaged.parent, monkeypatch)


def test_another_kind_of_adapter_is_refused(tmp_path, adapter, monkeypatch):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings = {"peft_type": "IA3", "task_type": settings["task_type"], "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "a LoRA adapter" in refusal(tmp_path, adapter, monkeypatch)


def test_an_adapter_with_missing_tensors_is_refused(tmp_path, adapter):
    stored = tensors(adapter)
    stored.pop(next(name for name in stored if "lora_B" in name))
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="missing adapter keys"):
        load_adapter(load_model(ModelSource(str(tmp_path / "base"))), AdapterSource(str(adapter)), trainable=True)


# --- no model in memory that is not needed --------------------------------------------------------------------------


class Watched:
    """Counts the models that are alive, by weak references taken where models are loaded."""

    def __init__(self, monkeypatch):
        self.models: list[tuple[str, weakref.ref]] = []
        load = models.load_model
        for place in ("policy", "reference.opening"):
            monkeypatch.setattr(f"prefopt.{place}.load_model", self._watching(place, load))

    def _watching(self, place, load):
        def watching(source, *rest):
            if place == "policy":
                assert self.alive("reference.opening") == 0, "the reference is in memory while the policy loads"
            model = load(source, *rest)
            self.models.append((place, weakref.ref(model)))
            return model

        return watching

    def alive(self, place):
        if any(model() is not None for one, model in self.models if one == place):
            gc.collect()  # half a second: not where nothing is left to be found
        return sum(model() is not None for name, model in self.models if name == place)

    def loaded(self, place):
        return sum(name == place for name, _ in self.models)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_reference_is_in_memory_while_the_policy_trains_from_a_cache(tmp_path, monkeypatch, quantization):
    watched, alive = Watched(monkeypatch), []
    log = loop._log

    def look(run, step, *rest):
        alive.append((watched.alive("policy"), watched.alive("reference.opening")))
        log(run, step, *rest)

    monkeypatch.setattr(loop, "_log", look)
    reference = {"quantization": quantization, "cache": str(tmp_path / "empty")}
    train(tmp_path, train={"max_steps": 2}, eval={"every": 1}, reference=reference)
    assert alive == [(1, 0)] * 2
    assert watched.loaded("policy") == 1
    assert watched.loaded("reference.opening") >= 3  # to fill the cache, to write samples, to judge the policy's
    assert watched.alive("reference.opening") == 0


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_an_adapter_needs_no_second_base_in_the_loop(tmp_path, adapter, monkeypatch, cache, pretrained):
    watched = Watched(monkeypatch)
    section = {"path": str(adapter)} if pretrained else {"rank": 2}
    where = str(tmp_path / "empty") if cache == "on" else "off"
    train(tmp_path, adapter=section, reference={"cache": where}, eval={"every": 2})
    assert watched.loaded("reference.opening") == (1 if cache == "on" else 0)  # to fill the cache, before the policy


def test_a_moving_reference_is_the_only_second_model(tmp_path, monkeypatch):
    watched, alive = Watched(monkeypatch), []
    log = loop._log

    def look(run, step, *rest):
        alive.append(watched.alive("reference.opening"))
        log(run, step, *rest)

    monkeypatch.setattr(loop, "_log", look)
    train(tmp_path, reference={"sync": {"every": 1}}, train={"max_steps": 2})
    assert alive == [1] * 2
    assert watched.alive("reference.opening") == 0


def test_the_frozen_adapter_is_not_trained_and_moves_no_bit(tmp_path, adapter, monkeypatch):
    kept, log = [], loop._log

    def look(run, step, *rest):
        frozen = {name: p for name, p in run.scorer.named_parameters() if f".{FROZEN}." in name}
        assert not any(p.requires_grad for p in frozen.values())
        kept.append({name: p.detach().clone() for name, p in frozen.items()})
        log(run, step, *rest)

    monkeypatch.setattr(loop, "_log", look)
    train(tmp_path, **from_adapter(adapter), reference={"cache": "off"}, tracking={"every": 1})
    assert kept[0]
    assert_same_weights(kept[0], kept[-1])
    stored = {name.replace(".weight", ""): value for name, value in tensors(adapter).items()}
    for name, value in kept[-1].items():
        np.testing.assert_array_equal(value, stored[name.replace(f".{FROZEN}.weight", "").removeprefix("model.")])
