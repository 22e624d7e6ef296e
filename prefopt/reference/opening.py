"""The reference of a run: found in the cache or scored into it before the policy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.forward import Layout, Scorer
from prefopt.layout import probe_group, settle_layout
from prefopt.memory import free_models
from prefopt.models import ModelSource, default_device, load_model
from prefopt.paths import cache_root
from prefopt.prepare import Prepared, reference_source, resolve_token_budget
from prefopt.recipe import Recipe
from prefopt.reference.build import BuildReport, dataset_keys, fill_cache
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.identity import ReferenceIdentity, identify
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


def open_cache(recipe: Recipe) -> ReferenceCache:
    """Open the cache that a recipe names, for the reference that it names."""
    identity = identify(reference_source(recipe))
    if recipe.reference.cache == "auto":
        folder = cache_root() / "reference" / identity.fingerprint[:32]
        return ReferenceCache(folder, identity)
    return ReferenceCache(Path(recipe.reference.cache).expanduser(), identity, named_by_user=True)


def cached_reference(prepared: Prepared, console: Console) -> CachedReference:
    """Look every completion of a run up, and score what is missing.

    The reference is loaded only if something is missing, and is gone from memory when this returns. A loss that
    reads no reference asks for the held-out completions only: the evaluation's drift needs them.
    """
    recipe, data = prepared.recipe, prepared.data
    cache = open_cache(recipe)
    source = reference_source(recipe)
    budget = resolve_token_budget(recipe.reference.token_budget, default_device())
    needs = prepared.loss.needs
    report = BuildReport(0, 0, 0, 0, 0.0)
    found: dict[str, CachedLogps] = {}
    with _lazy_scorer(source, recipe, data.train) as scorer, _progress(console) as progress:
        for name, dataset in prepared.read_by_reference():
            keys, needed = dataset_keys(dataset, rejected=needs.rejected or name != "train")
            report += fill_cache(
                cache, dataset, keys, needed,
                scorer=scorer, precision=recipe.train.precision, token_budget=budget, progress=progress,
            )  # fmt: skip
            found[name] = CachedLogps(cache, dataset, keys, tokens=needs.tokens)
    return CachedReference(source, cache.identity, cache, report, found)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
        loaded.clear()
        free_models()


def load_reference(source: ModelSource, recipe: Recipe, probe: PromptGroup, *, layout: Layout | None = None) -> Scorer:
    """Load the reference, frozen and in eval mode, in the layout that agrees with its plain logits.

    ``layout`` is one that an earlier load settled on; without it the comparison is made.
    """
    scorer = Scorer(load_model(source).requires_grad_(False)).eval()
    if layout is None:
        settle_layout(scorer, recipe, probe)
    else:
        scorer.set_layout(layout)
    return scorer


@contextmanager
def reference_in_memory(
    source: ModelSource, recipe: Recipe, probe: PromptGroup, *, layout: Layout | None = None
) -> Iterator[Scorer]:
    """Hold the reference in memory for as long as the context lasts."""
    scorer = load_reference(source, recipe, probe, layout=layout)
    try:
        yield scorer
    finally:
        del scorer
        free_models()
