"""A cache goes elsewhere and comes back: one file, a URL, a hub repository; nothing damaged or foreign is taken."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import fsspec
import pytest
from caches import assert_holds, flip, identity, reopened, rows
from datasets import load_dataset
from world import make_recipe, quiet

from prefopt.cli import main
from prefopt.errors import CacheError
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.commands import build_cache
from prefopt.reference.hub import pull_from_hub, push_to_hub
from prefopt.reference.opening import open_cache
from prefopt.reference.remote import RemoteFolder, open_remote, pull, push
from prefopt.reference.transfer import export_cache, import_cache


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", identity())


@pytest.fixture
def other(tmp_path):
    return ReferenceCache(tmp_path / "other", identity())


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
