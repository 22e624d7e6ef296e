"""Keys that are right alone and impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from prefopt.errors import Problem
from prefopt.recipe.quantization import quantization_details

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
        *_endless_warmup(recipe),
        *_quantization(recipe),
        *_shape_of_a_pretrained_adapter(recipe),
        *_moving_reference(recipe),
        *_placeholders(recipe),
        *_best_checkpoint(recipe),
        *_revision_of_nothing(recipe),
        *_weights_too_coarse_to_train(recipe),
        *_margin_error_of_nothing(recipe),
        *_shared_dropout(recipe),
        *_back_end_of_nothing(recipe),
        *_nothing_to_reward(recipe),
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


def _endless_warmup(recipe: Recipe) -> Iterator[Conflict]:
    warmup, steps = recipe.train.warmup, recipe.train.max_steps
    if steps is not None and warmup > steps:
        fix = "train.warmup=0.1 is a tenth of the run; with this one the peak learning rate is never reached"
        problem = Problem("train.warmup", f"at most the {steps} steps of the run", f"{warmup:g} steps", fix)
        yield Conflict(("train.warmup", "train.max_steps"), problem)


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
            f"{policy}, as model.quantization: the reference is the policy's own start",
            f"{reference}: the margins of the first step, which should be 0, would be {_first_margins(recipe)}",
            f"set reference.quantization={policy}; or leave the policy unquantized and quantize only the reference, "
            "whose error the run then measures and reference.max_margin_error bounds",
        )
        yield Conflict(("model.quantization", "reference.quantization", "reference.model"), problem)


def _first_margins(recipe: Recipe) -> str:
    """Say in words what differently quantized weights do to the margins before the first step."""
    policy = quantization_details(recipe.model.quantization)
    reference = quantization_details(recipe.reference.quantization)
    if policy.type != reference.type:
        coarser = next(word for word in ("fp4", "nf4", "int8") if word in (policy.type, reference.type))
        size = "tenths of a nat up to nats" if coarser in ("fp4", "nf4") else "hundredths up to tenths of a nat"
        finer = reference.type if coarser == policy.type else policy.type
        return f"the error of {coarser} against {finer}, {size} per pair"
    if policy.skip != reference.skip:
        either = ", ".join(sorted(set(policy.skip) ^ set(reference.skip)))
        return f"the quantization error of what only one of them skips ({either})"
    if policy.double != reference.double:
        return "the rounding of the scales by double quantization, a fiftieth of the error of 4 bit itself"
    return "the rounding of the coarser compute dtype"


OWN_SHAPE = ("rank", "alpha", "targets")
"""Keys that a pretrained adapter answers itself."""


def _shape_of_a_pretrained_adapter(recipe: Recipe) -> Iterator[Conflict]:
    adapter = recipe.adapter
    if adapter is None:
        return
    if adapter.path is None and adapter.revision is not None:
        fix = "set adapter.path, or remove adapter.revision"
        problem = Problem("adapter.revision", "a revision only of an adapter that is named", adapter.revision, fix)
        yield Conflict(("adapter.revision", "adapter.path"), problem)
    for key in OWN_SHAPE if adapter.path is not None else ():
        if key in adapter.model_fields_set:
            expected = f"nothing beside adapter.path: the adapter there has its own {key}"
            fix = f"remove it; adapter={{path: {adapter.path}}} replaces the whole section"
            problem = Problem(f"adapter.{key}", expected, str(getattr(adapter, key)), fix)
            yield Conflict((f"adapter.{key}", "adapter.path"), problem)


def _moving_reference(recipe: Recipe) -> Iterator[Conflict]:
    """A reference that follows the policy starts as the policy, in weights that can move, and is in no cache."""
    reference, sync = recipe.reference, recipe.reference.sync
    if sync is None:
        return
    if sync.mix > 1:
        fix = "reference.sync.mix=0.6; 1 replaces the reference by the policy"
        problem = Problem("reference.sync.mix", "a share above 0 and at most 1", f"{sync.mix:g}", fix)
        yield Conflict(("reference.sync.mix",), problem)
    if recipe.train.max_steps is not None and sync.every > recipe.train.max_steps:
        expected = f"at most the {recipe.train.max_steps} steps of the run: the reference would never move"
        fix = "lower reference.sync.every, or remove reference.sync"
        problem = Problem("reference.sync.every", expected, f"{sync.every} steps", fix)
        yield Conflict(("reference.sync.every", "train.max_steps"), problem)
    if reference.cache not in ("auto", "off"):
        expected = f"auto or off: the reference moves every {sync.every} steps, so no cache can hold its log-probs"
        fix = (
            "remove reference.cache (auto keeps what the evaluation reads of the initial reference), or reference.sync"
        )
        problem = Problem("reference.cache", expected, reference.cache, fix)
        yield Conflict(("reference.cache", "reference.sync"), problem)
    if not _reference_is_initial_policy(recipe):
        expected = "nothing, or the policy's own model: a reference that mixes in the policy starts as the policy"
        fix = "remove reference.model, or reference.sync"
        yield Conflict(("reference.model", "reference.sync"),
                       Problem("reference.model", expected, str(reference.model), fix))  # fmt: skip
    elif reference.quantization != recipe.model.quantization:
        yield Conflict(("reference.quantization", "model.quantization", "adapter", "reference.sync"),
                       _immovable_weights(recipe))  # fmt: skip


def _immovable_weights(recipe: Recipe) -> Problem:
    policy, reference = recipe.model.quantization, recipe.reference.quantization
    if recipe.adapter is None:
        expected = "none: a sync writes into all weights of the reference, and 8-bit and 4-bit weights hold no mixture"
        fix = "remove reference.quantization; or train an adapter on a base that is quantized for both"
        return Problem("reference.quantization", expected, str(reference), fix)
    expected = f"{policy}, as model.quantization: the moving reference is the policy's base with a second adapter"
    return Problem("reference.quantization", expected, str(reference), f"set reference.quantization={policy}")


def _reference_is_initial_policy(recipe: Recipe) -> bool:
    policy, reference = recipe.model, recipe.reference
    return reference.model is None or (reference.model, reference.revision) == (policy.path, policy.revision)


def _placeholders(recipe: Recipe) -> Iterator[Conflict]:
    rest = recipe.output.replace("{recipe}", "")
    if "{" in rest or "}" in rest:
        problem = Problem("output", "a folder; {recipe} is the only placeholder", recipe.output)
        yield Conflict(("output",), problem)
    try:
        Path(recipe.output).expanduser()
    except RuntimeError:
        problem = Problem("output", "a folder", f"{recipe.output}: there is no such user", "write the path in full")
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


def _weights_too_coarse_to_train(recipe: Recipe) -> Iterator[Conflict]:
    """16-bit weights round small updates away: at a learning rate of 1e-6, 0.2 % of bf16 weights moved in six steps."""
    dtype, precision = recipe.model.dtype, recipe.train.precision
    wanted = {"fp32": "float32", "bf16": "float32", "bf16-pure": "bfloat16"}[precision]
    if recipe.adapter is None and dtype not in ("auto", wanted):
        problem = Problem(
            "model.dtype",
            f"auto or {wanted}: with train.precision={precision} all weights train in {wanted}",
            dtype,
            "use model.dtype=auto, or train.precision=bf16-pure for weights in 16 bit",
        )
        yield Conflict(("model.dtype", "train.precision", "adapter"), problem)


def _margin_error_of_nothing(recipe: Recipe) -> Iterator[Conflict]:
    reference = recipe.reference
    if reference.max_margin_error is None:
        return
    given = ""
    if reference.quantization == "none":
        given = "the reference is not quantized"
    elif _reference_is_initial_policy(recipe) and recipe.model.quantization == reference.quantization:
        given = "policy and reference are quantized alike, so there is no error between them"
    if given:
        expected = "a quantized reference of an unquantized policy: its error is what the limit is about"
        problem = Problem("reference.max_margin_error", expected, given, "remove reference.max_margin_error")
        yield Conflict(("reference.max_margin_error", "reference.quantization", "reference.model"), problem)


def _shared_dropout(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.drops and recipe.model.attention == "shared":
        problem = Problem(
            "model.attention",
            "auto or unshared: a shared prompt would share its dropout mask between completions",
            "shared, with dropout",
            "set model.attention=auto, or switch dropout off",
        )
        yield Conflict(("model.attention", "train.dropout", "adapter.dropout"), problem)


def _back_end_of_nothing(recipe: Recipe) -> Iterator[Conflict]:
    backend = recipe.model.attention_backend
    if backend != "auto" and (recipe.drops or recipe.model.attention == "unshared"):
        why, way_out = ("dropout", "switch dropout off") if recipe.drops else (
            "model.attention=unshared", "set model.attention=auto"
        )  # fmt: skip
        problem = Problem(
            "model.attention_backend",
            "auto where no prompt is shared, for the model's own attention runs then",
            f"{backend}, with {why}",
            f"remove model.attention_backend, or {way_out}",
        )
        yield Conflict(("model.attention_backend", "model.attention", "train.dropout", "adapter.dropout"), problem)


def _nothing_to_reward(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.eval.gold_reward is not None and recipe.eval.samples == 0:
        fix = "set eval.samples, or remove eval.gold_reward"
        problem = Problem("eval.gold_reward", "samples to judge", "eval.samples is 0", fix)
        yield Conflict(("eval.gold_reward", "eval.samples"), problem)
