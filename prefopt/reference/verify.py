"""`prefopt cache verify`: what the cache holds against its reference, and that reference against full precision."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import torch
from rich.console import Console

from prefopt.adapters import adapter_folder
from prefopt.errors import CacheError, Problem
from prefopt.forward import TOLERANCE, compute_dtype
from prefopt.models import ModelSource, default_device
from prefopt.prepare import Prepared, prepare, reference_source, resolve_token_budget
from prefopt.probe import probe_group
from prefopt.recipe import Recipe
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certified_sample import CertifiedSample, cached_part, score_again
from prefopt.reference.certifying import certify, why_no_certificate
from prefopt.reference.identity import file_hashes, model_folder, weight_files
from prefopt.reference.opening import open_cache, reference_in_memory


def verify_cache(recipe: Recipe, console: Console, *, rehash: bool) -> None:
    """Read every shard, score a sample again, compare versions, and certify a quantized reference afresh.

    Args:
        recipe: whose reference and data.
        console: where to say what was found.
        rehash: hash the reference's weights again instead of trusting the memo.

    Raises:
        CacheError: damaged shards, weights that changed under their memo, or log-probs beyond the tolerance.
        ModelError: the reference's error is larger than `reference.max_margin_error`.
    """
    prepared = prepare(recipe, quiet=not console.is_terminal)
    if rehash:
        _refuse_changed_weights(prepared)
    cache = open_cache(prepared.recipe)
    summary = cache.summary()
    console.print(f"{summary['completions']:,} completions in {summary['shards']:,} shards: {cache.folder}")
    if damaged := [_damaged(cache, line) for line in cache.check_shards()]:
        raise CacheError(damaged)
    console.print("every shard reads back as it was written")
    for line in other_versions(cache):
        console.print(f"note: {line}")
    again = _scored_again(prepared, cache)
    if again is None:
        console.print("no completion of this recipe's data is cached yet; prefopt cache build RECIPE")
        return
    _refuse_disagreement(again, prepared, cache, console)
    if lacking := why_no_certificate(prepared.recipe):
        console.print(f"no certificate: {lacking}")
    else:
        certify(prepared, cache, console, open_model=lambda source: _in_memory(prepared, source), afresh=True)
    console.print("the cache is sound")


def other_versions(cache: ReferenceCache) -> list[str]:
    """Say where the shards were computed by other versions or on another device than are present now."""
    present = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    lines = []
    for name, written in cache.written_with().items():
        if name not in present:
            try:
                present[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # what else a shard says of itself
        # `2.13.0+cpu` and `2.13.0` are builds of one version.
        others = [one for one in written if one.partition("+")[0] != present[name].partition("+")[0]]
        if others:
            lines.append(f"{name} is {present[name]} here, and shards were written with {', '.join(others)}")
    return lines


def _scored_again(prepared: Prepared, cache: ReferenceCache) -> CertifiedSample | None:
    """Score a sample of the first data that the reference reads with the reference itself."""
    datasets = [dataset for _, dataset in prepared.read_by_reference()]
    part = cached_part(datasets[0], cache) if datasets else None
    if part is None or not part.groups:
        return None
    recipe = prepared.recipe
    budget = resolve_token_budget(recipe.reference.token_budget, default_device())
    with _in_memory(prepared, reference_source(recipe)) as scorer:
        return score_again(part, cache, scorer, precision=recipe.train.precision, token_budget=budget)


def _in_memory(prepared: Prepared, source: ModelSource):  # type: ignore[no-untyped-def]
    return reference_in_memory(source, prepared.recipe, probe_group(prepared.data.train, prepared.data.eval))


def _refuse_disagreement(again: CertifiedSample, prepared: Prepared, cache: ReferenceCache, console: Console) -> None:
    """Print how far the cache is from the reference, and raise CacheError where that is more than rounding."""
    difference = np.abs(again.completion_errors)
    worst = float((difference / np.sqrt(again.lengths)).max())
    limit = TOLERANCE[compute_dtype(prepared.recipe.train.precision)]
    console.print(
        f"{len(difference)} completions scored again: mean difference {difference.mean():.2g} nats, largest "
        f"{difference.max():.2g}; {worst:.2g} nats per root token (tolerance {limit:g})"
    )
    if not worst <= limit:
        raise CacheError(
            Problem(f"reference cache {cache.folder}", f"log-probs within {limit:g} nats per root token",
                    f"{worst:.3g}" + "".join(f"; {line}" for line in other_versions(cache)),
                    "remove the folder and build again with the versions in use")
        )  # fmt: skip


def _damaged(cache: ReferenceCache, line: str) -> Problem:
    fix = "remove the shard and build again: only its completions are scored anew"
    return Problem(f"reference cache {cache.folder}", "shards as they were written", line, fix)


def _refuse_changed_weights(prepared: Prepared) -> None:
    """Hash the weights again and compare with what the memo said."""
    source = reference_source(prepared.recipe)
    folder = model_folder(source)
    files = weight_files(source, folder)
    if source.adapter is not None:
        files += sorted(adapter_folder(source.adapter).glob("adapter_model.*"))
    remembered, read = file_hashes(files), file_hashes(files, rehash=True)
    changed = [file.name for file, old, new in zip(files, remembered, read) if old != new]
    if changed:
        raise CacheError(
            Problem(str(folder), "weights that hash as they did",
                    f"{', '.join(changed)} changed with size and time kept",
                    "build again: the corrected hashes are remembered now")
        )  # fmt: skip
