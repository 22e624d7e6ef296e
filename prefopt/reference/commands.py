"""`prefopt cache build|verify|info`: what a person asks of the reference cache."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from prefopt.prepare import Prepared, prepare, with_sandbox
from prefopt.recipe import Recipe
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.claims import Worker
from prefopt.reference.opening import cached_reference, open_cache
from prefopt.reference.verify import verify_cache

__all__ = ["build_cache", "cache_info", "verify_cache"]


def build_cache(recipe: Recipe, console: Console) -> None:
    """Score what the cache lacks for a recipe."""
    if Worker.launched().rank:  # one of several processes speaks
        console = Console(quiet=True)
    prepared = prepare(recipe, quiet=not console.is_terminal)
    if remark := not_cacheable(prepared):
        console.print(remark)
    if prepared.loss.needs.sequential_kl:
        return
    reference = cached_reference(prepared, console)
    report = reference.report
    console.print(
        f"{report.hits + report.misses:,} completions needed: {report.hits:,} were cached, {report.misses:,} scored "
        f"({report.tokens:,} tokens in {report.seconds:.1f} s)"
    )
    _show(reference.cache, console)


def not_cacheable(prepared: Prepared) -> str:
    """Say what of a recipe's reference no cache can hold; empty where it can hold all."""
    sync = prepared.recipe.reference.sync
    if prepared.loss.needs.sequential_kl:
        return (
            "the loss reads the reference's whole next-token distributions, which no cache holds: the run keeps the "
            "reference in memory"
        )
    if sync is not None:
        return (
            f"the reference moves every {sync.every} steps: its log-probs of the training data are computed in every "
            "step and not cached; those of held-out data are, by the initial reference"
        )
    return ""


def cache_info(recipe: Recipe, console: Console) -> None:
    """Show whose log-probs the cache holds and how many."""
    _show(open_cache(with_sandbox(recipe)), console)


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
