"""What is scored together and by whom: keys from the table, the plan that is made once, claims of batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from world import make_pairs, make_recipe

from prefopt.data.mismatched import mismatched
from prefopt.prepare import prepare
from prefopt.reference.build_plan import (
    STALE_AFTER,
    Texts,
    Wanted,
    agreed_plan,
    distinct_texts,
    make_plan,
    remove_stale_plans,
)
from prefopt.reference.cache import text_key
from prefopt.reference.claims import Claims, Worker
from prefopt.reference.keys import Keys, dataset_keys


def wanted_of(folder, **changes) -> list[Wanted]:
    prepared = prepare(make_recipe(folder, **changes), quiet=True)
    return [Wanted(dataset, *dataset_keys(dataset)) for _, dataset in prepared.read_by_reference()]


def random_texts(count: int = 300, prompts: int = 90, seed: int = 0) -> Texts:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, prompts)
    prompt = np.sort(generator.integers(0, prompts, count))
    hashes = np.zeros((count, 32), np.uint8)
    hashes[:, 0] = prompt
    hashes[:, 30:] = np.arange(count, dtype=">u2").view(np.uint8).reshape(-1, 2)
    zero = np.zeros(count, np.int64)
    return Texts(Keys.of(hashes), zero, np.arange(count), zero, lengths[prompt], generator.integers(1, 80, count))


# --- keys ---


@pytest.mark.parametrize("changes", [{}, {"data": {"group_by_prompt": True}}, {"data": {"max_length": 12}}])
def test_keys_read_from_the_table_are_the_hashes_of_the_ids_that_are_scored(tmp_path, changes):
    make_pairs(tmp_path / "pairs.jsonl", 40)
    data = prepare(make_recipe(tmp_path, **changes), quiet=True).data
    for dataset in (data.train, data.eval, data.train.select([5, 3, 3, 0]), mismatched(data.train, max_length=12)):
        keys, needed = dataset_keys(dataset)
        assert list(keys) == [text_key(group.prompt, one) for group in dataset for one in group.completions]
        assert needed.all()


def test_what_no_comparison_names_is_not_needed(tmp_path):
    dataset = prepare(make_recipe(tmp_path), quiet=True).data.train
    _, needed = dataset_keys(dataset, rejected=False)
    assert needed.tolist() == [True, False] * len(dataset)


def test_keys_are_a_sequence_of_bytes_in_one_buffer():
    hashes = np.random.default_rng(0).integers(0, 256, (5, 32), dtype=np.uint8)
    hashes[2, -1] = 0
    keys = Keys.of(hashes)
    assert [len(key) for key in keys] == [32] * 5
    assert keys[-1] == bytes(hashes[4])
    assert list(keys[1:3]) == [keys[1], keys[2]]
    assert list(keys.take(np.array([2, 2]))) == [bytes(hashes[2])] * 2


# --- the plan ---


@pytest.mark.parametrize("shared", [True, False])
def test_a_plan_holds_every_missing_text_once_within_the_budget_longest_first(tmp_path, shared):
    texts, missing = random_texts(), np.random.default_rng(1).random(300) < 0.7
    plan = make_plan(tmp_path / "plan", texts, missing, 200, shared=shared)
    assert sorted(plan.order.tolist()) == np.flatnonzero(missing).tolist()
    longest = [int((texts.prompt_tokens + texts.tokens)[plan.texts(batch)].max()) for batch in range(len(plan))]
    assert longest == sorted(longest, reverse=True)
    for batch in range(len(plan)):
        members = plan.texts(batch)
        prompts, first = np.unique(texts.prompts[members], return_index=True)
        if shared:
            # A prompt that is split over the budget may end up beside itself: it is computed once, and counted twice.
            computed = int(texts.prompt_tokens[members[first]].sum() + (texts.tokens[members] - 1).sum())
            assert computed <= plan.sizes[batch] <= 200
            assert plan.sizes[batch] == computed or len(prompts) < len(members)
        else:
            assert len(members) * longest[batch] <= 200 or len(members) == 1


def test_a_text_beyond_the_budget_has_a_batch_of_its_own(tmp_path):
    texts = replace(random_texts(5, 5), tokens=np.array([3, 500, 3, 3, 3]))
    plan = make_plan(tmp_path / "plan", texts, np.ones(5, bool), 200, shared=True)
    assert plan.texts(0).tolist() == [1]


def test_the_plan_does_not_depend_on_the_order_of_the_rows(tmp_path):
    lines = make_pairs(tmp_path / "pairs.jsonl", 50).read_text().splitlines(keepends=True)
    plans = []
    for order in (lines, lines[::-1]):
        (tmp_path / "pairs.jsonl").write_text("".join(order))
        texts = distinct_texts(wanted_of(tmp_path))
        plan = make_plan(tmp_path / "plan", texts, np.ones(len(texts), bool), 60, shared=True)
        plans.append([list(texts.keys.take(plan.texts(batch))) for batch in range(len(plan))])
    assert plans[0] == plans[1]


def test_the_first_plan_of_what_is_asked_is_the_plan_until_it_is_removed(tmp_path):
    texts, missing = random_texts(), np.ones(300, bool)
    first = agreed_plan(tmp_path, texts, missing, token_budget=200, shared=True)
    missing[::2] = False  # committed since, by a build that was killed then
    again = agreed_plan(tmp_path, texts, missing, token_budget=200, shared=True)
    assert again.order.tolist() == first.order.tolist()
    assert agreed_plan(tmp_path, texts, missing, token_budget=100, shared=True).file != first.file
    again.remove()
    assert len(agreed_plan(tmp_path, texts, missing, token_budget=200, shared=True).order) == 150


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"texts": 300, "bits": "AAAA"}', b'{"texts": 9, "bits": "eJwDAAAAAAE="}']
)
def test_a_damaged_plan_is_made_again(tmp_path, content):
    texts, missing = random_texts(), np.ones(300, bool)
    plan = agreed_plan(tmp_path, texts, missing, token_budget=200, shared=True)
    plan.file.write_bytes(content)
    again = agreed_plan(tmp_path, texts, missing, token_budget=200, shared=True)
    assert again.order.tolist() == plan.order.tolist()
    assert json.loads(plan.file.read_bytes())["missing"] == 300


def test_a_plan_to_which_nobody_came_back_is_removed(tmp_path):
    texts = random_texts()
    old = agreed_plan(tmp_path, texts, np.ones(300, bool), token_budget=200, shared=True)
    new = agreed_plan(tmp_path, texts, np.ones(300, bool), token_budget=100, shared=True)
    long_ago = time.time() - STALE_AFTER - 60
    os.utime(old.file, (long_ago, long_ago))
    remove_stale_plans(tmp_path)
    assert not old.file.exists()
    assert new.file.exists()


# --- claims ---


def other_process(file: Path, process: str, batches: str, until: float) -> None:
    with file.open("a") as stream:
        stream.write(f"{process} {until:.0f} {batches}\n")


def test_of_two_claims_the_earlier_line_holds(tmp_path):
    claims = Claims(tmp_path / "claims")
    host = claims.me.rpartition(":")[0]
    other_process(claims.file, f"{host}:{os.getppid()}", "0,2", time.time() + 60)
    assert claims.take([0, 1, 2, 3]) == [1, 3]
    assert claims.others() == 1
    other_process(claims.file, f"{host}:{os.getppid()}", "1", time.time() + 60)
    assert claims.take([1]) == [1]


def test_a_claim_ends_with_its_time_its_process_or_when_it_is_given_up(tmp_path):
    claims = Claims(tmp_path / "claims")
    host = claims.me.rpartition(":")[0]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    other_process(claims.file, "elsewhere:1", "0", time.time() - 1)
    other_process(claims.file, f"{host}:{gone.pid}", "1", time.time() + 60)
    other_process(claims.file, "elsewhere:2", "2", time.time() + 60)
    other_process(claims.file, "elsewhere:2", "", 0)
    other_process(claims.file, "elsewhere:3", "3", time.time() + 60)
    with claims.file.open("a") as stream:
        stream.write("torn 17999")
    assert claims.free([0, 1, 2, 3]) == [0, 1, 2]


def test_ranks_begin_with_batches_of_their_own_and_go_on_with_what_others_left():
    assert Worker(1, 3).preferred(8) == [1, 4, 7, 6, 5, 3, 2, 0]
    everyone = [Worker(rank, 3).preferred(8) for rank in range(3)]
    assert all(sorted(order) == list(range(8)) for order in everyone)
    assert len({order[0] for order in everyone}) == 3
