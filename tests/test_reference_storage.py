"""What the reference cache stores: exact keys, one value per completion for good, bounded shards, checked bytes."""

from __future__ import annotations

import json
import os
import re
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from caches import assert_holds, files, flip, identity, reopened, rows
from datasets import load_dataset

from prefopt.errors import CacheError
from prefopt.reference import merging
from prefopt.reference.cache import ReferenceCache, ScoredRows, text_key
from prefopt.reference.index import KeyIndex, Rows, as_words
from prefopt.reference.publishing import STALE
from prefopt.reference.shards import GROUP_TOKENS, shard_names


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", identity())


# Keys


@pytest.mark.parametrize("end", [b"", b"\0", b"\0" * 16, b"\0" * 31])
def test_every_byte_of_a_key_counts_zeros_at_its_end_too(cache, end):
    keys = [bytes([n]) * (32 - len(end)) + end for n in range(5)]
    some = ScoredRows(keys, np.arange(5.0), np.full(5, 1), [np.array([float(n)]) for n in range(5)])
    cache.commit(some)
    assert_holds(reopened(cache), some)
    absent = [keys[3][:-1] + b"\1", keys[3][:31] + b"\2"]
    assert not cache.lookup(absent)[0].any()


def test_keys_that_share_their_hash_are_told_apart():
    """Words 0 and 2 decide the hash: equal there, different in the others."""
    words = np.zeros((6, 4), np.uint64)
    words[:, 1] = [5, 3, 5, 4, 3, 5]
    index = KeyIndex([Rows(words, np.arange(6, dtype=np.float32), np.ones(6, np.int32))])
    assert len(index) == 3
    assert index.find(words).tolist() == [0, 1, 0, 3, 1, 0]
    assert index.find(np.array([[0, 9, 0, 0]], np.uint64)).tolist() == [-1]


def test_an_index_that_grew_finds_what_one_made_at_once_finds():
    generator = np.random.default_rng(0)
    parts = []
    for size in generator.integers(1, 60, 40):
        keys = generator.integers(0, 6, (size, 4)).astype(np.uint64)  # most keys come again
        parts.append(Rows(keys, generator.random(size, np.float32), generator.integers(0, 9, size, np.int32)))
    grown = KeyIndex()
    for part in parts:
        grown = grown.with_shards([part])
    every = np.concatenate([part.keys for part in parts])
    first = {}
    for place, key in enumerate(map(bytes, every)):
        first.setdefault(key, place)
    expected = [first[bytes(key)] for key in every]
    assert len(grown) == len(first)
    assert grown.find(every).tolist() == expected
    assert KeyIndex(parts).find(every).tolist() == expected
    assert grown.winners.sum() == len(first)
    np.testing.assert_array_equal(
        grown.values(grown.find(every))[0], np.concatenate([part.sums for part in parts])[expected]
    )


def test_token_log_probs_come_in_the_order_asked_for_from_shards_with_many_row_groups(cache):
    long = ScoredRows(
        [text_key(np.array([n]), np.array([7])) for n in range(9)], np.zeros(9), np.full(9, GROUP_TOKENS // 4),
        [np.full(GROUP_TOKENS // 4, -n) for n in range(9)],
    )  # fmt: skip
    file = cache.commit(long)
    cache.commit(rows(range(30)))
    assert pq.read_metadata(file).num_row_groups == 3
    asked = [long.keys[8], rows([11]).keys[0], long.keys[0], text_key(np.array([1]), np.array([2])), long.keys[8]]
    got = cache.token_logps(asked)
    assert [len(one) for one in got] == [GROUP_TOKENS // 4, 1 + 11 % 7, GROUP_TOKENS // 4, 0, GROUP_TOKENS // 4]
    assert (set(got[0]), set(got[2]), set(got[4])) == ({-8}, {0}, {-8})


# One value per completion


def test_the_first_commit_of_a_completion_is_the_only_one(cache):
    mine, late = ReferenceCache(cache.folder, cache.identity), rows(range(5, 15), shift=1.0)
    cache.commit(rows(range(10)))
    mine.commit(late)  # it opened before the others' rows were there
    assert len(mine) == 15
    assert sum(pq.read_metadata(file).num_rows for file in files(cache)) == 15
    assert_holds(reopened(cache), rows(range(10)))
    assert cache.commit(late) is None


def test_without_locks_every_reader_takes_the_same_of_two_values_and_merging_keeps_it(cache, monkeypatch):
    monkeypatch.setattr("prefopt.reference.publishing.fcntl", None)
    late = ReferenceCache(cache.folder, cache.identity)
    cache.commit(rows(range(10)))
    with monkeypatch.context() as patch:
        patch.setattr("prefopt.reference.cache.shard_names", lambda folder: [])  # it looked before
        late.commit(rows(range(5, 15), shift=1.0))
    assert len(files(cache)) == 2
    values = reopened(cache).lookup(rows(range(15)).keys)[1]
    assert (values == reopened(late).lookup(rows(range(15)).keys)[1]).all()
    cache.compact()
    assert (values == reopened(cache).lookup(rows(range(15)).keys)[1]).all()
    assert [pq.read_metadata(file).num_rows for file in files(cache)] == [15]


def test_a_text_twice_in_one_commit_is_stored_once(cache):
    some = rows([1, 2, 1])
    cache.commit(some)
    assert len(cache) == 2
    assert pq.read_metadata(files(cache)[0]).num_rows == 2


# Merging


def test_shards_are_merged_before_they_are_many_and_nothing_changes(cache, monkeypatch):
    monkeypatch.setattr(merging, "COMMITTED", 8)
    monkeypatch.setattr(merging, "MERGED", 3)
    reader = ReferenceCache(cache.folder, cache.identity)
    most = 0
    for begin in range(0, 400, 4):
        cache.commit(rows(range(begin, begin + 5)))
        most = max(most, len(files(cache)))
    assert most <= 8 + 1 + 3 * 3
    assert max(name.level for name in shard_names(cache.folder)) >= 2
    for one in (cache, reopened(cache)):
        assert_holds(one, rows(range(401)))
        assert one.check_shards() == []
    reader.refresh()
    assert_holds(reader, rows(range(401)))


def test_a_reader_whose_shards_were_merged_away_reads_on(cache):
    for begin in range(0, 40, 10):
        cache.commit(rows(range(begin, begin + 10)))
    reader = reopened(cache)
    cache.compact()
    assert_holds(reader, rows(range(40)))


def test_an_opener_merges_what_others_left(cache, monkeypatch):
    for number in range(5):
        cache.commit(rows([number]))
    monkeypatch.setattr(merging, "COMMITTED", 4)
    assert_holds(reopened(cache), rows(range(5)))
    assert len(files(cache)) == 1


def test_large_shards_are_left_alone(cache, monkeypatch):
    first = cache.commit(rows(range(300)))
    monkeypatch.setattr(merging, "LARGEST", 2 * first.stat().st_size)
    cache.commit(rows([1000]))
    cache.commit(rows([1001]))
    cache.compact()
    assert first in files(cache)
    assert len(files(cache)) == 2


def test_a_kill_between_publishing_and_unlinking_costs_only_space(cache):
    for number in range(4):
        cache.commit(rows([number, number + 1]))
    sources = {file: file.read_bytes() for file in files(cache)}
    cache.compact()
    for file, content in sources.items():
        file.write_bytes(content)
    assert_holds(reopened(cache), rows(range(5)))
    cache.compact()
    assert len(files(cache)) == 1
    assert pq.read_metadata(files(cache)[0]).num_rows == 5


def test_a_damaged_shard_is_not_merged(cache):
    cache.commit(rows(range(100)))
    cache.commit(rows(range(100, 200)))
    damaged = files(cache)[1]
    flip(damaged, damaged.stat().st_size // 3)
    before = [file.read_bytes() for file in files(cache)]
    with pytest.raises(CacheError, match=re.escape(damaged.name)):
        cache.compact()
    assert [file.read_bytes() for file in files(cache)] == before


def test_what_shards_say_of_themselves_survives_merging(cache, monkeypatch):
    cache.commit(rows([1]))
    monkeypatch.setattr("torch.__version__", "9.9")
    cache.commit(rows([2]))
    both = reopened(cache).written_with()
    assert len(both["torch"]) == 2
    cache.compact()
    assert reopened(cache).written_with() == both


def test_what_killed_writers_left_is_removed_after_an_hour(cache):
    old, new = cache.folder / ".1.partial", cache.folder / ".2.partial"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - STALE - 9,) * 2)
    cache.commit(rows([1]))
    assert (old.exists(), new.exists()) == (False, True)


# Damage


def test_a_flipped_byte_anywhere_is_found_and_the_shard_named(cache):
    file = cache.commit(rows(range(3)))
    content = file.read_bytes()
    for place in range(0, len(content), 5):
        flip(file, place)
        (line,) = cache.check_shards()
        assert line.startswith(f"{file.name} is damaged"), place
        file.write_bytes(content)
    assert cache.check_shards() == []


def test_the_damaged_column_and_row_group_are_named(cache):
    file = cache.commit(rows(range(200)))
    group = pq.read_metadata(file).row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        content = file.read_bytes()
        flip(file, column.data_page_offset + column.total_compressed_size - 2)
        (line,) = cache.check_shards()
        assert f"{column.path_in_schema.split('.')[0]} of row group 0" in line
        file.write_bytes(content)


def test_no_flipped_byte_gives_a_wrong_value_without_an_error(cache):
    some = rows(range(20))
    file = cache.commit(some)
    content = file.read_bytes()
    silent = named = 0
    places = range(1, len(content), 13)
    for place in places:
        flip(file, place)
        try:
            assert_holds(reopened(cache), some)
            silent += 1  # a byte that no reader uses
        except CacheError as error:
            named += file.name in str(error)
        file.write_bytes(content)
    assert silent + named == len(places)
    assert named > silent


def test_a_truncated_and_a_foreign_shard_are_named(tmp_path, cache):
    file = cache.commit(rows(range(50)))
    content = file.read_bytes()
    for keep in (0, 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:keep])
        assert file.name in cache.check_shards()[0]
        with pytest.raises(CacheError, match=re.escape(file.name)):
            reopened(cache)
    file.unlink()
    stranger = ReferenceCache(tmp_path / "stranger", identity("1")).commit(rows([1]))
    (cache.folder / stranger.name).write_bytes(stranger.read_bytes())
    assert "another reference" in cache.check_shards()[0]
    with pytest.raises(CacheError, match="another reference"):
        reopened(cache)


def test_merged_shards_open_with_datasets(cache, tmp_path):
    for number in range(3):
        cache.commit(rows(range(10 * number, 10 * number + 10)))
    cache.compact()
    cache.commit(rows([99]))
    table = load_dataset(
        "parquet", data_files=str(cache.folder / "*.parquet"), split="train", cache_dir=str(tmp_path / "datasets")
    )
    assert len(table) == 31
    assert all(len(one["token_logps"]) == one["tokens"] for one in table)


# A million


def test_reading_a_cache_of_a_million_needs_no_token_log_probs(cache, monkeypatch):
    """What is read when a cache is opened: the columns of the index, in every shard."""
    cache.commit(rows(range(50)))
    read = []
    monkeypatch.setattr(
        pq.ParquetFile, "read",
        lambda self, columns, use_threads, read_=pq.ParquetFile.read: (
            read.append(columns), read_(self, columns=columns, use_threads=use_threads)
        )[1],
    )  # fmt: skip
    assert len(reopened(cache)) == 50
    assert read == [["prompt", "completion", "logp_sum", "tokens"]]


def test_an_index_takes_keys_in_any_form():
    keys = rows(range(4)).keys
    words = as_words(keys)
    assert words.shape == (4, 4)
    assert [bytes(one) for one in words] == keys
    assert json.dumps(as_words([]).shape) == "[0, 4]"
