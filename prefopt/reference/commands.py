"""`prefopt cache build|verify|info`: what a person asks of the reference cache."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.batching import make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import CacheError, Problem
from prefopt.forward import TOLERANCE, compute_dtype, score
from prefopt.layout import probe_group
from prefopt.prepare import Prepared, prepare, reference_source, with_sandbox
from prefopt.recipe import Recipe
from prefopt.reference.cache import ReferenceCache, text_key
from prefopt.reference.identity import file_hashes, model_folder
from prefopt.reference.opening import cached_reference, open_cache, reference_in_memory

VERIFIED_GROUPS = 64
"""Groups whose completions `verify` scores again."""


def build_cache(recipe: Recipe, console: Console) -> None:
    """Score what the cache lacks for a recipe."""
    prepared = prepare(recipe, quiet=not console.is_terminal)
    reference = cached_reference(prepared, console)
    report = reference.report
    console.print(
        f"{report.hits + report.misses:,} completions needed: {report.hits:,} were cached, {report.misses:,} scored "
        f"({report.tokens:,} tokens in {report.seconds:.1f} s)"
    )
    _show(reference.cache, console)


def cache_info(recipe: Recipe, console: Console) -> None:
    """Show whose log-probs the cache holds and how many."""
    _show(open_cache(with_sandbox(recipe)), console)


def verify_cache(recipe: Recipe, console: Console, *, rehash: bool) -> None:
    """Read every shard against its checksums and score a sample of completions again.

    Raises:
        CacheError: a damaged shard, weights that changed under their memo, or log-probs beyond the tolerance.
    """
    prepared = prepare(recipe, quiet=not console.is_terminal)
    if rehash:
        _refuse_changed_weights(prepared)
    cache = open_cache(prepared.recipe)
    _show(cache, console)
    problems = [
        Problem(
            f"reference cache {cache.folder}",
            "shards as they were written",
            line,
            "remove the shard and build again",
        )
        for line in cache.check_shards()
    ]
    if problems:
        raise CacheError(problems)
    differences, lengths = _differences(prepared, cache)
    if not len(differences):
        console.print("no completion of this recipe's data is cached yet; prefopt cache build RECIPE")
        return
    worst = float((np.abs(differences) / np.sqrt(lengths)).max())
    limit = TOLERANCE[compute_dtype(recipe.train.precision)]
    console.print(
        f"{len(differences)} completions scored again: mean difference {np.abs(differences).mean():.2g} nats, largest "
        f"{np.abs(differences).max():.2g}; {worst:.2g} nats per root token (tolerance {limit:g})"
    )
    if not worst <= limit:
        raise CacheError(
            Problem(f"reference cache {cache.folder}", f"log-probs within {limit:g} nats per root token",
                    f"{worst:.3g}", "remove the folder and build again with the versions in use")
        )  # fmt: skip
    console.print("every shard is sound and the sample agrees")


def _differences(prepared: Prepared, cache: ReferenceCache) -> tuple[np.ndarray, np.ndarray]:
    """Recomputed minus cached sums, in nats, and lengths, of a sample spread over the data."""
    recipe, dataset = prepared.recipe, prepared.data.train
    spread = np.unique(np.linspace(0, len(dataset) - 1, VERIFIED_GROUPS).astype(int))
    groups, sums = [], []
    for number in spread:
        group = dataset[int(number)]
        found, cached, _ = cache.lookup([text_key(group.prompt, c) for c in group.completions])
        kept = tuple(completion for completion, there in zip(group.completions, found) if there)
        if kept:
            groups.append(PromptGroup(group.prompt, kept, ()))
            sums.append(cached[found])
    if not groups:
        return np.empty(0), np.empty(0)
    with reference_in_memory(reference_source(recipe), recipe, probe_group(dataset)) as scorer:
        batches = (make_batch([group]) for group in groups)
        results = [result for _, result in score(scorer, batches, precision=recipe.train.precision)]
    again = np.concatenate([result.sums.double().cpu().numpy() for result in results])
    lengths = np.concatenate([result.lengths.cpu().numpy() for result in results])
    return again - np.concatenate(sums), lengths


def _refuse_changed_weights(prepared: Prepared) -> None:
    """Hash the weights again and compare with what the memo said."""
    folder = model_folder(reference_source(prepared.recipe))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    remembered, read = file_hashes(files), file_hashes(files, rehash=True)
    changed = [file.name for file, old, new in zip(files, remembered, read) if old != new]
    if changed:
        raise CacheError(
            Problem(str(folder), "weights that hash as they did",
                    f"{', '.join(changed)} changed with size and time kept",
                    "build again: the corrected hashes are remembered now")
        )  # fmt: skip


def _show(cache: ReferenceCache, console: Console) -> None:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in cache.summary().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    quantization = cache.identity.quantization or "none"
    table.add_row("quantization", str(quantization))
    table.add_row("compute", f"{cache.identity.compute} over {cache.identity.weights_dtype} weights")
    console.print(table)
