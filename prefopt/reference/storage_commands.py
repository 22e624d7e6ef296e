"""`prefopt cache list|compact|prune|export|import|push|pull`: what a person does with what is stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefopt.errors import Problem, UserError
from prefopt.prepare import prepare, with_sandbox
from prefopt.recipe import Recipe
from prefopt.reference.cache import Adopted, ReferenceCache
from prefopt.reference.folders import CacheFolder, cache_folders, remove
from prefopt.reference.hub import pull_from_hub, push_to_hub
from prefopt.reference.keys import dataset_keys
from prefopt.reference.opening import open_cache
from prefopt.reference.remote import RemoteFolder, pull, push
from prefopt.reference.transfer import export_cache, import_cache


def list_caches(console: Console) -> None:
    """Show every cache under the cache root."""
    found = cache_folders()
    if not found:
        console.print("no reference caches yet; prefopt cache build RECIPE makes one")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("reference", "quantization", "compute", "completions", "shards", "size", "used", "folder"):
        table.add_column(column, justify="right" if column in ("completions", "shards", "size") else "left")
    for one in found:
        table.add_row(
            one.fingerprint[:12],
            str((one.identity.get("quantization") or {}).get("bnb_4bit_quant_type", ""))
            or ("int8" if one.identity.get("quantization") else "none"),
            str(one.identity.get("compute", "")),
            "damaged" if one.completions is None else f"{one.completions:,}",
            f"{one.shards:,}",
            size(one.bytes),
            _ago(one),
            str(one.folder),
        )
    console.print(table)


def compact_cache(recipe: Recipe, console: Console) -> None:
    """Merge the shards of a recipe's cache."""
    cache = _opened(recipe)
    done = cache.compact()
    console.print(f"{done.shards_before:,} shards were merged into {done.shards:,} ({len(cache):,} completions)")


def prune_cache(recipes: Sequence[Recipe], console: Console, *, dry_run: bool) -> None:
    """Drop from the caches of some recipes what none of them needs."""
    caches: dict[Path, ReferenceCache] = {}
    needed: dict[Path, set[bytes]] = {}
    for recipe in recipes:
        prepared = prepare(recipe, quiet=not console.is_terminal)
        cache = open_cache(prepared.recipe)
        datasets = [prepared.data.train, prepared.data.eval, *prepared.partners.values()]
        caches[cache.folder] = cache
        for dataset in datasets:
            if dataset is not None:
                needed.setdefault(cache.folder, set()).update(dataset_keys(dataset)[0])
    for folder, cache in caches.items():
        done = cache.keep_only(needed[folder], dry_run=dry_run)
        kept = len(cache) - done.dropped if dry_run else len(cache)
        verb = "would be dropped" if dry_run else "were dropped"
        console.print(f"{folder}: {done.dropped:,} completions {verb}, {kept:,} stay")


def prune_unused(unused: str, console: Console, *, dry_run: bool) -> None:
    """Remove whole caches that were not opened for some days.

    Raises:
        UserError: not a number of days.
    """
    match = re.fullmatch(r"(\d+)d", unused)
    if match is None:
        raise UserError(Problem("--unused", "a number of days, such as 90d", unused))
    days = int(match[1])
    old = [one for one in cache_folders() if one.idle_days > days]
    for one in old:
        verb = "would be removed" if dry_run else "removed"
        rows = "damaged" if one.completions is None else f"{one.completions:,} completions"
        if not dry_run:
            remove(one)
        console.print(f"{one.folder}: {verb} ({rows}, {size(one.bytes)}, used {_ago(one)})")
    if not old:
        console.print(f"every cache was used within {days} days")


def export_to(recipe: Recipe, target: str, console: Console) -> None:
    """Write a recipe's cache as one file."""
    cache = _opened(recipe)
    written = export_cache(cache, target)
    console.print(f"{len(cache):,} completions in {target} ({size(written)})")


def import_from(recipe: Recipe, source: str, console: Console) -> None:
    """Take from an archive what a recipe's cache lacks."""
    _say(import_cache(_opened(recipe), source), source, console)


def push_to(recipe: Recipe, target: str, console: Console) -> None:
    """Send what a dataset repository of the hub, or a folder at a URL, lacks."""
    cache = _opened(recipe)
    sent = push(cache, RemoteFolder(target, cache.identity)) if "://" in target else push_to_hub(cache, target)
    console.print(f"{sent:,} completions sent to {target}; the other {len(cache) - sent:,} were there")


def pull_from(recipe: Recipe, source: str, console: Console) -> None:
    """Take what a recipe's cache lacks from a dataset repository of the hub or a folder at a URL."""
    cache = _opened(recipe)
    taken = pull(cache, RemoteFolder(source, cache.identity)) if "://" in source else pull_from_hub(cache, source)
    _say(taken, source, console)


def _opened(recipe: Recipe) -> ReferenceCache:
    return open_cache(with_sandbox(recipe))


def _say(taken: Adopted, source: str, console: Console) -> None:
    agreement = f"; values of both differ by at most {taken.largest_difference:.2g} nats" if taken.known else ""
    console.print(f"{taken.new:,} completions taken from {source}; {taken.known:,} were here and stay{agreement}")


def _ago(one: CacheFolder) -> str:
    days = int(one.idle_days)
    return "today" if days == 0 else "yesterday" if days == 1 else f"{days} days ago"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
