"""Keys that are right alone and impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from prefopt.errors import Problem

if TYPE_CHECKING:
    from prefopt.recipe.schema import Recipe


@dataclass(frozen=True)
class Conflict:
    """A problem, and the keys that make it; void where one of these is already wrong for itself."""

    keys: tuple[str, ...]
    problem: Problem


def refuse_conflicts(recipe: Recipe) -> None:
    """Raise a PydanticCustomError that carries every conflict of the recipe in its context."""
    conflicts = [
        *_length_of_run(recipe),
        *_quantization(recipe),
        *_placeholders(recipe),
        *_best_checkpoint(recipe),
        *_revision_of_nothing(recipe),
    ]
    if conflicts:
        raise PydanticCustomError("conflicts", "keys that exclude each other", {"conflicts": conflicts})


def _length_of_run(recipe: Recipe) -> Iterator[Conflict]:
    epochs, max_steps = recipe.train.epochs, recipe.train.max_steps
    keys = ("train.epochs", "train.max_steps")
    if epochs is not None and max_steps is not None:
        given = f"epochs {epochs:g} and max_steps {max_steps}"
        fix = "set one of them to null: train.max_steps=null or train.epochs=null"
        yield Conflict(keys, Problem("train.epochs", "either epochs or max_steps", given, fix))
    if epochs is None and max_steps is None:
        fix = "set train.epochs or train.max_steps"
        yield Conflict(keys, Problem("train.epochs", "either epochs or max_steps", "neither", fix))


def _quantization(recipe: Recipe) -> Iterator[Conflict]:
    policy, reference = recipe.model.quantization, recipe.reference.quantization
    if policy == "none":
        return
    if recipe.adapter is None:
        problem = Problem(
            "model.quantization",
            "none, or an adapter: quantized weights cannot be trained",
            f"{policy} without an adapter",
            "add adapter.rank=16 for QLoRA, or quantize only the reference: reference.quantization",
        )
        yield Conflict(("model.quantization", "adapter"), problem)
    if reference != policy and _reference_is_initial_policy(recipe):
        problem = Problem(
            "reference.quantization",
            f"{policy}, as model.quantization: the reference is the policy's own start, "
            "and another quantization would make the first margins wrong",
            reference,
            f"set reference.quantization={policy}",
        )
        yield Conflict(("model.quantization", "reference.quantization", "reference.model"), problem)


def _reference_is_initial_policy(recipe: Recipe) -> bool:
    policy, reference = recipe.model, recipe.reference
    return reference.model is None or (reference.model, reference.revision) == (policy.path, policy.revision)


def _placeholders(recipe: Recipe) -> Iterator[Conflict]:
    rest = recipe.output.replace("{recipe}", "")
    if "{" in rest or "}" in rest:
        problem = Problem("output", "a folder; {recipe} is the only placeholder", recipe.output)
        yield Conflict(("output",), problem)


def _best_checkpoint(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.checkpoint.best is not None and not recipe.eval.every:
        problem = Problem(
            "checkpoint.best",
            "a metric that is measured during the run",
            f"{recipe.checkpoint.best}, measured only at the end (eval.every is {recipe.eval.every})",
            "set eval.every, or checkpoint.best=null",
        )
        yield Conflict(("checkpoint.best", "eval.every"), problem)


def _revision_of_nothing(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.reference.revision is not None and recipe.reference.model is None:
        problem = Problem(
            "reference.revision",
            "a revision only of a model that is named",
            recipe.reference.revision,
            "set reference.model, or remove reference.revision",
        )
        yield Conflict(("reference.revision", "reference.model"), problem)
