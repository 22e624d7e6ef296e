"""Building the reference cache: planned once, shared by processes, resumed to the same bits, never paid for twice."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from world import make_model, make_pairs, make_recipe, quiet, train

import prefopt.reference.build as build
from prefopt.errors import ModelError
from prefopt.evaluate_run import evaluate_run
from prefopt.forward import Scorer
from prefopt.prepare import prepare
from prefopt.reference.build_plan import (
    Wanted,
    distinct_texts,
    make_plan,
)
from prefopt.reference.build_progress import BuildProgress
from prefopt.reference.cache import ReferenceCache, text_key
from prefopt.reference.claims import Claims
from prefopt.reference.keys import Keys, dataset_keys
from prefopt.reference.opening import cached_reference, open_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Other tests score the same model and texts."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_commits(monkeypatch):
    """One batch per commit."""
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)


def report_of(folder, **changes):
    return cached_reference(prepare(make_recipe(folder, **changes), quiet=True), quiet()).report


def tokens_of(*files: Path) -> int:
    """Completion tokens, EOS included, of every different (prompt, answer): words are tokens in this world."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    texts = {(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")}
    return sum(len(answer.split()) + 1 for _, answer in texts)


def contents(cache: ReferenceCache, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Sums and token log-probs as bits."""
    found, sums, _ = cache.lookup(keys)
    assert found.all()
    return sums.view(np.int32), np.concatenate(cache.token_logps(keys)).view(np.int16)


def wanted_of(folder, **changes) -> list[Wanted]:
    prepared = prepare(make_recipe(folder, **changes), quiet=True)
    return [Wanted(dataset, *dataset_keys(dataset)) for _, dataset in prepared.read_by_reference()]


def test_a_prompt_is_shared_across_rows_and_datasets(tmp_path):
    rows = [{"prompt": "w1 w2 w3", "chosen": f"w{4 + i}", "rejected": f"w{30 + i} w5"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    apart_from_training = {"eval": str(tmp_path / "held_out.jsonl"), "eval_fraction": 0, "group_by_prompt": False}
    wanted = wanted_of(tmp_path, data=apart_from_training)
    assert len(wanted) == 2  # train and held-out
    texts = distinct_texts(wanted)
    prompt = int(texts.prompt_tokens[0])
    plan = make_plan(tmp_path / "plan", texts, np.ones(24, bool), 8192, shared=True)
    assert plan.sizes.tolist() == [prompt + int((texts.tokens - 1).sum())]
    apart = make_plan(tmp_path / "plan", texts, np.ones(24, bool), 8192, shared=False)
    assert apart.sizes.tolist() == [24 * prompt + int((texts.tokens - 1).sum())]
    report = report_of(tmp_path, data=apart_from_training)
    assert report.computed_tokens == plan.sizes[0]
    assert report.misses == 24


def test_a_build_waits_for_a_living_process_and_takes_over_from_a_dead_one(tmp_path, monkeypatch, small_commits):
    recipe = make_recipe(tmp_path, reference={"token_budget": 60})
    prepared = prepare(recipe, quiet=True)
    claims: list[Claims] = []

    def say(line: str, file: Path) -> None:
        with file.open("a") as stream:
            stream.write(f"{socket.gethostname()}:{os.getppid()} {line}\n")

    class Busy(Claims):
        def __init__(self, file: Path) -> None:
            super().__init__(file)
            if not claims:
                say(f"{time.time() + 600:.0f} 0,1,2", file)
            claims.append(self)

    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # the other process gives up without having committed anything
            say("0 ", claims[0].file)

    monkeypatch.setattr(build, "Claims", Busy)
    monkeypatch.setattr(build.time, "sleep", sleep)
    report = cached_reference(prepared, quiet()).report
    assert len(waits) == 3
    assert report.own_tokens == report.computed_tokens > 0
    assert not list(open_cache(recipe).folder.glob(".plan-*"))


# --- the same bits ---


def test_a_killed_and_resumed_build_ends_with_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch, small_commits):
    settings = {"token_budget": 60}
    whole = make_recipe(tmp_path, reference={**settings, "cache": str(tmp_path / "whole")})
    killed = make_recipe(tmp_path, reference={**settings, "cache": str(tmp_path / "killed")})
    cached_reference(prepare(whole, quiet=True), quiet())
    commit, written = ReferenceCache.commit, []

    def commit_then_die(self, rows):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(set(rows.keys))
        return commit(self, rows)

    monkeypatch.setattr(ReferenceCache, "commit", commit_then_die)
    with pytest.raises(KeyboardInterrupt):
        cached_reference(prepare(killed, quiet=True), quiet())
    assert list((tmp_path / "killed").glob(".plan-*.json"))

    def remember(self, rows):
        written.append(set(rows.keys))
        return commit(self, rows)

    monkeypatch.setattr(ReferenceCache, "commit", remember)
    cached_reference(prepare(killed, quiet=True), quiet())
    assert len(set().union(*written)) == sum(map(len, written))  # nothing was scored twice
    keys = distinct_texts(wanted_of(tmp_path)).keys
    undisturbed, resumed = (contents(open_cache(recipe), keys) for recipe in (whole, killed))
    assert all(np.array_equal(one, other) for one, other in zip(undisturbed, resumed))
    assert not list((tmp_path / "killed").glob(".plan-*"))


def test_a_resumed_build_runs_the_very_batches_that_were_planned(tmp_path, monkeypatch, small_commits):
    """Without the plan the remaining texts would be batched anew: another test in which bits could differ."""
    batches: list[set[frozenset[bytes]]] = []
    score = build.score

    def seen(scorer, parts, *, precision):
        batches[-1].add(frozenset(_keys(parts[0])))
        return score(scorer, parts, precision=precision)

    monkeypatch.setattr(build, "score", seen)

    def run(name: str) -> None:
        batches.append(set())
        reference = {"token_budget": 60, "cache": str(tmp_path / name)}
        cached_reference(prepare(make_recipe(tmp_path, reference=reference), quiet=True), quiet())

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "commit", _dies_after(5))
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    run("killed")
    whole, before, after = batches
    assert before < whole
    assert after < whole
    assert before | after == whole


def _dies_after(commits: int):
    commit, done = ReferenceCache.commit, []

    def commit_then_die(self, rows):
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(commit(self, rows))
        return done[-1]

    return commit_then_die


def _keys(batch):
    ids, targets = batch.input_ids.numpy(), batch.targets.numpy()
    completions = iter(np.split(targets, np.cumsum(batch.completion_lengths.numpy())[:-1]))
    return [
        text_key(ids[tree.start : tree.start + tree.prompt], next(completions))
        for tree in batch.trees
        for _ in tree.branches
    ]


def environment(cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "losses")])
    return {**os.environ, "PYTHONPATH": path, "PREFOPT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_processes_that_share_a_build_and_one_that_is_killed_end_with_the_same_bits(tmp_path):
    make_pairs(tmp_path / "pairs.jsonl", 400)
    recipes = {
        name: make_recipe(tmp_path, reference={"token_budget": 40, "cache": str(tmp_path / name)})
        for name in ("one", "launched", "independent", "killed")
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())

    def start(name: str, *launcher: str) -> subprocess.Popen[str]:
        command = [*(launcher or (sys.executable,)), "-m", "prefopt", "cache", "build", str(tmp_path / f"{name}.yaml")]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(tmp_path / "data")
        )

    def finish(child: subprocess.Popen[str]) -> None:
        output, _ = child.communicate(timeout=200)
        assert child.returncode == 0, output

    finish(start("one"))
    finish(start("launched", sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"))
    for child in [start("independent"), start("independent")]:
        finish(child)
    generator = random.Random(0)
    child = start("killed")
    while not list((tmp_path / "killed").glob("shard-*")) and child.poll() is None:
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 0.3))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    finish(start("killed"))
    keys = distinct_texts(wanted_of(tmp_path)).keys
    expected = contents(open_cache(recipes["one"]), keys)
    for name in ("launched", "independent", "killed"):
        found = contents(open_cache(recipes[name]), keys)
        assert all(np.array_equal(one, other) for one, other in zip(expected, found)), name
        assert not list((tmp_path / name).glob(".plan-*")), name


# --- paid for once ---


def test_a_sweep_over_losses_betas_rates_orders_and_halves_scores_nothing_and_new_rows_only_themselves(tmp_path):
    pairs = make_pairs(tmp_path / "pairs.jsonl", 60)
    lines = pairs.read_text().splitlines(keepends=True)
    first = report_of(tmp_path)
    assert first.tokens == tokens_of(pairs)
    assert first.hits == 0
    betas = (0.01, 0.1, 0.3, 1.0)
    losses = [{"name": name, "beta": beta} for name in ("dpo", "ipo") for beta in betas] + ["simpo+sft"]
    for loss in losses:
        for rate in (1e-6, 1e-5, 1e-4):
            assert report_of(tmp_path, loss=loss, train={"learning_rate": rate}).tokens == 0, (loss, rate)
    random.Random(0).shuffle(lines)
    for content in ("".join(lines), "".join(lines[:30])):
        pairs.write_text(content)
        for loss in ("dpo", "ipo", "simpo+sft"):
            assert report_of(tmp_path, loss=loss).tokens == 0, loss
    pairs.write_text("".join(lines))
    extra = make_pairs(tmp_path / "extra.jsonl", 6, seed=99)
    pairs.write_text("".join(lines) + extra.read_text())
    added = report_of(tmp_path)
    assert added.tokens == tokens_of(extra)
    assert added.misses == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ipo"},
        {"loss": {"name": "dpo", "beta": 0.7}},
        {"train": {"learning_rate": 1e-2}},
        {"train": {"max_steps": 9}},
        {"train": {"max_steps": None, "epochs": 3}},
        {"seed": 3},
        {"train": {"batch_size": 3}},
        {"data": {"max_length": 48}},
        {"data": {"eval_fraction": 0.5}},
        {"data": {"group_by_prompt": True}},
        {"train": {"token_budget": 77}},
        {"reference": {"token_budget": 77}},
    ],
    ids=str,
)
def test_two_recipes_that_differ_only_in_this_share_every_entry(tmp_path, changes):
    assert report_of(tmp_path).misses > 100
    shared = report_of(tmp_path, **changes)
    assert (shared.misses, shared.tokens, shared.computed_tokens) == (0, 0, 0)


def test_truncation_that_cuts_a_row_scores_that_row_and_no_other(tmp_path):
    pairs = make_pairs(tmp_path / "pairs.jsonl", 20)
    long = {"prompt": "w1 w2", "chosen": " ".join(["w3"] * 30), "rejected": "w4"}
    pairs.write_text(pairs.read_text() + json.dumps(long) + "\n")
    report_of(tmp_path)
    cut = report_of(tmp_path, data={"max_length": 28})
    assert cut.misses == 1


def test_eval_looks_up_held_out_rows_only(tmp_path, monkeypatch):
    train(tmp_path)
    asked = []
    fill = build.fill_cache
    monkeypatch.setattr(
        "prefopt.reference.opening.fill_cache",
        lambda cache, wanted, **options: asked.append(wanted) or fill(cache, wanted, **options),
    )
    evaluate_run(tmp_path / "run", quiet())
    held_out = prepare(make_recipe(tmp_path), quiet=True).data.eval
    assert [one.dataset.fingerprint for one in asked[0]] == [held_out.fingerprint]


# --- memory and progress ---


def small_memory(monkeypatch, tokens: int) -> list[int]:
    """Let the reference run out of memory with more than so many tokens in a batch; returns the sizes tried."""
    forward, tried = Scorer.forward, []

    def refuse(self, batch, **options):
        tried.append(batch.tokens)
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, batch, **options)

    monkeypatch.setattr(Scorer, "forward", refuse)
    return tried


def test_a_batch_that_does_not_fit_is_halved_and_the_build_goes_on(tmp_path, monkeypatch):
    whole = make_recipe(tmp_path, reference={"token_budget": 400, "cache": str(tmp_path / "whole")})
    cached_reference(prepare(whole, quiet=True), quiet())
    tried = small_memory(monkeypatch, 150)
    console = Console(record=True, width=200, force_terminal=False)
    halved = make_recipe(tmp_path, reference={"token_budget": 400, "cache": str(tmp_path / "halved")})
    cached_reference(prepare(halved, quiet=True), console)
    assert sum(size > 150 for size in tried) <= 2  # what did not fit once is not tried again
    assert "out of memory" in console.export_text()
    keys = distinct_texts(wanted_of(tmp_path)).keys
    sums = [open_cache(recipe).lookup(keys)[1] for recipe in (whole, halved)]
    np.testing.assert_allclose(*sums, atol=2e-4)


def test_a_single_text_that_does_not_fit_is_named_and_what_was_scored_is_kept(tmp_path, monkeypatch, small_commits):
    recipe = make_recipe(tmp_path, reference={"token_budget": 60})
    prepared = prepare(recipe, quiet=True)
    small_memory(monkeypatch, 150)
    calls = []
    allowed = build.make_batch

    def too_long_at_the_end(groups):
        calls.append(1)
        if len(calls) > 4:
            small_memory(monkeypatch, 3)
        return allowed(groups)

    monkeypatch.setattr(build, "make_batch", too_long_at_the_end)
    with pytest.raises(ModelError, match="one text of"):
        cached_reference(prepared, quiet())
    assert len(open_cache(recipe)) > 0


def test_errors_that_are_not_about_memory_are_not_swallowed(tmp_path, monkeypatch):
    prepared = prepare(make_recipe(tmp_path), quiet=True)
    monkeypatch.setattr(build, "score", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cached_reference(prepared, quiet())


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    console = Console(record=True, width=120, force_terminal=False, color_system=None)
    monkeypatch.setattr("prefopt.reference.build_progress.LINE_EVERY", -1.0)
    with BuildProgress(console) as progress:
        progress.start(completions=10, tokens=1000)
        progress.advance(250)
        progress.advance(500, own=False)
    lines = console.export_text().splitlines()
    assert "10 completions" in lines[0]
    assert "25%" in lines[1]
    assert "75%" in lines[2]
    assert "tokens/s" in lines[1]
    assert "\x1b" not in "".join(lines)


def test_progress_on_a_terminal_shows_rate_and_time_left():
    console = Console(record=True, width=120, force_terminal=True, color_system=None)
    with BuildProgress(console) as progress:
        progress.start(completions=10, tokens=1000)
        progress.advance(250)
        progress.say("a line above the bar")
    assert "a line above the bar" in console.export_text()


def test_another_model_has_a_cache_of_its_own(tmp_path):
    first = report_of(tmp_path)
    other = make_model(tmp_path / "other", intermediate_size=40)
    assert report_of(tmp_path, model=str(other)).misses == first.misses
