"""On what terms runs are compared: where they differ in more than what is compared, said in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefopt.recipe import Recipe
from prefopt.run_folder import differing_keys

ORDER_ONLY = ("data.group_by_prompt",)
"""Keys of the data that change the order of rows, and no row."""


def unequal_terms(recipes: Sequence[Recipe]) -> list[str]:
    """Return where the runs of these recipes are not on equal terms, and what follows.

    Args:
        recipes: of every run that is compared.
    """
    differing = dict.fromkeys(key for recipe in recipes[1:] for key in differing_keys(recipes[0], recipe))
    return [*_budget(recipes), *_origins(list(differing)), *_learning_rates(recipes), *_seeds(recipes)]


def equally_long(recipes: Sequence[Recipe]) -> bool:
    """Whether runs see as many comparisons, but for rounding to whole batches, or make as many passes."""
    train = [recipe.train for recipe in recipes]
    counted = [one.max_steps * one.batch_size for one in train if one.max_steps is not None]
    passes = {one.epochs for one in train if one.max_steps is None}
    if counted and passes:
        return False
    return len(passes) == 1 if passes else max(counted) - min(counted) < max(one.batch_size for one in train)


def _budget(recipes: Sequence[Recipe]) -> Iterator[str]:
    if equally_long(recipes):
        return
    train = [recipe.train for recipe in recipes]
    counted = [one.max_steps * one.batch_size for one in train if one.max_steps is not None]
    passes = sorted({one.epochs for one in train if one.max_steps is None and one.epochs is not None})
    said = [f"{min(counted):,} to {max(counted):,} comparisons"] if counted else []
    said += [f"{', '.join(f'{each:g}' for each in passes)} epochs"] if passes else []
    yield f"runs see {' and '.join(said)}: they are not on an equal budget"


def _origins(differing: Sequence[str]) -> Iterator[str]:
    if rows := [key for key in differing if key.startswith("data.") and not key.startswith(ORDER_ONLY)]:
        yield f"runs differ in their data ({', '.join(rows)})"
    if "model.path" in differing:
        yield "runs differ in their base model: a report compares them only where they have the same tokenizer"
    if models := [key for key in differing if key.split(".")[0] in ("model", "adapter", "reference")]:
        yield f"runs differ in {', '.join(models)}: their KL and drift are from different starting points"


def _learning_rates(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Yield a note where one loss had more learning rates to choose from than another."""
    tried: dict[str, set[float]] = {}
    for recipe in recipes:
        tried.setdefault(recipe.build_loss().name, set()).add(recipe.train.learning_rate)
    counts = {name: len(rates) for name, rates in tried.items()}
    if len(tried) < 2:
        return
    every = set().union(*tried.values())
    if len(every) == 1:
        yield (
            f"one learning rate, {min(every):g}, for all: gradients of losses differ in scale, and the one that it "
            "suits best has an advantage"
        )
    elif len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
        yield (
            f"{few} was tried at {_many(counts[few], 'learning rate')} and {many} at {counts[many]}: the one with more "
            "to choose from has an advantage"
        )


def _seeds(recipes: Sequence[Recipe]) -> Iterator[str]:
    if len({recipe.seed for recipe in recipes}) == 1:
        yield "one seed: what another seed would change stays unknown (sweep.seed=[0, 1, 2])"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
