"""A reference that follows the policy: the formula by hand, what is said, what survives a kill, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import assert_same_weights, crash, stop_after, weights
from tiny import group, tiny_model
from world import make_recipe, train

import prefopt.train as loop
from prefopt.adapters import MOVING, acting_with, add_lora, keep_frozen, pairs
from prefopt.batching import make_batch
from prefopt.errors import ModelError, RecipeError
from prefopt.forward import Scorer
from prefopt.prepare import prepare
from prefopt.recipe.schema import SyncRecipe
from prefopt.reference.moving import FOLDER, AdapterLogps, MovingReference, mix_in, model_pairs
from prefopt.reference.source import OnlineLogps
from prefopt.train import run_training

SYNC = {"sync": {"every": 2, "mix": 0.6}}


def batch():
    return make_batch([group(9, [7, 12], seed=3)])


def moved(model, seed):
    """Move every trainable weight, as a policy does between two syncs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def watch(monkeypatch, see):
    """Call `see(run, step)` after every step of a run."""
    log = loop._log

    def log_and_see(run, step, *rest):
        see(run, step)
        log(run, step, *rest)

    monkeypatch.setattr(loop, "_log", log_and_see)


def snapshot(tensors):
    return {name: value.detach().clone() for name, value in tensors}


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.25, 0.6, 1.0])
def test_two_syncs_are_the_formula_by_hand(mix):
    policy, reference = Scorer(tiny_model("llama")), Scorer(tiny_model("llama"))
    moving = MovingReference(
        OnlineLogps(reference, precision="fp32"), model_pairs(policy, reference), SyncRecipe(every=3, mix=mix)
    )
    expected = {name: value.double().numpy() for name, value in snapshot(policy.model.named_parameters()).items()}
    for step in range(1, 8):
        moved(policy.model, step)
        moving.after_step(step)
        if step in (3, 6):
            for name, value in policy.model.named_parameters():
                expected[name] = mix * value.detach().double().numpy() + (1 - mix) * expected[name]
    for name, value in reference.model.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], atol=1e-6)
    last = dict(policy.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert not np.allclose(last.detach().numpy(), expected["model.layers.0.mlp.up_proj.weight"], atol=1e-4)


def adapted(*, targets="all-linear"):
    """A base with a trained adapter that has moved, and a second, frozen one that started where it did."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_lora(tiny_model("llama"), rank=3, alpha=6, dropout=0.0, targets=targets)
    keep_frozen(model, MOVING)
    return model


def test_the_moving_adapter_starts_as_the_policy_and_never_trains():
    model = adapted()
    assert len(pairs(model, MOVING)) == 2 * 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(pairs(model, MOVING))
    policy = Scorer(model)
    moving = AdapterLogps(policy, adapter=MOVING, precision="fp32")
    with torch.no_grad():
        assert torch.equal(moving(batch()).sums, policy(batch()).sums)
    moved(model, 1)
    with torch.no_grad():
        before, other = moving(batch()).sums, policy(batch()).sums
        assert not torch.allclose(before, other)
        with model.disable_adapter():
            assert torch.allclose(before, policy(batch()).sums, atol=1e-5)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_an_adapter_that_is_replaced_is_the_policy():
    model = adapted()
    moved(model, 1)
    mix_in(pairs(model, MOVING), mix=1)
    policy = Scorer(model)
    with torch.no_grad():
        assert torch.equal(AdapterLogps(policy, adapter=MOVING, precision="fp32")(batch()).sums, policy(batch()).sums)


def test_mixing_the_factors_differs_from_mixing_their_product_by_the_stated_term():
    """m(1-m)(Bp-Br)(Ap-Ar): second order in what the policy moved since the last sync."""
    model, mix = adapted(targets=["up_proj"]), 0.6
    moved(model, 1)
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def factors(name):
        return layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone()

    (ap, bp), (ar, br) = factors("default"), factors(MOVING)
    mix_in(pairs(model, MOVING), mix=mix)
    a, b = factors(MOVING)
    exact = mix * bp @ ap + (1 - mix) * br @ ar
    torch.testing.assert_close(b @ a, exact - mix * (1 - mix) * (bp - br) @ (ap - ar), rtol=0, atol=1e-6)


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["all weights", "lora"])
def test_a_run_moves_its_reference_and_only_at_its_steps(tmp_path, monkeypatch, adapter):
    seen = {}

    def see(run, step):
        state = {name: (a.clone(), b.detach().clone()) for name, (a, b) in run.reference.moving.pairs.items()}
        seen[step] = state

    watch(monkeypatch, see)
    result = train(tmp_path, reference=SYNC, adapter=adapter, train={"max_steps": 5}, tracking={"every": 1})
    assert sorted(seen) == [1, 2, 3, 4, 5]
    for name in seen[1]:
        first, after, fourth = seen[1][name][0], seen[2][name][0], seen[4][name][0]
        torch.testing.assert_close(after, 0.6 * seen[2][name][1] + 0.4 * first, rtol=0, atol=1e-6)
        assert torch.equal(seen[3][name][0], after)
        torch.testing.assert_close(fourth, 0.6 * seen[4][name][1] + 0.4 * after, rtol=0, atol=1e-6)
        assert torch.equal(seen[5][name][0], fourth)
    assert result["reference"]["max_abs_error"] < 1e-3


def test_a_moving_reference_trains_another_policy(tmp_path):
    train(tmp_path, train={"max_steps": 6})
    train(tmp_path, train={"max_steps": 6}, reference=SYNC, output=str(tmp_path / "moving"))
    still, moving = weights(tmp_path), load_file(tmp_path / "moving" / "model" / "model.safetensors")
    assert any(not torch.allclose(still[name], moving[name], atol=1e-5) for name in still)


def test_a_reference_that_moves_by_nothing_trains_the_same_policy(tmp_path):
    """mix close to 0 is the run without sync: the loop reads the right model before the first sync and after it."""
    train(tmp_path)
    nothing = {"sync": {"every": 2, "mix": 1e-12}}
    train(tmp_path, reference=nothing, output=str(tmp_path / "moving"))
    moving = load_file(tmp_path / "moving" / "model" / "model.safetensors")
    assert_same_weights(weights(tmp_path), moving, tolerance=2e-5)


def test_held_out_data_are_measured_against_the_initial_reference(tmp_path):
    """After a sync with mix 1 in the last step, the moving reference is the policy; the measures are not 0."""
    result = train(tmp_path, reference={"sync": {"every": 1, "mix": 1.0}}, train={"learning_rate": 1e-2})
    assert abs(result["eval"]["chosen_drift_per_token"]) > 1e-3  # against a reference that was replaced it would be 0
    assert result["eval"]["kl"] != 0
    cached = train(tmp_path, reference=SYNC, output=str(tmp_path / "b"))
    online = train(tmp_path, reference={**SYNC, "cache": "off"}, output=str(tmp_path / "c"))
    for name, value in cached["eval"].items():
        assert online["eval"][name] == pytest.approx(value, abs=1e-4), name


def test_no_training_completion_is_cached_and_the_run_says_so(tmp_path):
    prepared = prepare(make_recipe(tmp_path, reference=SYNC), quiet=True)
    assert [name for name, _ in prepared.read_by_reference()] == ["eval"]
    assert [name for name, _ in prepared.read_by_moving_reference()] == ["train"]
    result = train(tmp_path, reference=SYNC)
    assert result["reference"]["cache_hits"] + result["reference"]["cache_misses"] <= 2 * result["eval"]["comparisons"]
    from rich.console import Console

    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    run_training(make_recipe(tmp_path, reference=SYNC, output=str(tmp_path / "b")), console)
    said = " ".join(console.export_text().split())
    assert "the reference moves every 2 steps: its log-probs are computed in every step and not cached" in said
    assert "against the initial reference" in said


def test_mismatched_partners_of_the_training_data_move_too(tmp_path):
    result = train(tmp_path, loss="kto", reference=SYNC, train={"max_steps": 4})
    assert np.isfinite(result["eval"]["loss"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": {"rank": 4}}, {"reference": {"sync": {"every": 4, "mix": 1.0}}}],
    ids=["all weights", "lora", "hard, before the first sync"],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, changes):
    changes = {"reference": SYNC, "eval": {"every": 0}, **changes}
    name = "adapter_model.safetensors" if "adapter" in changes else "model.safetensors"
    whole = train(tmp_path, **changes, output=str(tmp_path / "whole"))
    for step in (4, 5):
        stop_after(monkeypatch, step, crash)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **changes)
        monkeypatch.undo()
        monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    result = train(tmp_path, **changes)
    one, other = (load_file(tmp_path / run / "model" / name) for run in ("run", "whole"))
    assert_same_weights(one, other)
    assert result["eval"] == whole["eval"]


def test_only_the_files_that_checkpoints_need_are_kept(tmp_path):
    train(tmp_path, reference=SYNC, train={"max_steps": 8}, checkpoint={"every": 2, "keep": 2})
    kept = sorted(file.name for file in (tmp_path / "run" / FOLDER).iterdir())
    assert kept == ["step-00000006.safetensors", "step-00000008.safetensors"]


def test_a_lost_reference_is_not_replaced_by_another(tmp_path, monkeypatch):
    stop_after(monkeypatch, 5, crash)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, reference=SYNC)
    monkeypatch.undo()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    for file in (tmp_path / "run" / FOLDER).iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="checkpoint of step 4"):
        train(tmp_path, reference=SYNC)


def test_the_saved_adapter_is_the_policys_alone(tmp_path):
    train(tmp_path, reference=SYNC, adapter={"rank": 4, "merge": True})
    assert sorted(one.name for one in (tmp_path / "run" / "model").iterdir() if one.is_dir()) == []
    assert (tmp_path / "run" / "model-merged" / "model.safetensors").exists()


def test_the_record_says_how_the_reference_moved(tmp_path):
    result = train(tmp_path, reference=SYNC, train={"max_steps": 5})
    expected = {"every": 2, "mix": 0.6, "syncs": 2, "evaluated_against": "initial"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["reference"]["sync"] == expected
    assert result["reference"]["sync"] == expected
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "moved towards the policy" in " ".join(card.split())


def test_a_quantized_base_keeps_its_bits_while_the_adapters_move(tmp_path, monkeypatch):
    kept = []

    def see(run, step):
        packed = [p.detach().clone() for p in run.scorer.parameters() if p.dtype == torch.uint8]
        kept.append(packed)

    watch(monkeypatch, see)
    model = {"path": str(make_recipe(tmp_path).model.path), "quantization": "nf4"}
    result = train(
        tmp_path, model=model, adapter={"rank": 4}, reference={"quantization": "nf4", **SYNC}, tracking={"every": 1}
    )
    assert result["reference"]["max_abs_error"] < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[-1]))
    assert kept[0]


def test_switching_adapters_survives_an_error():
    model = adapted()
    moved(model, 1)
    with pytest.raises(ZeroDivisionError), acting_with(model, MOVING):
        1 / 0  # noqa: B018
    assert model.active_adapter == "default"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"reference": {**SYNC, "cache": "some/folder"}}, "reference.cache", "no cache can hold"),
        ({"reference": {**SYNC, "quantization": "nf4"}}, "reference.quantization", "hold no mixture"),
        ({"reference": {**SYNC, "quantization": "int8"}, "adapter": {}}, "reference.quantization", "second adapter"),
        ({"reference": {**SYNC, "model": "another/model"}}, "reference.model", "starts as the policy"),
        ({"reference": {"sync": {"mix": 1.5, "every": 1}}}, "reference.sync.mix", "at most 1"),
        ({"reference": {"sync": {"every": 7}}}, "reference.sync.every", "never move"),
    ],
)
def test_what_cannot_move_is_refused_with_the_reason(tmp_path, changes, where, said):
    with pytest.raises(RecipeError) as refused:
        make_recipe(tmp_path, **changes)
    (problem,) = refused.value.problems
    assert problem.where == where
    assert said in problem.expected
    assert problem.fix


def test_epochs_too_short_for_a_sync_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="never move"):
        train(tmp_path, reference={"sync": {"every": 512}}, train={"max_steps": None, "epochs": 1.0})


def test_a_loss_without_reference_has_nothing_to_move(tmp_path):
    with pytest.raises(RecipeError, match="reads no reference"):
        prepare(make_recipe(tmp_path, loss="simpo", reference=SYNC), quiet=True)


def test_the_shipped_recipe_is_one_of_a_moving_reference():
    from prefopt.recipe import load_recipe

    recipe = load_recipe("tr-dpo")
    assert (recipe.reference.sync.every, recipe.reference.sync.mix) == (512, 0.6)
    assert recipe.reference.cache == "auto"
