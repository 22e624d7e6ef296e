"""A run does what its recipe says, survives being stopped, and leaves files that explain it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_model, make_pairs, make_recipe, quiet, train

import prefopt.train as loop
from prefopt.errors import DataError, Interrupted, ModelError, RecipeError
from prefopt.forward import CompletionLogProbs
from prefopt.tracking import read_metrics
from prefopt.train import run_training


def weights(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def assert_same_weights(one, other, tolerance=0.0):
    """The same bits; or, with a tolerance, weights that differ by rounding alone.

    AdamW divides a gradient by its own size, so a weight whose gradient is next to nothing moves by what rounding made
    of it: one weight in a thousand may be off by ten times the tolerance. (With lr 1e-3 a run moves weights by 4e-3.)
    """
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=10 * tolerance, msg=name)
    off = torch.cat([(one[name].float() - other[name].float()).abs().flatten() for name in one])
    assert (off > tolerance).float().mean() <= 1e-3


def test_a_run_leaves_the_files_that_explain_it(tmp_path):
    result = train(tmp_path, train={"max_steps": 12})
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == result
    assert result["status"] == "finished"
    assert result["steps"] == 12
    assert result["loss"]["name"] == "dpo"
    assert result["loss"]["beta"] == 0.1
    assert result["eval"]["accuracy"] > 0.7
    assert result["eval"]["loss"] < np.log(2)
    low, high = result["eval"]["accuracy_interval"]
    assert low < result["eval"]["accuracy"] < high
    assert result["eval"]["chosen_drift_per_token"] > result["eval"]["rejected_drift_per_token"]
    assert result["eval"]["kl_standard_error"] > 0
    assert result["reference"]["cache_hits"] + result["reference"]["cache_misses"] == 120
    assert result["reference"]["max_abs_error"] < 1e-3
    assert {"train", "conventions", "data", "seed"} <= result.keys()
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"):
        assert (run / name).exists(), name


def test_the_final_model_loads_with_plain_transformers_and_its_card_holds_the_recipe(tmp_path):
    train(tmp_path)
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=2).shape[1] >= 3
    assert "learning_rate: 0.001" in (folder / "README.md").read_text()


def test_another_loss_scores_no_reference_token_again(tmp_path):
    train(tmp_path)
    second = train(
        tmp_path,
        loss={"name": "ipo", "beta": 0.3},
        train={"learning_rate": 5e-4},
        seed=0,
        output=str(tmp_path / "b"),
    )
    assert second["reference"]["cache_misses"] == 0
    assert second["reference"]["tokens_scored"] == 0
    assert second["loss"]["name"] == "ipo"


def test_the_token_budget_changes_no_weight(tmp_path):
    train(tmp_path, train={"token_budget": 40})
    tight = weights(tmp_path)
    train(tmp_path, output=str(tmp_path / "loose"))
    assert_same_weights(tight, load_file(tmp_path / "loose" / "model" / "model.safetensors"), tolerance=2e-5)


def stop_after(monkeypatch, step, how):
    """Do something right after a step was taken and before it is saved."""
    log = loop._log

    def log_then_stop(run, taken, *rest):
        log(run, taken, *rest)
        if taken == step:
            how(run)

    monkeypatch.setattr(loop, "_log", log_then_stop)


def crash(run):
    raise KeyboardInterrupt


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path, output=str(tmp_path / "whole"))
    stop_after(monkeypatch, 5, crash)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    result = train(tmp_path)
    assert_same_weights(weights(tmp_path), load_file(tmp_path / "whole" / "model" / "model.safetensors"))
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["eval"] == whole["eval"]
    lines, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert lines == expected


def test_ctrl_c_saves_the_state_and_the_same_command_goes_on(tmp_path, monkeypatch):
    train(tmp_path, output=str(tmp_path / "whole"))
    stop_after(monkeypatch, 2, lambda run: setattr(run, "stopping", True))
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        train(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    train(tmp_path)
    assert_same_weights(weights(tmp_path), load_file(tmp_path / "whole" / "model" / "model.safetensors"))


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    first = train(tmp_path)
    monkeypatch.setattr(loop, "prepare", crash)
    assert train(tmp_path) == first


def test_a_named_output_never_takes_another_run(tmp_path):
    train(tmp_path)
    with pytest.raises(RecipeError, match=r"loss\.beta"):
        train(tmp_path, loss={"name": "dpo", "beta": 0.5})


def test_the_default_output_moves_on_to_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, output="runs/{recipe}")
    train(tmp_path, output="runs/{recipe}", loss="ipo")
    assert (tmp_path / "runs" / "test-ipo" / "result.json").exists()
    again = train(tmp_path, output="runs/{recipe}", loss="ipo")
    assert again["loss"]["name"] == "ipo"
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["test", "test-ipo"]
    train(tmp_path, output="runs/{recipe}", loss={"name": "ipo", "beta": 0.7})
    assert (tmp_path / "runs" / "test-ipo-2" / "result.json").exists()


def test_online_and_cached_references_train_the_same_policy(tmp_path):
    train(tmp_path)
    train(tmp_path, reference={"cache": "off"}, output=str(tmp_path / "online"))
    assert_same_weights(
        weights(tmp_path), load_file(tmp_path / "online" / "model" / "model.safetensors"), tolerance=2e-5
    )


def test_a_lora_run_saves_an_adapter_that_loads_and_merges(tmp_path):
    result = train(tmp_path, adapter={"rank": 4, "merge": True}, train={"max_steps": 12, "learning_rate": 1e-2})
    assert result["eval"]["accuracy"] > 0.6
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model-merged")
    ids = torch.arange(5, 20)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)


def test_lora_with_the_adapter_switched_off_is_the_cached_reference(tmp_path):
    adapter = {"rank": 4}
    train(tmp_path, adapter=adapter)
    train(tmp_path, adapter=adapter, reference={"cache": "off"}, output=str(tmp_path / "online"))
    one, other = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("run", "online"))
    assert_same_weights(one, other, tolerance=2e-5)


def test_unpaired_feedback_trains_a_loss_of_single_completions(tmp_path):
    make_pairs(tmp_path / "pairs.jsonl", 80, unpaired=True)
    result = train(tmp_path, loss="apo_zero", train={"max_steps": 10})
    assert result["eval"]["chosen_drift_per_token"] > result["eval"]["rejected_drift_per_token"]


def test_a_loss_of_pairs_refuses_unpaired_feedback(tmp_path):
    make_pairs(tmp_path / "pairs.jsonl", unpaired=True)
    with pytest.raises(DataError, match="compares them"):
        train(tmp_path)


def test_sft_scores_no_rejected_completion_and_no_reference_for_training(tmp_path):
    result = train(tmp_path, loss="sft")
    held_out = result["eval"]["comparisons"]
    assert result["reference"]["cache_misses"] <= 2 * held_out
    assert result["eval"]["loss"] > 0


def test_soft_labels_are_used_when_the_loss_asks_for_them(tmp_path):
    make_pairs(tmp_path / "pairs.jsonl", preference_probability=0.6)
    train(tmp_path)
    train(tmp_path, loss={"name": "dpo", "soft_labels": True}, output=str(tmp_path / "soft"))
    hard, soft = weights(tmp_path), load_file(tmp_path / "soft" / "model" / "model.safetensors")
    assert any(not torch.equal(hard[name], soft[name]) for name in hard)


def test_soft_labels_that_the_data_lack_are_an_error_before_any_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.run.load_policy", crash)
    with pytest.raises(DataError, match="preference_probability"):
        train(tmp_path, loss={"name": "dpo", "soft_labels": True})


def test_a_reference_that_is_not_the_policy_is_refused_at_step_0(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)

    def wrong(self, batch):
        return CompletionLogProbs(batch.completion_lengths * -1.0, batch.completion_lengths, None)

    monkeypatch.setattr("prefopt.reference.source.CachedLogps.__call__", wrong)
    with pytest.raises(ModelError, match="untouched policy"):
        run_training(recipe, quiet())


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path):
    with pytest.raises(ModelError, match="finite"):
        train(
            tmp_path,
            loss={"name": "gpo_exponential", "beta": 1e9},
            train={"learning_rate": 10.0, "max_grad_norm": None},
        )


def test_gradient_checkpointing_and_bf16_run(tmp_path):
    result = train(tmp_path, train={"gradient_checkpointing": True, "precision": "bf16", "max_steps": 8})
    assert result["eval"]["accuracy"] > 0.5
    assert result["train"]["gradient_checkpointing"] is True


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_keep_8_bit_moments_learn_and_resume(tmp_path, monkeypatch, optimizer):
    """Tensors below 4,096 numbers keep their moments in 32 bit, so that the matrices here are larger."""
    make_model(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    settings = {"optimizer": optimizer, "max_steps": 8}
    whole = train(tmp_path, train=settings, output=str(tmp_path / "whole"))
    assert whole["eval"]["chosen_drift_per_token"] > whole["eval"]["rejected_drift_per_token"]
    moments = torch.load(tmp_path / "whole" / "checkpoints" / "step-00000008" / "optimizer.pt", weights_only=True)
    (packed,) = {name for state in moments["state"].values() for name in state if "quant_state" in name}
    assert torch.uint8 in {state[packed]["state1"].dtype for state in moments["state"].values()}
    stop_after(monkeypatch, 5, crash)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, train=settings)
    monkeypatch.undo()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    train(tmp_path, train=settings)
    assert_same_weights(weights(tmp_path), load_file(tmp_path / "whole" / "model" / "model.safetensors"))


def test_the_best_checkpoint_is_kept(tmp_path):
    train(tmp_path, checkpoint={"every": 2, "keep": 1, "best": "eval.loss"}, eval={"every": 2})
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-00000006" in kept


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_policy_with_an_adapter_starts_at_its_equally_quantized_reference(tmp_path, quantization):
    """The QLoRA rule: the same quantized base on both sides, or the first margin is already wrong."""
    result = train(
        tmp_path,
        model={"path": str(make_recipe(tmp_path).model.path), "quantization": quantization},
        adapter={"rank": 4},
        reference={"quantization": quantization},
        train={"learning_rate": 1e-2, "max_steps": 10},
    )
    assert result["reference"]["max_abs_error"] < 1e-2
    assert result["eval"]["chosen_drift_per_token"] > result["eval"]["rejected_drift_per_token"]


def test_a_quantized_policy_with_another_reference_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="quantization"):
        make_recipe(
            tmp_path, model={"path": str(make_recipe(tmp_path).model.path), "quantization": "nf4"}, adapter={"rank": 4}
        )
