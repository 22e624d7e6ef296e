"""The world on disk: it loads, round-trips, is labelled by its gold reward, repeats exactly, is whole or absent."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import DataError
from prefopt.sandbox import World, WorldSettings, build_world, gold_reward, making, world

SMALL = WorldSettings(
    reviews=300,
    hidden=32,
    layers=1,
    steps=25,
    batch_size=8,
    train_pairs=150,
    eval_pairs=40,
    max_new_tokens=40,
)


def build(folder: Path | None, **changes: object) -> World:
    return build_world(**{"folder": folder, "quiet": True, "settings": SMALL, **changes})


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> World:
    return build(tmp_path_factory.mktemp("sandbox") / "world")


@pytest.fixture(scope="module")
def tokenizer(small):
    return AutoTokenizer.from_pretrained(small.model)


@pytest.fixture(scope="module")
def rows(small) -> list[dict]:
    return read(small.train) + read(small.eval)


def test_the_policy_is_a_llama_that_transformers_loads_and_samples(small, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(small.model)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about the café on Mill Street."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_every_completion_encodes_to_the_ids_it_was_decoded_from(rows, tokenizer):
    for row in rows:
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_any_sequence_of_ordinary_tokens_survives_a_round_trip(tokenizer):
    rng = random.Random(0)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for _ in range(200):
        ids = rng.choices(ordinary, k=rng.randint(1, 30))
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_the_chat_template_keeps_the_prompt_as_a_prefix_and_ends_the_answer(rows, tokenizer):
    for row in rows[:20]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
        completion = tokenizer(row["chosen"][0]["content"])["input_ids"]
        assert whole == [*prompt, *completion, tokenizer.eos_token_id]
        assert whole.count(tokenizer.bos_token_id) == 1


def test_there_are_as_many_pairs_as_asked_for_and_none_is_equal_or_empty(small):
    assert len(read(small.train)) == 150
    assert len(read(small.eval)) == 40
    for row in read(small.train) + read(small.eval):
        assert row["chosen"][0]["content"]
        assert row["rejected"][0]["content"]
        assert row["chosen"] != row["rejected"]


def test_held_out_prompts_and_their_subjects_are_never_trained_on(small):
    def subjects(file: Path) -> set[str]:
        texts = [row["prompt"][0]["content"] for row in read(file)]
        return {text.split(" the ", 1)[1].removesuffix(" for a friend.").rstrip(".?") for text in texts}

    assert len(subjects(small.train)) > 50
    assert len(subjects(small.eval)) > 10
    assert subjects(small.train).isdisjoint(subjects(small.eval))


def test_the_columns_state_the_gold_rewards_and_their_bradley_terry_probability(rows):
    for row in rows:
        chosen, rejected = (
            gold_reward(row["prompt"][0]["content"], row[side][0]["content"]) for side in ("chosen", "rejected")
        )
        assert row["chosen_gold_reward"] == chosen
        assert row["rejected_gold_reward"] == rejected
        assert row["preference_probability"] == pytest.approx(np.exp(chosen) / (np.exp(chosen) + np.exp(rejected)))


def test_the_judge_chooses_as_often_as_bradley_terry_says():
    from prefopt.sandbox.pairs import label

    prompt = "Tell me about the café on Mill Street."
    good = "The café on Mill Street is good. We liked the tea. We sat near the window."
    poor = "The café on Mill Street is plain. We tried the tea. We sat near the window."
    rng = random.Random(0)
    share = np.mean([label(prompt, good, poor, rng=rng)["chosen"][0]["content"] == good for _ in range(4000)])
    difference = gold_reward(prompt, good) - gold_reward(prompt, poor)
    assert 0.5 < difference < 2.0
    # Three standard errors of a share of 4000 are below 0.024.
    assert share == pytest.approx(1 / (1 + np.exp(-difference)), abs=0.024)


def test_the_chosen_completion_is_the_better_one_on_average(small):
    rows = read(small.train)
    assert np.mean([row["chosen_gold_reward"] - row["rejected_gold_reward"] for row in rows]) > 0.2


def test_the_same_seed_gives_identical_files_whatever_the_global_state(small, tmp_path):
    torch.manual_seed(99)
    random.seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = build(tmp_path / "again")
    finally:
        torch.set_num_threads(threads)
    assert contents(again.folder) == contents(small.folder)


def test_another_seed_gives_another_world(small, tmp_path):
    other = build(tmp_path / "other", seed=1)
    assert other.train.read_bytes() != small.train.read_bytes()
    assert (other.model / "model.safetensors").read_bytes() != (small.model / "model.safetensors").read_bytes()


def test_making_a_world_leaves_random_states_and_threads_alone(tmp_path):
    def state() -> tuple[object, ...]:
        numpy = np.random.get_state()
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy[1].tolist(),
            numpy[2:],
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    before = state()
    build(tmp_path / "world")
    assert state() == before


def test_the_cache_makes_a_world_once(own_cache, monkeypatch):
    first = build(None)
    assert first.folder.parent == own_cache / "sandbox"
    monkeypatch.setattr(making, "make_world", _fail)
    assert build(None) == first
    with pytest.raises(RuntimeError, match="made again"):
        build(None, seed=7)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["make_world", "_write_lines"])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, step, error):
    def stop(*_: object) -> None:
        raise error("stopped")

    monkeypatch.setattr(making if step == "make_world" else world, step, stop)
    with pytest.raises(error):
        build(tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_another_process_overtakes_keeps_the_first_world(tmp_path, monkeypatch):
    make: Callable = making.make_world

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(making, "make_world", make)
        build(tmp_path / "world")
        return make(*arguments)

    monkeypatch.setattr(making, "make_world", overtaken)
    late = build(tmp_path / "world")
    assert [file.name for file in tmp_path.iterdir()] == ["world"]
    assert len(read(late.train)) == 150


def test_a_folder_with_something_else_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="new or empty folder"):
        build(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_the_sandbox_is_imported_without_torch():
    code = "import sys, prefopt.sandbox; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def _fail(*_: object) -> None:
    raise RuntimeError("made again")
