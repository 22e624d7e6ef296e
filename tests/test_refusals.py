"""What cannot be right is refused before it costs anything, with where, what was given and what to do."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import make_model, make_pairs, make_recipe, make_tokenizer, quiet, train

import prefopt.train as loop
from prefopt.checkpoint import checkpoint_folders
from prefopt.errors import CacheError, DataError, ModelError, RecipeError, UserError
from prefopt.models import ModelSource
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.commands import build_cache, verify_cache
from prefopt.reference.identity import identify
from prefopt.train import run_training


def refused(folder, error=UserError, **changes) -> str:
    """The problems of a refused run, each of which says what to do."""
    with pytest.raises(error) as refusal:
        train(folder, **changes)
    assert all(problem.expected and problem.fix for problem in refusal.value.problems)
    return str(refusal.value)


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_weights_that_the_files_lack_are_not_made_up(tmp_path):
    edit_weights(make_model(tmp_path / "base"), lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight" in refused(tmp_path, ModelError)


def test_weights_that_are_no_numbers_are_named_as_such(tmp_path):
    edit_weights(make_model(tmp_path / "base"), lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    assert "NaN" in refused(tmp_path, ModelError)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "bf16-pure"), ("float16", "fp32")])
def test_weights_too_coarse_for_their_updates_are_refused(tmp_path, dtype, precision):
    model = {"path": str(make_model(tmp_path / "base")), "dtype": dtype}
    assert "model.dtype" in refused(tmp_path, RecipeError, model=model, train={"precision": precision})


def test_a_launcher_cannot_change_the_gradient(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tmp_path, output=str(tmp_path / "launched"))
    plain, launched = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "launched"))
    assert all(torch.equal(plain[name], launched[name]) for name in plain)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "2 processes" in refused(tmp_path, RecipeError)


def test_dropout_follows_the_seed_and_not_the_process(tmp_path):
    settings = {"adapter": {"rank": 4, "dropout": 0.5}}
    torch.manual_seed(1)
    train(tmp_path, **settings)
    torch.manual_seed(2)
    train(tmp_path, output=str(tmp_path / "again"), **settings)
    first, again = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["train"]["layout"] == "unshared"


def test_an_adapters_scaling_is_part_of_the_references_identity(tmp_path):
    folder = make_model(tmp_path / "base")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
    before = identify(ModelSource(str(folder))).fingerprint
    (folder / "adapter_config.json").write_text('{"lora_alpha": 80}')
    assert identify(ModelSource(str(folder))).fingerprint != before


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    changes = {
        "loss": {"name": "gpo_exponential", "beta": 0.1},
        "train": {"learning_rate": 1e15},
        "tracking": {"every": 5},
        "checkpoint": {"every": 1},
    }
    assert "finite" in refused(tmp_path, ModelError, **changes)
    for folder in checkpoint_folders(tmp_path / "run"):
        assert all(bool(value.isfinite().all()) for value in load_file(folder / "trainable.safetensors").values())


def test_the_best_checkpoint_is_saved_when_it_is_measured(tmp_path):
    result = train(
        tmp_path,
        train={"max_steps": 12, "learning_rate": 5e-3},
        eval={"every": 3},
        checkpoint={"every": 4, "keep": 1, "best": "eval.loss"},
    )
    kept = [folder.name for folder in checkpoint_folders(tmp_path / "run")]
    assert f"step-{result['best']['step']:08d}" in kept
    looks = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["best"]["value"] == min(look["eval/loss"] for look in looks if "eval/loss" in look)


@pytest.mark.parametrize(
    ("best", "changes"),
    [
        ("eval.acuracy", {}),
        ("eval.gold_reward.policy", {}),
        ("eval.accuracy", {"data": {"eval_fraction": 0.0}}),
    ],
)
def test_a_best_metric_that_is_not_measured_is_refused_before_training(tmp_path, best, changes):
    assert "checkpoint.best" in refused(tmp_path, checkpoint={"best": best}, **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    other = make_model(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w3":', '"x3":'))
    assert "reference.model" in refused(tmp_path, ModelError, reference={"model": str(other)})


def test_a_reference_with_tokens_of_its_own_is_accepted(tmp_path):
    other = make_model(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    assert train(tmp_path, reference={"model": str(other)})["status"] == "finished"


def test_a_reference_that_is_another_model_of_the_same_family_is_accepted(tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    result = train(tmp_path, reference={"model": str(other)})
    assert result["reference"]["max_abs_error"] is None


def test_data_that_changed_under_a_run_are_noticed(tmp_path):
    train(tmp_path)
    make_pairs(tmp_path / "pairs.jsonl", 30, seed=7)
    assert "content of" in refused(tmp_path, RecipeError)


def test_a_file_added_to_a_data_folder_is_noticed_and_a_readme_of_the_model_is_not(tmp_path):
    (tmp_path / "rows").mkdir()
    make_pairs(tmp_path / "rows" / "a.jsonl")
    data = {"train": str(tmp_path / "rows")}
    first = train(tmp_path, data=data)
    (tmp_path / "base" / "README.md").write_text("about this model")
    assert train(tmp_path, data=data) == first
    make_pairs(tmp_path / "rows" / "b.jsonl", seed=3)
    assert "content of" in refused(tmp_path, RecipeError, data=data)


def test_a_folder_that_another_run_is_setting_up_is_passed_by(tmp_path, monkeypatch):
    from prefopt.run_folder import claim_folder

    monkeypatch.chdir(tmp_path)
    holder = claim_folder(make_recipe(tmp_path, output="runs/{recipe}"))
    other = claim_folder(make_recipe(tmp_path, output="runs/{recipe}", loss="ipo"))
    assert (holder.path.name, other.path.name) == ("test", "test-ipo")
    holder.release()
    other.release()


def test_an_end_of_sequence_token_is_not_unknown_text(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    tokenizer.save_pretrained(make_model(tmp_path / "base"))
    assert train(tmp_path)["data"]["unknown_tokens"] == 0


def test_a_run_that_failed_before_it_began_leaves_its_folder_free(tmp_path):
    refused(tmp_path, model=str(tmp_path / "nowhere"))
    assert train(tmp_path)["status"] == "finished"


def test_keys_that_change_no_number_may_change_under_a_run(tmp_path):
    first = train(tmp_path)
    assert train(tmp_path, eval={"show": 2}, tracking={"every": 3}) == first


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    from prefopt.run_folder import claim_folder

    recipe = make_recipe(tmp_path)
    holder = claim_folder(recipe)
    with pytest.raises(RecipeError, match="no other process"):
        run_training(recipe, quiet())
    holder.release()
    run_training(recipe, quiet())


def test_a_run_whose_result_was_lost_is_finished_again_with_its_own_figures(tmp_path):
    first = train(tmp_path)
    (tmp_path / "run" / "result.json").unlink()
    second = train(tmp_path)
    for name in ("loss", "comparisons", "seconds"):
        assert second["train"][name] == first["train"][name]
    assert second["eval"] == first["eval"]


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.pt", "random.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, monkeypatch, file):
    monkeypatch.setattr(loop, "finish_run", lambda *_, **__: {})
    train(tmp_path, checkpoint={"every": 2})
    newest = checkpoint_folders(tmp_path / "run")[-1]
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    assert newest.name in refused(tmp_path, ModelError, checkpoint={"every": 2})
    shutil.rmtree(newest)
    train(tmp_path, checkpoint={"every": 2})


def test_rehash_corrects_what_it_finds(tmp_path):
    recipe = make_recipe(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    os.utime(file, (0, file.stat().st_mtime - 3600))  # a file that has just changed is not remembered
    build_cache(recipe, quiet())
    content, status = bytearray(file.read_bytes()), file.stat()
    content[-3] ^= 0x01
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = identify(ModelSource(str(tmp_path / "base"))).fingerprint
    with pytest.raises(CacheError, match="changed"):
        verify_cache(recipe, quiet(), rehash=True)
    assert identify(ModelSource(str(tmp_path / "base"))).fingerprint != before
    verify_cache(recipe, quiet(), rehash=True)


def test_a_folder_of_somebodys_own_files_is_no_cache(tmp_path):
    identity = identify(ModelSource(str(make_model(tmp_path / "base"))))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mydata.parquet").write_bytes(b"precious")
    with pytest.raises(CacheError, match=r"mydata\.parquet"):
        ReferenceCache(tmp_path / "mine", identity)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["mydata.parquet"]


def test_the_models_own_generation_settings_do_not_leak_into_sampling(tmp_path):
    plain = train(tmp_path)
    settings = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**settings, "min_p": 0.9, "top_k": 1}))
    again = train(tmp_path, output=str(tmp_path / "again"))
    assert again["eval"]["kl"] == plain["eval"]["kl"]
    assert again["eval"]["length"] == plain["eval"]["length"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": {"max_margin_error": 1.0}},
        {"eval": {"gold_reward": "sandbox", "samples": 0}},
        {"adapter": {"rank": 4, "dropout": 0.1}, "model": {"path": "x", "attention": "shared"}},
    ],
)
def test_keys_without_effect_are_refused(tmp_path, changes):
    refused(tmp_path, RecipeError, **changes)


def test_unpaired_data_have_their_quantization_error_bounded_too(tmp_path):
    make_pairs(tmp_path / "pairs.jsonl", unpaired=True)
    reference = {"quantization": "nf4", "max_margin_error": 1e-6}
    assert "max_margin_error" in refused(tmp_path, ModelError, loss="apo_zero", reference=reference)


def test_ids_and_rows_that_the_model_cannot_read_are_refused_together(tmp_path):
    make_model(tmp_path / "base", vocab_size=40, max_position_embeddings=16)
    said = refused(tmp_path, ModelError)
    assert "embedding" in said
    assert "data.max_length" in said
    assert "eval.max_new_tokens" in said


def test_a_warmup_longer_than_the_run_is_refused(tmp_path):
    assert "train.warmup" in refused(tmp_path, train={"warmup": 100})


def test_a_fraction_of_one_comparison_is_one_comparison(tmp_path):
    result = train(tmp_path, train={"max_steps": None, "epochs": 0.001})
    assert result["train"]["comparisons"] == 1


@pytest.mark.parametrize("body", ["raise ValueError('no')", "return None", "return 'good'"])
def test_a_gold_reward_that_fails_is_named(tmp_path, monkeypatch, body):
    (tmp_path / "failing_reward.py").write_text(f"def reward(prompt, completion):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "failing_reward", raising=False)
    assert "failing_reward:reward" in refused(tmp_path, RecipeError, eval={"gold_reward": "failing_reward:reward"})


def test_a_loss_of_chosen_completions_refuses_data_without_any(tmp_path):
    rows = [{"prompt": f"w1 w{n}", "completion": f"w{n}", "label": False} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "desirable" in refused(tmp_path, DataError, loss="sft")


def test_a_foreign_line_in_the_metrics_does_not_stop_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "finish_run", lambda *_, **__: {})
    train(tmp_path)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write("3\n{broken\n")
    train(tmp_path)


def test_text_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    rows = [{"prompt": f"unheard {n}", "chosen": "of words", "rejected": "nobody knows at all"} for n in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<unk>" in refused(tmp_path, DataError, data={"eval_fraction": 0.0})


def test_an_adapter_is_no_model(tmp_path):
    train(tmp_path, adapter={"rank": 4})
    assert "is an adapter" in refused(tmp_path, model=str(tmp_path / "run" / "model"), output=str(tmp_path / "b"))


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "is a file" in refused(tmp_path, RecipeError, output=str(tmp_path / "taken"))
