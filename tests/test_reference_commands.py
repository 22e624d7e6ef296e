"""What people do with caches: keep what is needed, list what is there, and be told what cannot be."""

from __future__ import annotations

import errno
import io
import os
import time

import pytest
from caches import assert_holds, files, identity, reopened, rows
from rich.console import Console
from world import make_recipe, quiet

from prefopt.cli import main
from prefopt.errors import CacheError
from prefopt.prepare import prepare
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.commands import build_cache
from prefopt.reference.folders import cache_folders
from prefopt.reference.opening import open_cache


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", identity())


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
