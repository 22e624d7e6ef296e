"""What the reference cache stores: exact keys, one value per completion for good, bounded shards, checked bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from rich.console import Console
from world import make_recipe, quiet

from prefopt.cli import main
from prefopt.errors import CacheError
from prefopt.prepare import prepare
from prefopt.reference import merging
from prefopt.reference.cache import HALF_STEP, ReferenceCache, ScoredRows, text_key
from prefopt.reference.commands import build_cache
from prefopt.reference.folders import cache_folders
from prefopt.reference.hub import pull_from_hub, push_to_hub
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.index import KeyIndex, Rows, as_words
from prefopt.reference.opening import open_cache
from prefopt.reference.publishing import STALE
from prefopt.reference.remote import RemoteFolder, open_remote, pull, push
from prefopt.reference.shards import GROUP_TOKENS, shard_names
from prefopt.reference.transfer import export_cache, import_cache


def identity(weights: str = "0") -> ReferenceIdentity:
    return ReferenceIdentity(weights * 64, "0" * 64, {}, "float32", "float32")


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", identity())


@pytest.fixture
def other(tmp_path):
    return ReferenceCache(tmp_path / "other", identity())


def rows(numbers, *, shift: float = 0.0) -> ScoredRows:
    """Completions by number; a number always gives the same key and, without shift, the same log-probs."""
    keys = [text_key(np.array([n]), np.array([n, 1])) for n in numbers]
    logps = [-np.random.default_rng(n).random(1 + n % 7) * 9 - shift for n in numbers]
    return ScoredRows(keys, np.array([one.sum() for one in logps]), np.array([len(one) for one in logps]), logps)


def assert_holds(cache: ReferenceCache, some: ScoredRows) -> None:
    found, sums, tokens = cache.lookup(some.keys)
    assert found.all()
    np.testing.assert_array_equal(sums, some.sums.astype(np.float32))
    np.testing.assert_array_equal(tokens, some.tokens)
    for stored, exact in zip(cache.token_logps(some.keys), some.token_logps):
        np.testing.assert_allclose(stored, exact, rtol=HALF_STEP)


def files(cache: ReferenceCache) -> list[Path]:
    return [cache.folder / str(name) for name in shard_names(cache.folder)]


def reopened(cache: ReferenceCache) -> ReferenceCache:
    return ReferenceCache(cache.folder, cache.identity)


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


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


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


# Pruning


def test_keeping_some_drops_the_others_for_good(cache):
    cache.commit(rows(range(50)))
    cache.commit(rows(range(50, 60)))
    cache.commit(rows(range(60, 70)))
    stays = rows([*range(0, 50, 2), *range(50, 60), 12345])
    assert cache.keep_only(stays.keys, dry_run=True).dropped == 35
    assert len(reopened(cache)) == 70
    assert cache.keep_only(stays.keys).dropped == 35
    assert len(files(cache)) == 2
    assert_holds(reopened(cache), rows([*range(0, 50, 2), *range(50, 60)]))
    assert len(reopened(cache)) == 35
    cache.commit(rows([1]))
    assert_holds(reopened(cache), rows([1]))


def test_prune_keeps_what_the_recipe_needs_and_says_what_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "root"))
    recipe = make_recipe(tmp_path)
    file = tmp_path / "test.yaml"
    file.write_text(recipe.to_yaml())
    build_cache(recipe, quiet())
    cache = open_cache(recipe)
    needed = len(cache)
    cache.commit(rows(range(17)))
    assert main(["cache", "prune", str(file), "--dry-run"]) == 0
    assert "17 completions would be dropped" in capsys.readouterr().out
    assert len(reopened(cache)) == needed + 17
    assert main(["cache", "prune", str(file)]) == 0
    assert "17 completions were dropped" in capsys.readouterr().out
    assert len(reopened(cache)) == needed


def test_caches_that_nobody_uses_are_listed_and_removed(tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    monkeypatch.setenv("PREFOPT_CACHE", str(root))
    old, new = (ReferenceCache(root / "reference" / one.fingerprint[:32], one) for one in map(identity, "12"))
    old.commit(rows(range(7)))
    (root / "reference" / "notes").mkdir()
    (root / "reference" / "notes" / "mine.txt").write_text("mine")
    os.utime(old.folder / ".used", (time.time() - 100 * 24 * 3600,) * 2)
    assert [one.folder for one in cache_folders()] == [new.folder, old.folder]
    assert main(["cache", "list"]) == 0
    assert "100 days ago" in capsys.readouterr().out
    assert main(["cache", "prune", "--unused", "90d", "--dry-run"]) == 0
    assert "7 completions" in capsys.readouterr().out
    assert old.folder.exists()
    assert main(["cache", "prune", "--unused", "90d"]) == 0
    assert str(old.folder) in capsys.readouterr().out
    assert sorted(path.name for path in (root / "reference").iterdir()) == sorted([new.folder.name, "notes"])
    assert main(["cache", "prune", "--unused", "soon"]) == 2


# One file


@pytest.mark.parametrize("where", ["{folder}/cache.tar", "file://{folder}/cache.tar", "memory://{folder}/cache.tar"])
def test_an_archive_brings_what_is_missing_and_changes_nothing(tmp_path, cache, other, where):
    target = where.format(folder=tmp_path)
    cache.commit(rows(range(10)))
    cache.commit(rows(range(10, 20)))
    other.commit(rows(range(5), shift=0.25))
    assert export_cache(cache, target) > 0
    taken = import_cache(other, target)
    assert (taken.new, taken.known) == (15, 5)
    assert taken.largest_difference == pytest.approx(0.25 * 5, rel=1e-5)
    assert_holds(reopened(other), rows(range(5), shift=0.25))
    assert_holds(reopened(other), rows(range(5, 20)))
    again = import_cache(other, target)
    assert again.new == 0
    assert other.check_shards() == []
    assert not [file.name for file in other.folder.iterdir() if file.name.endswith(".partial")]


def test_equal_caches_give_equal_archives(tmp_path, cache):
    cache.commit(rows(range(10)))
    for name in "ab":
        export_cache(cache, str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_byte_in_an_archive_is_refused_and_nothing_is_taken(tmp_path, cache, other):
    cache.commit(rows(range(40)))
    archive = tmp_path / "cache.tar"
    export_cache(cache, str(archive))
    with tarfile.open(archive) as members:
        places = [member.offset_data + member.size // 2 for member in members]
    content = archive.read_bytes()
    for place in places:
        flip(archive, place)
        with pytest.raises(CacheError, match=r"cache\.tar"):
            import_cache(other, str(archive))
        archive.write_bytes(content)
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(CacheError, match=r"cache\.tar"):
        import_cache(other, str(archive))
    assert len(reopened(other)) == 0


def test_an_archive_with_other_files_or_of_another_reference_is_refused(tmp_path, cache, other):
    cache.commit(rows(range(4)))
    archive = tmp_path / "cache.tar"
    export_cache(cache, str(archive))
    foreign = ReferenceCache(tmp_path / "foreign", identity("7"))
    with pytest.raises(CacheError) as refusal:
        import_cache(foreign, str(archive))
    assert cache.identity.fingerprint[:12] in str(refusal.value)
    assert foreign.identity.fingerprint[:12] in str(refusal.value)
    evil = tmp_path / "evil.txt"
    evil.write_text("x")
    with tarfile.open(archive, "a") as members:
        members.add(evil, arcname="../evil.txt")
    with pytest.raises(CacheError, match="manifest"):
        import_cache(other, str(archive))
    with tarfile.open(tmp_path / "plain.tar", "w") as members:
        members.add(evil, arcname="evil.txt")
    for wrong in (tmp_path / "plain.tar", evil, tmp_path / "nowhere.tar"):
        with pytest.raises(CacheError, match=wrong.name):
            import_cache(other, str(wrong))
    assert not (other.folder.parent / "x").exists()


def test_a_failed_export_leaves_the_earlier_archive(tmp_path, cache):
    file = cache.commit(rows(range(4)))
    export_cache(cache, str(tmp_path / "cache.tar"))
    before = (tmp_path / "cache.tar").read_bytes()
    flip(file, 40)
    with pytest.raises(CacheError, match=re.escape(file.name)):
        export_cache(cache, str(tmp_path / "cache.tar"))
    assert (tmp_path / "cache.tar").read_bytes() == before
    flip(file, 40)
    with pytest.raises(CacheError, match="nowhere"):
        export_cache(cache, "nowhere://bucket/cache.tar")


# Elsewhere


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return f"{request.param}://{tmp_path}/remote"


def test_two_machines_share_a_folder_at_a_url(tmp_path, monkeypatch, url):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    one = open_remote(url, identity())
    one.commit(rows(range(10)))
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "two"))
    two = open_remote(url, identity())
    assert_holds(two, rows(range(10)))
    two.commit(rows(range(5, 15)))
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    assert_holds(open_remote(url, identity()), rows(range(15)))
    assert push(one, RemoteFolder(url, identity())) == 0
    with pytest.raises(CacheError) as refusal:
        open_remote(url, identity("3"))
    assert identity("3").fingerprint[:12] in str(refusal.value)
    assert identity().fingerprint[:12] in str(refusal.value)


def test_what_could_not_be_sent_is_sent_at_the_next_opening(tmp_path, monkeypatch, url):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    cache = open_remote(url, identity())
    with monkeypatch.context() as patch:
        system = fsspec.url_to_fs(url)[0]
        patch.setattr(type(system), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("unplugged")))
        with pytest.warns(UserWarning, match="unplugged"):
            cache.commit(rows(range(3)))
    assert RemoteFolder(url, identity()).names() == []
    open_remote(url, identity())
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "two"))
    assert_holds(open_remote(url, identity()), rows(range(3)))


def test_a_half_written_remote_shard_is_refused_and_named(cache, other, url):
    cache.commit(rows(range(100)))
    remote = RemoteFolder(url, identity())
    assert push(cache, remote) == 100
    (name,) = remote.names()
    system, path = fsspec.url_to_fs(f"{url}/{name}")
    content = system.cat_file(path)
    for broken in (content[: len(content) // 2], content[:60] + b"!" + content[61:]):
        system.pipe_file(path, broken)
        with pytest.raises(CacheError, match=str(name)):
            pull(other, remote)
    assert len(reopened(other)) == 0


class Hub:
    """Repositories in a folder, behind the calls of `HfApi` that we make."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.uploads = 0

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert repo_type == "dataset"
        assert exist_ok
        self.private.setdefault(repo_id, private)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset"
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"no repository {repo_id}")
        return str(self.root / repo_id)

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == "dataset"
        self.uploads += 1
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr("prefopt.reference.hub.HfApi", lambda: stand_in)
    return stand_in


def test_a_hub_repository_is_private_has_a_card_and_gives_back_what_was_pushed(tmp_path, cache, other, hub):
    for begin in range(0, 30, 10):
        cache.commit(rows(range(begin, begin + 10)))
    assert push_to_hub(cache, "me/logps") == 30
    assert hub.private == {"me/logps": True}
    repository = hub.root / "me" / "logps"
    card = (repository / "README.md").read_text()
    assert cache.identity.fingerprint in card
    assert "prefopt cache pull RECIPE me/logps" in card
    assert "nats" in card
    table = load_dataset("parquet", data_files=str(repository / "*.parquet"), cache_dir=str(tmp_path / "d"))["train"]
    assert len(table) == 30
    assert pull_from_hub(other, "me/logps").new == 30
    assert_holds(reopened(other), rows(range(30)))
    cache.commit(rows(range(30, 33)))
    assert push_to_hub(cache, "me/logps") == 3
    assert push_to_hub(cache, "me/logps") == 0
    assert hub.uploads == 2
    assert pull_from_hub(other, "me/logps").new == 3


def test_a_hub_repository_of_another_reference_or_damaged_or_missing_is_refused(tmp_path, cache, other, hub):
    cache.commit(rows(range(10)))
    push_to_hub(cache, "me/logps")
    foreign = ReferenceCache(tmp_path / "foreign", identity("7"))
    for call in (push_to_hub, pull_from_hub):
        with pytest.raises(CacheError, match=cache.identity.fingerprint[:12]):
            call(foreign, "me/logps")
    (shard,) = (hub.root / "me" / "logps").glob("*.parquet")
    flip(shard, 30)
    with pytest.raises(CacheError, match=re.escape(shard.name)):
        pull_from_hub(other, "me/logps")
    with pytest.raises(CacheError, match="me/nothing"):
        pull_from_hub(other, "me/nothing")
    (hub.root / "me" / "data").mkdir()
    with pytest.raises(CacheError, match=r"reference\.json"):
        pull_from_hub(other, "me/data")
    assert len(reopened(other)) == 0


def test_the_command_line_moves_a_cache_from_one_user_to_another(tmp_path, monkeypatch, capsys, hub):
    recipe = make_recipe(tmp_path)
    file, archive = tmp_path / "test.yaml", tmp_path / "cache.tar"
    file.write_text(recipe.to_yaml())
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    build_cache(recipe, quiet())
    rows_there = len(open_cache(recipe))
    for words in (["compact"], ["export", archive], ["push", "me/logps"], ["push", f"memory://{tmp_path}/far"]):
        assert main(["cache", words[0], str(file), *map(str, words[1:])]) == 0
    for user, words in {"two": ["import", archive], "three": ["pull", "me/logps"],
                        "four": ["pull", f"memory://{tmp_path}/far"]}.items():  # fmt: skip
        monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / user))
        assert main(["cache", words[0], str(file), *map(str, words[1:])]) == 0
        assert f"{rows_there:,} completions taken" in capsys.readouterr().out
        assert len(open_cache(recipe)) == rows_there


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


# What cannot be done is said of the cache


def test_a_folder_that_refuses_a_build_is_named_before_anything_is_scored(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "cache" / ".abc.partial"))

    recipe = make_recipe(tmp_path, reference={"cache": str(tmp_path / "cache")})
    open_cache(recipe)
    monkeypatch.setattr("prefopt.reference.build_plan.publish", refuse)
    with pytest.raises(CacheError) as refusal:
        build_cache(recipe, quiet())
    (problem,) = refusal.value.problems
    assert problem.where == f"reference cache {tmp_path / 'cache'}"
    assert "Read-only" in problem.given
    assert ".partial" not in str(refusal.value)


def test_a_recipe_without_a_cache_builds_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(tmp_path, reference={"cache": "off"})
    with pytest.raises(CacheError, match=r"reference\.cache"):
        build_cache(recipe, quiet())
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize(
    ("changes", "said", "cached"),
    [
        ({"loss": "tdpo2"}, "whole next-token distributions, which no cache holds", False),
        ({"reference": {"sync": {"every": 2}}}, "the reference moves every 2 steps", True),
    ],
)
def test_what_no_cache_can_hold_is_said_and_not_scored(tmp_path, monkeypatch, changes, said, cached):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))  # other tests score the same small model
    console = Console(file=io.StringIO(), width=400)
    recipe = make_recipe(tmp_path, **changes)
    build_cache(recipe, console)
    assert said in console.file.getvalue()
    held_out = prepare(recipe, quiet=True).data.eval
    assert len(open_cache(recipe)) == (len(held_out.layout.completion_hashes) if cached else 0)


def test_another_references_copy_is_refused_by_the_name_it_was_given(tmp_path, cache, hub, url):
    cache.commit(rows(range(4)))
    push(cache, RemoteFolder(url, cache.identity))
    push_to_hub(cache, "me/logps")
    export_cache(cache, str(tmp_path / "cache.tar"))
    foreign = ReferenceCache(tmp_path / "foreign", identity("7"))
    for place, call in {
        url: lambda place: RemoteFolder(place, foreign.identity),
        "me/logps": lambda place: pull_from_hub(foreign, place),
        str(tmp_path / "cache.tar"): lambda place: import_cache(foreign, place),
    }.items():
        with pytest.raises(CacheError) as refusal:
            call(place)
        assert refusal.value.problems[0].where == place
        assert "reference.cache" not in refusal.value.problems[0].fix
