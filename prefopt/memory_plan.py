"""How many tokens a micro-batch holds and whether activations are recomputed, from the memory that is free.

    free memory * share  =  gradients + optimizer + 16-bit casts + head   +   tokens * activations per token

The weights are loaded when this is asked, so free memory is what they left. `train.token_budget: auto` is the most
tokens that fit, up to what fills the device; `train.gradient_checkpointing: auto` recomputes only where a sensible
micro-batch would not fit otherwise, for it costs a third of a full step's time and half of an adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.activations import activation_bytes, decoder_layers, shape_of
from prefopt.attention import Backend
from prefopt.attention.products import kept_probabilities
from prefopt.errors import Problem, RecipeError
from prefopt.kept_gradients import kept_layers
from prefopt.memory import KEPT_BLOCK
from prefopt.models import ModelSource, load_config
from prefopt.passes import WASTE
from prefopt.planning import StepPlanner, longest_unit
from prefopt.quantization import skeleton
from prefopt.recipe import Recipe
from prefopt.recipe.quantization import quantization_details
from prefopt_losses.head import CPU_TILE_BYTES, DEVICE_TILE_BYTES

MOST = {"cpu": 8192, "cuda": 65536}
"""Tokens beyond which a larger micro-batch is no faster: matrix products are at full speed long before."""
EXTRA = 0.03
"""Of a CPU's time that cutting a step into micro-batches may cost; they need less memory."""
SECONDS_PER_LAYER = 1e-3
"""What a CPU is taken to spend on the calls of one layer, forward and back: assumed, not measured."""
SECONDS_PER_SUMMED_BYTE = {"there": 2e-10, "anew": 1e-9}
"""What it spends on adding a gradient in memory that is there (assumed; too little to be seen in a step), and in a
block that the system gives anew: three further micro-batches of a 29 M model (116 MB) took 0.4 s on a Xeon while all
of it was anew."""
OPERATIONS_PER_SECOND = {"fp32": 150e9, "bf16": 450e9, "bf16-pure": 450e9}
"""Matrix products of two cores, as planned with: measured were 80 to 330 in fp32 and 410 to 865 in bf16 (1e9)."""
ENOUGH = {"cpu": 512, "cuda": 4096}
"""Tokens below which a device idles between kernels: activations are recomputed before a budget falls under it."""
SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of free memory that is planned with: the rest is for fragments, and on a CPU for everybody else."""
GRAIN = 256
"""Budgets are whole multiples, so that a few bytes more or less of free memory seldom change what a run computes."""
LOOK_AT = 8
"""Optimizer steps that are planned to see how many tokens one has."""
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.6, "fp4": 0.6}
_GIB = 2**30


@dataclass(frozen=True)
class Demand:
    """What training will allocate beside the weights, in bytes."""

    gradients: int
    optimizer: int
    casts: int
    """16-bit copies of weights that autocast keeps until the end of the backward pass."""
    head: int
    """Tiles of logits, and the head's gradient while it is summed in fp32."""
    second_model: int
    """Weights of a reference that is computed beside the policy."""
    per_token: float
    """Activations of a computed token."""
    per_token_recomputed: float
    """The same where layers are recomputed in the backward pass."""
    useful: int
    """Tokens beyond which a micro-batch is no faster, or hardly."""

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.gradients + self.optimizer + self.casts + self.head + self.second_model


@dataclass(frozen=True)
class Rows:
    """What the data ask of a micro-batch, in computed tokens."""

    longest: int
    """Of the longest comparison or list, which is never cut."""
    step: int
    """Of a whole optimizer step, by the largest of the first ones."""
    context: float = 0.0
    """Tokens of a token's row, on average."""
    probabilities: float = 0.0
    """Of a head, that stay per token where `prefopt.attention.products` computes the attention."""
    unshared: float = 1.0
    """How many times as many tokens rows per completion have, on average and with as much padding as there may be."""


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided, and why."""

    token_budget: int
    gradient_checkpointing: bool
    reason: str
    """One sentence with the figures behind both."""
    fits: bool
    """Whether the arithmetic says that training fits at all."""


def rows_of(planner: StepPlanner, total: int) -> Rows:
    """Look at the data as a planner cuts them, whose token budget must be out of reach."""
    dataset = planner.dataset
    steps = [planner.step(number) for number in range(min(total, LOOK_AT))]
    first = [part.group for micro in steps[0].micro_batches for part in micro]
    trees = [(int(dataset.prompt_lengths[group]), list(map(int, dataset.completion_lengths(group)))) for group in first]
    lengths = torch.tensor([prompt + own for prompt, completions in trees for own in completions], dtype=torch.float64)
    return Rows(
        longest=longest_unit(dataset, rejected=planner.rejected, gold=planner.gold, unit=planner.unit),
        step=max(step.computed_tokens for step in steps),
        context=float((lengths**2).sum() / lengths.sum()),
        probabilities=probabilities_kept(trees),
        unshared=max(1.0, WASTE * float(lengths.sum()) / max(sum(prompt + sum(own) for prompt, own in trees), 1)),
    )


def probabilities_kept(trees: Sequence[tuple[int, list[int]]]) -> float:
    """Probabilities that products keep per token of these prompts with their completions, given by their lengths."""
    kept = tokens = 0
    for prompt, (own, *others) in trees:
        kept += kept_probabilities(0, prompt + own) + sum(kept_probabilities(prompt, other) for other in others)
        tokens += prompt + own + sum(others)
    return kept / max(tokens, 1)


def demand_of(
    recipe: Recipe,
    model: nn.Module,
    base: nn.Module,
    rows: Rows,
    *,
    device: str,
    shared: bool = True,
    backend: Backend = "sdpa",
    processes: int = 1,
    second_model: int = 0,
    kept: bool = False,
) -> Demand:
    """Count what training a model allocates.

    Args:
        recipe: its precision and optimizer.
        model: the policy with its adapter.
        base: the transformers model in it.
        rows: what the data ask.
        device: the type of the device.
        shared: whether prompts are shared; one row per completion has more tokens than are planned.
        backend: what computes the attention of shared prompts.
        processes: more than one hold their gradients twice, once in the buckets that are exchanged.
        second_model: bytes of a reference's weights that will be loaded beside it.
        kept: whether head and embedding keep their gradients.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    moments = {"adamw": 2 * gradients, "adamw_8bit": 2 * sum(p.numel() for p in trained)}
    # Paged moments move to the host where the device is full; on a CPU there is nowhere to move to.
    moments["paged_adamw_8bit"] = moments["adamw_8bit"] if device == "cpu" else 0
    precision, shape, times = recipe.train.precision, shape_of(base), 1.0 if shared else rows.unshared
    # Rows too long for products go to SDPA, which keeps other tensors: whichever is more.
    ways = {None, rows.probabilities} if backend == "products" else {None}
    held, again = (
        times
        * max(
            activation_bytes(shape, precision, recomputed=recomputed, context=rows.context, probabilities=way)
            for way in ways
        )
        for recomputed in (False, True)
    )
    return Demand(
        gradients=gradients * (2 if processes > 1 else 1),
        optimizer=moments[recipe.train.optimizer.name],
        casts=_casts(base) if precision == "bf16" else 0,
        head=_head(base, device, kept=kept),
        second_model=second_model,
        per_token=held,
        per_token_recomputed=again,
        useful=_useful_on_cpu(base, precision, kept=kept) if device == "cpu" else MOST["cuda"],
    )


def _useful_on_cpu(base: nn.Module, precision: str, *, kept: bool) -> int:
    """Tokens of a micro-batch at which what it costs beside them is `EXTRA` of what they cost.

    A step of four pairs of 512 tokens, a 29 M model, two cores, fp32: with LoRA 2.08 and 1.86 s and 1.24 GiB in four
    micro-batches, 2.05 and 1.81 s and 2.33 GiB in one. Trained whole, on another CPU: 2.96 s in four, 3.17 in one.
    """
    trained = [p for p in base.parameters() if p.requires_grad]
    stay, made = _ends(base, kept=kept)
    ends = {id(layer.weight) for layer in stay + made}
    sizes = [p.nbytes for p in trained if id(p) not in ends] + [layer.weight.nbytes for layer in made]
    there = sum(layer.weight.nbytes for layer in stay) + sum(size for size in sizes if size < KEPT_BLOCK)
    anew = sum(size for size in sizes if size >= KEPT_BLOCK)
    beside = SECONDS_PER_LAYER * len(decoder_layers(base))
    beside += there * SECONDS_PER_SUMMED_BYTE["there"] + anew * SECONDS_PER_SUMMED_BYTE["anew"]
    forwards = 3 if all(p.requires_grad for p in base.parameters()) else 2
    each = 2 * forwards * sum(p.numel() for p in base.parameters()) / OPERATIONS_PER_SECOND[precision]
    return min(MOST["cpu"], max(ENOUGH["cpu"], round(beside / (EXTRA * each))))


def _ends(base: nn.Module, *, kept: bool) -> tuple[list[Any], list[Any]]:
    """Head and embedding, as far as they train: those whose gradients stay, and those whose autograd makes.

    A tied weight counts once for each.
    """
    stay: list[Any] = list(kept_layers(base)) if kept else []
    both = [layer for layer in (base.get_output_embeddings(), base.get_input_embeddings()) if layer is not None]
    trained = [layer for layer in both if getattr(layer, "weight", None) is not None and layer.weight.requires_grad]
    return stay, [layer for layer in trained if all(layer is not other for other in stay)]


def weights_bytes(source: ModelSource) -> int:
    """Bytes of a model's weights as they will be held, by its configuration alone."""
    each = QUANTIZED_BYTES.get(quantization_details(source.quantization).type, source.dtype.itemsize)
    return int(each * sum(p.numel() for p in skeleton(load_config(source)).parameters()))


def _casts(base: nn.Module) -> int:
    """16-bit copies of the matrices in the decoder's layers and of the head; an embedding is looked up, not cast."""
    wide = [p for layer in decoder_layers(base) for p in layer.parameters()] + _head_weight(base)
    return sum(2 * p.numel() for p in wide if p.ndim > 1 and p.dtype == torch.float32)


def _head(base: nn.Module, device: str, *, kept: bool) -> int:
    """Three tiles (logits, their gradient, its cast), and what is made of the head's gradient before it is added."""
    tiles = 3 * (CPU_TILE_BYTES if device == "cpu" else DEVICE_TILE_BYTES)
    _, made = _ends(base, kept=kept)
    head = _head_weight(base)
    return tiles + sum(4 * weight.numel() for weight in head if any(layer.weight is weight for layer in made))


def _head_weight(base: nn.Module) -> list[torch.Tensor]:
    weight = getattr(base.get_output_embeddings(), "weight", None)
    return [] if weight is None else [weight]


def plan_memory(
    recipe: Recipe,
    demand: Demand,
    rows: Rows,
    *,
    free: int,
    device: str,
    processes: int = 1,
    recomputable: bool = True,
) -> MemoryPlan:
    """Decide the token budget and whether activations are recomputed.

    Args:
        recipe: what its `train.token_budget` and `train.gradient_checkpointing` fix stays.
        demand: what training will allocate.
        rows: what the data ask.
        free: bytes that are free now, with the policy's weights loaded.
        device: the type of the device.
        processes: that share an optimizer step.
        recomputable: whether the model's layers can be computed again in the backward pass.

    Raises:
        RecipeError: they cannot, and the recipe wants it.
    """
    if recipe.train.gradient_checkpointing is True and not recomputable:
        raise RecipeError(
            Problem("train.gradient_checkpointing", "auto or false: this model's layers cannot be recomputed", "true",
                    "train.gradient_checkpointing=auto, with a smaller train.token_budget for its memory")
        )  # fmt: skip
    wanted, asked = recipe.train.token_budget, recipe.train.gradient_checkpointing
    own = -(-rows.step // processes)  # a process has no more tokens in a step
    enough = max(rows.longest, min(own, ENOUGH.get(device, ENOUGH["cuda"]) if wanted == "auto" else wanted))
    room = SHARE.get(device, SHARE["cuda"]) * free - demand.fixed
    whole, again = (max(0, int(room // each)) for each in (demand.per_token, demand.per_token_recomputed))
    recomputed = whole < enough and recomputable if asked == "auto" else asked
    fitting = again if recomputed else whole
    if wanted == "auto":
        budget, why = _budget(fitting, rows, own, demand.useful, processes)
    else:
        budget, why = wanted, "as train.token_budget says"
    held = demand.per_token_recomputed if recomputed else demand.per_token
    reason = (
        f"{budget:,} tokens ({why}): {free / _GIB:.1f} GiB free, {demand.fixed / _GIB:.1f} GiB for gradients, "
        f"optimizer and head; {held / 2**10:,.0f} KiB of activations per token, "
        f"{_recomputed(asked, recomputed, whole) if recomputable else 'which this model cannot recompute'}"
    )
    return MemoryPlan(budget, recomputed, reason, fits=fitting >= max(rows.longest, min(budget, own)))


def _budget(fitting: int, rows: Rows, own: int, useful: int, processes: int) -> tuple[int, str]:
    """Return the most tokens that fit and are of use, and which of both decided.

    A step smaller than the budget of a single process lowers nothing: held-out data are cut by the same budget.
    """
    why = "what fills the device"
    if processes > 1 and own < useful:
        useful, why = own, "a process's part of a step"
    if fitting < useful:
        useful, why = fitting, "what fits"
    if useful < rows.longest:
        return rows.longest, "the longest comparison, which is never cut"
    whole = useful - useful % GRAIN
    return (whole, why) if whole >= rows.longest else (useful, why)


def _recomputed(asked: bool | str, recomputed: bool, whole: int) -> str:
    if asked != "auto":
        return f"{'' if recomputed else 'not '}recomputed, as train.gradient_checkpointing says"
    return f"recomputed, for only {whole:,} tokens would fit otherwise" if recomputed else "none recomputed"
