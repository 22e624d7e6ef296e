"""The reference of a run: found in the cache or scored into it before the policy is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from prefopt.data.groups import GroupDataset
from prefopt.errors import CacheError, Problem
from prefopt.forward import Scorer, Settled
from prefopt.layout import settle_layout
from prefopt.memory import unload
from prefopt.models import ModelSource, default_device, load_model
from prefopt.paths import cache_root
from prefopt.prepare import Prepared, reference_source, resolve_token_budget
from prefopt.probe import ProbeText, probe_group
from prefopt.recipe import Recipe
from prefopt.reference.build import BuildReport, fill_cache
from prefopt.reference.build_plan import Wanted
from prefopt.reference.build_progress import BuildProgress
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certificate import Certificate
from prefopt.reference.certifying import certify
from prefopt.reference.claims import Worker
from prefopt.reference.identity import ReferenceIdentity, identify
from prefopt.reference.keys import dataset_keys
from prefopt.reference.remote import open_remote
from prefopt.reference.source import CachedLogps


@dataclass(frozen=True)
class CachedReference:
    """A reference whose log-probs of a run's data are all in the cache."""

    source: ModelSource
    identity: ReferenceIdentity
    cache: ReferenceCache
    report: BuildReport
    logps: Mapping[str, CachedLogps]
    """By the name of the data, `Prepared.read_by_reference`."""
    certificate: Certificate | None = None
    """Of a quantized reference: how far it is from full precision."""


def open_cache(recipe: Recipe) -> ReferenceCache:
    """Open the cache that a recipe names, for the reference that it names.

    Raises:
        CacheError: the recipe wants none, or it is not this reference's.
    """
    if recipe.reference.cache == "off":
        raise CacheError(
            Problem("reference.cache", "a cache: auto, a folder or a URL", "off",
                    "remove it, or give reference.cache=auto on the command line")
        )  # fmt: skip
    identity = identify(reference_source(recipe))
    if recipe.reference.cache == "auto":
        folder = cache_root() / "reference" / identity.fingerprint[:32]
        return ReferenceCache(folder, identity)
    if "://" in recipe.reference.cache:
        return open_remote(recipe.reference.cache, identity)
    return ReferenceCache(Path(recipe.reference.cache).expanduser(), identity, named_by_user=True)


def cached_reference(prepared: Prepared, console: Console, *, only: Collection[str] | None = None) -> CachedReference:
    """Look every completion of a run up, and score what is missing.

    The reference is loaded only if something is missing, and is gone from memory when this returns. A loss that
    reads no reference asks for the held-out completions only: the evaluation's drift needs them.

    Every process of one launch may call this at once: they share what is missing, and each returns when all of it is
    in the cache. Independent processes on one cache share it too.

    Args:
        prepared: the run.
        console: where to say what is scored.
        only: names of `Prepared.read_by_reference` to ask for; None asks for all.
    """
    recipe, data = prepared.recipe, prepared.data
    cache = open_cache(recipe)
    source = reference_source(recipe)
    needs = prepared.loss.needs
    wanted = {
        name: Wanted(dataset, *dataset_keys(dataset, rejected=needs.rejected or name != "train"))
        for name, dataset in prepared.read_by_reference()
        if only is None or name in only
    }
    worker = Worker.launched()
    take_own_device()
    shown = console if worker.rank == 0 else Console(quiet=True)
    with _lazy_scorer(source, recipe, data.train) as scorer, BuildProgress(shown) as progress:
        report = fill_cache(
            cache,
            list(wanted.values()),
            scorer=scorer,
            precision=recipe.train.precision,
            token_budget=resolve_token_budget(recipe.reference.token_budget, default_device()),
            worker=worker,
            progress=progress,
        )
    logps = {name: CachedLogps(cache, one.dataset, one.keys, tokens=needs.tokens) for name, one in wanted.items()}
    certificate = None
    if only is None:  # here no model is in memory
        probe = probe_group(data.train, data.eval)
        certificate = certify(
            prepared, cache, console, open_model=lambda exact: reference_in_memory(exact, recipe, probe)
        )
    return CachedReference(source, cache.identity, cache, report, logps, certificate)


def take_own_device() -> None:
    """Give each process of a launch its own accelerator; `Accelerator()` does the same where there is one."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def _lazy_scorer(source: ModelSource, recipe: Recipe, dataset: GroupDataset) -> Iterator[Callable[[], Scorer]]:
    """Give a function that loads the reference on its first call; what it loaded is freed at the end."""
    loaded: list[Scorer] = []

    def scorer() -> Scorer:
        if not loaded:
            loaded.append(load_reference(source, recipe, probe_group(dataset)))
        return loaded[0]

    try:
        yield scorer
    finally:
        for one in loaded:
            unload(one)


def load_reference(source: ModelSource, recipe: Recipe, probe: ProbeText, *, settled: Settled | None = None) -> Scorer:
    """Load the reference, frozen and in eval mode, in the layout that agrees with its plain logits.

    ``settled`` is what an earlier load came to; without it the comparison is made.
    """
    scorer = Scorer(load_model(source).requires_grad_(False)).eval()
    if settled is None:
        settle_layout(scorer, recipe, probe)
    else:
        scorer.set_layout(*settled)
    return scorer


@contextmanager
def reference_in_memory(
    source: ModelSource, recipe: Recipe, probe: ProbeText, *, settled: Settled | None = None
) -> Iterator[Scorer]:
    """Hold the reference in memory for as long as the context lasts."""
    scorer = load_reference(source, recipe, probe, settled=settled)
    try:
        yield scorer
    finally:
        unload(scorer)
