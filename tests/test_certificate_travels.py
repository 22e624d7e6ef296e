"""A certificate goes where its cache goes, and nothing damaged or smaller takes its place."""

from __future__ import annotations

import errno
import io
import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from certificates import opened
from rich.console import Console
from world import make_recipe

from prefopt.errors import CacheError
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certificate_file import certificate_file, read_certificate, store_certificate
from prefopt.reference.hub import pull_from_hub, push_to_hub
from prefopt.reference.remote import RemoteFolder, pull, push
from prefopt.reference.transfer import export_cache, import_cache


class Hub:
    """One repository in a folder, behind the calls of `HfApi` that are made."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, *_, **__):
        self.folder.mkdir(exist_ok=True)

    def snapshot_download(self, *_, allow_patterns, **__):
        assert any(fnmatch("certificate-0123456789abcdef.json", pattern) for pattern in allow_patterns)
        return str(self.folder)

    def upload_folder(self, *, folder_path, **__):
        for file in Path(folder_path).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())


def there_and_back(scheme):
    """The calls that bring a cache to a URL and from there."""
    return (
        lambda cache, far: push(cache, RemoteFolder(f"{scheme}://{far}", cache.identity)),
        lambda cache, far: pull(cache, RemoteFolder(f"{scheme}://{far}", cache.identity)),
    )


WAYS = {
    "archive": (
        lambda cache, far: export_cache(cache, f"{far}.tar"),
        lambda cache, far: import_cache(cache, f"{far}.tar"),
    ),
    "file": there_and_back("file"),
    "memory": there_and_back("memory"),
    "hub": (lambda cache, far: push_to_hub(cache, "me/logps"), lambda cache, far: pull_from_hub(cache, "me/logps")),
}


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A cache with its certificate, and a certificate of a smaller sample of the same reference."""
    folder = tmp_path_factory.mktemp("certified")
    recipe = make_recipe(folder, reference={"quantization": "nf4", "cache": str(folder / "cache")})
    cache, made = opened(recipe)
    few = replace(made.sample, comparisons=made.sample.comparisons[:3])
    return cache, made, replace(made, sample=few)


@pytest.mark.parametrize("way", WAYS)
def test_a_certificate_travels_with_the_shards_and_replaces_only_a_smaller_one(tmp_path, monkeypatch, certified, way):
    monkeypatch.setattr("prefopt.reference.hub.HfApi", lambda: Hub(tmp_path / "far"))
    cache, made, smaller = certified
    there, back = WAYS[way]
    there(cache, tmp_path / "far")
    for number, standing in enumerate((None, smaller)):
        other = ReferenceCache(tmp_path / f"other-{number}", cache.identity)
        if standing is not None:
            store_certificate(other, standing)
        back(other, tmp_path / "far")
        assert certificate_file(other).read_bytes() == certificate_file(cache).read_bytes()
        assert len(other) == len(cache)
    poor = ReferenceCache(tmp_path / "poor", cache.identity)
    store_certificate(poor, smaller)
    there(poor, tmp_path / "far")
    if way != "archive":  # an archive is written anew
        back(other, tmp_path / "far")
        assert read_certificate(other).comparisons == made.comparisons
    back(cache, tmp_path / "far")
    assert read_certificate(cache).comparisons == made.comparisons


@pytest.mark.parametrize("way", ["file", "hub"])
def test_a_certificate_that_changed_on_its_way_is_refused_and_named(tmp_path, monkeypatch, certified, way):
    monkeypatch.setattr("prefopt.reference.hub.HfApi", lambda: Hub(tmp_path / "far"))
    cache, _, _ = certified
    there, back = WAYS[way]
    there(cache, tmp_path / "far")
    file = tmp_path / "far" / certificate_file(cache).name
    stored = json.loads(file.read_text())
    stored["sample"]["full"][0] += 1.0
    file.write_text(json.dumps(stored))
    other = ReferenceCache(tmp_path / "other", cache.identity)
    with pytest.raises(CacheError, match=file.name) as refusal:
        back(other, tmp_path / "far")
    assert "SHA-256" in str(refusal.value)
    assert not len(ReferenceCache(other.folder, other.identity))


def test_a_cache_at_a_url_has_the_certificate_as_soon_as_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4", "cache": f"file://{tmp_path}/far"})
    _, made = opened(recipe)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr("prefopt.reference.opening.load_model", lambda *_: pytest.fail("loaded a model"))
    cache, found = opened(recipe)
    assert found.made == made.made
    assert read_certificate(cache) is not None


def test_merging_pruning_and_checking_leave_a_certificate_alone(tmp_path, certified):
    cache, made, _ = certified
    export_cache(cache, str(tmp_path / "cache.tar"))
    other = ReferenceCache(tmp_path / "other", cache.identity)
    import_cache(other, str(tmp_path / "cache.tar"))
    other.compact()
    other.keep_only([])
    assert other.check_shards() == []
    assert read_certificate(other).made == made.made
    (other.folder / "reference.json").unlink()
    assert read_certificate(ReferenceCache(other.folder, other.identity)) is not None


def test_a_folder_that_may_only_be_read_gives_a_certificate_and_keeps_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("prefopt.reference.certificate_file.partial_in", refuse)
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4", "cache": str(tmp_path / "cache")})
    console = Console(file=io.StringIO(), width=400)
    cache, made = opened(recipe, console=console)
    assert made.comparisons
    assert read_certificate(cache) is None
    assert "the certificate is not kept" in console.file.getvalue()
    assert "Read-only" in console.file.getvalue()
