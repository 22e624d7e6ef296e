"""The reference is paid for once: content keys, atomic shards, stated errors, refusals with both fingerprints."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from tiny import group
from world import make_model, make_pairs, make_recipe, quiet, train

import prefopt.reference.build as build
import prefopt.reference.cache as cache_room
from prefopt.batching import make_batch
from prefopt.errors import CacheError, ModelError
from prefopt.models import ModelSource
from prefopt.planning import every_comparison
from prefopt.prepare import prepare, reference_source
from prefopt.probe import probe_group
from prefopt.reference.cache import HALF_STEP, KEY_BYTES, ReferenceCache, ScoredRows, text_key
from prefopt.reference.commands import build_cache, cache_info, verify_cache
from prefopt.reference.identity import identify
from prefopt.reference.keys import dataset_keys
from prefopt.reference.opening import cached_reference, load_reference, open_cache


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", identify(ModelSource(str(make_model(tmp_path / "base")))))


def rows(count: int, seed: int = 0) -> ScoredRows:
    generator = np.random.default_rng(seed)
    groups = [
        group(3, [int(n)], seed=int(s))
        for n, s in zip(generator.integers(1, 9, count), generator.integers(0, 10**9, count))
    ]
    logps = [-generator.random(len(one.completions[0])) * 9 for one in groups]
    keys = [text_key(one.prompt, one.completions[0]) for one in groups]
    return ScoredRows(keys, np.array([values.sum() for values in logps]), np.array(list(map(len, logps))), logps)


def scored(folder, **changes):
    """Completions that a cached reference scores anew for a recipe."""
    return cached_reference(prepare(make_recipe(folder, **changes), quiet=True), quiet()).report.misses


def test_what_is_committed_is_found_again_by_content(cache):
    some = rows(50)
    cache.commit(some)
    reopened = ReferenceCache(cache.folder, cache.identity)
    found, sums, tokens = reopened.lookup(some.keys)
    assert found.all()
    np.testing.assert_allclose(sums, some.sums.astype(np.float32))
    assert tokens.tolist() == some.tokens.tolist()
    missing, nothing, _ = reopened.lookup(rows(5, seed=9).keys)
    assert not missing.any()
    assert np.isnan(nothing).all()


def test_token_log_probs_are_found_by_every_key_also_one_that_ends_in_zero_bytes(cache):
    """numpy's byte strings drop trailing zero bytes, which one key in 256 has."""
    keys = [b"k" * (KEY_BYTES - ending) + b"\0" * ending for ending in (0, 1, 2)]
    logps = [np.full(length, -float(length)) for length in (2, 3, 5)]
    cache.commit(ScoredRows(keys, np.array([values.sum() for values in logps]), np.array([2, 3, 5]), logps))
    assert cache.lookup(keys)[0].all()
    for given, expected in zip(cache.token_logps(keys[::-1]), logps[::-1]):
        np.testing.assert_array_equal(given, expected)


def test_cached_token_log_probs_add_up_to_the_sum_that_was_scored(tmp_path):
    """Each token's was stored in 16 bits; the whole completion's keeps 32, and no margin is wrong by the difference."""
    prepared = prepare(make_recipe(tmp_path, loss="ld_dpo"), quiet=True)
    logps = cached_reference(prepared, quiet()).logps["train"]
    train_set = prepared.data.train
    plan = every_comparison(train_set)
    given = logps(make_batch([train_set[part.group] for part in plan], plan))
    ends = given.lengths.cumsum(0)
    for begin, end, total in zip(ends - given.lengths, ends, given.sums):
        assert float(given.tokens[begin:end].double().sum()) == pytest.approx(float(total), abs=2e-5)
    online = load_reference(reference_source(prepared.recipe), prepared.recipe, probe_group(train_set))
    with torch.no_grad():
        exact = online(make_batch([train_set[part.group] for part in plan], plan)).tokens
    assert float((given.tokens - exact).abs().max()) <= 2 * HALF_STEP * float(exact.abs().max())


def test_prompt_and_completion_are_hashed_apart():
    ids = np.arange(10)
    assert text_key(ids[:4], ids[4:]) != text_key(ids[:5], ids[5:])


def test_the_shards_open_with_datasets(cache):
    some = rows(20)
    cache.commit(some)
    table = load_dataset("parquet", data_files=str(cache.folder / "*.parquet"), split="train")
    assert len(table) == 20
    largest = max(abs(np.sum(one["token_logps"]) - one["logp_sum"]) for one in table)
    assert largest < 9 * 9 * cache_room.HALF_STEP


def test_the_first_writer_of_a_shard_wins(cache):
    some = rows(5)
    cache.commit(some)
    cache.commit(ScoredRows(some.keys, some.sums - 1, some.tokens, some.token_logps))
    assert len(list(cache.folder.glob("*.parquet"))) == 1
    np.testing.assert_allclose(
        ReferenceCache(cache.folder, cache.identity).lookup(some.keys)[1], some.sums.astype(np.float32)
    )


def test_a_full_disk_leaves_no_partial_shard_and_says_so(cache, monkeypatch):
    cache.commit(rows(5))
    monkeypatch.setattr(
        "os.fsync",
        lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(CacheError, match="No space left"):
        cache.commit(rows(5, seed=1))
    monkeypatch.undo()
    assert [path.suffix for path in cache.folder.iterdir() if "partial" in path.name] == []
    assert len(ReferenceCache(cache.folder, cache.identity)) == 5


def test_a_flipped_byte_is_found_and_named(cache):
    shard = cache.commit(rows(200))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    assert shard.name in " ".join(cache.check_shards())


def test_a_folder_of_another_reference_is_refused_with_both_fingerprints(tmp_path, cache):
    other = identify(ModelSource(str(make_model(tmp_path / "other", intermediate_size=40))))
    with pytest.raises(CacheError) as refusal:
        ReferenceCache(cache.folder, other, named_by_user=True)
    said = str(refusal.value)
    assert cache.identity.fingerprint[:12] in said
    assert other.fingerprint[:12] in said
    assert "weights" in said


def test_a_folder_that_is_no_cache_is_refused(tmp_path, cache):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reference.json").write_text("[]")
    with pytest.raises(CacheError, match="not readable"):
        ReferenceCache(tmp_path / "mine", cache.identity)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"compute": torch.bfloat16},
        {"dtype": torch.bfloat16},
    ],
)
def test_everything_that_changes_a_log_prob_changes_the_fingerprint(tmp_path, change):
    folder = str(make_model(tmp_path / "base"))
    assert identify(ModelSource(folder)).fingerprint != identify(ModelSource(folder, **change)).fingerprint


def test_a_name_or_a_comment_in_the_config_changes_no_fingerprint(tmp_path):
    folder = make_model(tmp_path / "base")
    before = identify(ModelSource(str(folder))).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": False}))
    assert identify(ModelSource(str(folder))).fingerprint == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert identify(ModelSource(str(folder))).fingerprint != before


def test_a_new_row_costs_its_completions_and_nothing_else_costs_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))  # other tests score the same model and texts
    first = scored(tmp_path)
    assert first > 100
    for change in (
        {"loss": "ipo"},
        {"loss": {"name": "dpo", "beta": 0.7}},
        {"seed": 3},
        {"train": {"batch_size": 3, "learning_rate": 1e-2}},
        {"data": {"max_length": 48}},
        {"data": {"group_by_prompt": True}},
    ):
        assert scored(tmp_path, **change) == 0, change
    pairs = tmp_path / "pairs.jsonl"
    lines = pairs.read_text().splitlines(keepends=True)
    extra = make_pairs(tmp_path / "extra.jsonl", 5, seed=99).read_text()
    pairs.write_text("".join(reversed(lines[:40])) + extra)
    assert scored(tmp_path) == 10


def test_a_build_that_is_killed_goes_on_from_its_last_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)
    budget = {"reference": {"token_budget": 40, "cache": str(tmp_path / "cache")}}
    commit, written = ReferenceCache.commit, []

    def commit_then_die(self, some):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(commit(self, some))

    monkeypatch.setattr(ReferenceCache, "commit", commit_then_die)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, **budget)
    monkeypatch.setattr(ReferenceCache, "commit", commit)
    kept = len(open_cache(make_recipe(tmp_path, **budget)))
    assert kept > 0
    whole = scored(tmp_path, reference={"cache": str(tmp_path / "whole")})
    assert scored(tmp_path, **budget) == whole - kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
def test_cached_is_online_for_every_quantization(tmp_path, quantization, precision):
    recipe = make_recipe(tmp_path, reference={"quantization": quantization}, train={"precision": precision})
    build_cache(recipe, quiet())
    verify_cache(recipe, quiet(), rehash=True)


def test_a_quantized_reference_states_its_error_and_can_be_refused(tmp_path):
    result = train(tmp_path, reference={"quantization": "nf4"})
    error = result["reference"]["max_margin_error"]
    assert 1e-3 < error < 20
    with pytest.raises(ModelError, match="max_margin_error"):
        train(
            tmp_path,
            reference={"quantization": "nf4", "max_margin_error": error / 2},
            output=str(tmp_path / "b"),
        )
    train(tmp_path, reference={"quantization": "nf4", "max_margin_error": error * 2}, output=str(tmp_path / "c"))


def test_verify_finds_log_probs_that_are_not_the_references(tmp_path):
    recipe = make_recipe(tmp_path, reference={"cache": str(tmp_path / "cache")})
    build_cache(recipe, quiet())
    cache = open_cache(recipe)
    prepared = prepare(recipe, quiet=True)
    keys, _ = dataset_keys(prepared.data.train)
    _, sums, tokens = cache.lookup(keys)
    for shard in cache.folder.glob("*.parquet"):
        shard.unlink()
    cache.commit(ScoredRows(keys, sums + 3, tokens, [np.zeros(n) for n in tokens]))
    with pytest.raises(CacheError, match="root token"):
        verify_cache(recipe, quiet(), rehash=False)


def test_info_needs_no_model_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.reference.opening.load_model", lambda *_: pytest.fail("loaded a model"))
    cache_info(make_recipe(tmp_path), quiet())
