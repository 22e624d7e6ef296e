"""What makes the same computation faster where the machine can: compiled layers, and kernels from the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import AttentionInterface, PreTrainedModel

from prefopt.activations import decoder_layers
from prefopt.attention import NAME
from prefopt.errors import Problem, RecipeError
from prefopt.recipe import Recipe

RECOMPILE_LIMIT = 64
"""Versions of one function that dynamo keeps before it gives up on it (its default is 8). A layer has one for each of
training and evaluation, with and without gradient, per kind of layer, and until a row's length is a symbol."""


def refuse_what_cannot_run(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError with every wish for speed that this machine cannot meet; no model is needed to say so."""
    problems = []
    if recipe.train.compile and device.type == "cpu" and _compiler() is None:
        problems.append(
            Problem("train.compile", "a C++ compiler, which compiled layers need on a CPU",
                    "no g++, c++ or clang++ in PATH, and CXX names none", "install one (g++), or train.compile=false")
        )  # fmt: skip
    if recipe.model.kernels and device.type == "cpu":
        problems.append(
            Problem("model.kernels", "an accelerator: the hub's kernels are made for one", "this machine has none",
                    "model.kernels=false")
        )  # fmt: skip
    elif recipe.model.kernels and find_spec("kernels") is None:
        problems.append(
            Problem("model.kernels", "the package that fetches kernels from the hub", "kernels is not installed",
                    "pip install kernels, or model.kernels=false")
        )  # fmt: skip
    if problems:
        raise RecipeError(problems)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(
        (path for name in ([named] if named else ["g++", "c++", "clang++"]) if (path := shutil.which(name))), None
    )


def compile_layers(model: PreTrainedModel, *, recomputed: bool = False) -> None:
    """Compile every decoder layer in place, for rows of any length; names of weights stay as they are.

    Layers of one class share what is compiled. The attention function is left out: it walks the prompt trees of a
    batch in Python, so every batch would be another program. Where layers are recomputed in the backward pass, their
    parts are compiled instead (norms, attention's projections, MLP): nothing is compiled from outside torch's
    checkpoint into it.

    Raises:
        RecipeError: this machine cannot compile, or the model has no stack of layers.
    """
    import torch._dynamo.config as dynamo

    layers = decoder_layers(model)
    if not layers:
        raise RecipeError(Problem("train.compile", "a stack of decoder layers to compile", "none in this model",
                                  "train.compile=false"))  # fmt: skip
    _try_to_compile(next(model.parameters()).device)
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 16 * RECOMPILE_LIMIT)
    function = AttentionInterface()[NAME]
    if not getattr(function, "_torchdynamo_disable", False):
        AttentionInterface.register(NAME, torch.compiler.disable(function))
    for layer in layers:
        for module in layer.children() if recomputed else [layer]:
            module.compile(dynamic=True)


def _try_to_compile(device: torch.device) -> None:
    """Compile one small function: a compiler without Python's headers is found by nothing less."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(4, device=device))
    except Exception as error:
        said = next((line for line in str(error).splitlines() if "error:" in line), f"{type(error).__name__}: {error}")
        raise RecipeError(
            Problem("train.compile", "a machine that compiles", said.strip()[:300],
                    "install a C++ compiler and the headers of this Python (python3-dev), or train.compile=false")
        ) from error  # fmt: skip


@contextmanager
def saying_what_cannot_be_compiled() -> Iterator[None]:
    """Turn what the compiler raises in a pass into a RecipeError: some architectures are beyond it."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RecipeError(
            Problem("train.compile", "layers that this torch can compile", said[:300], "train.compile=false")
        ) from error


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Run compiled layers as they were written: writing text changes shapes and caches with every token."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def gave_up() -> str:
    """Say what dynamo stopped compiling in this process because its versions were too many; empty where nothing."""
    from torch._dynamo.utils import counters

    hits = sum(count for reasons in counters.values() for reason, count in reasons.items()
               if "recompile limit" in str(reason).lower())  # fmt: skip
    if not hits:
        return ""
    return (
        f"train.compile: {hits} times a function met its {RECOMPILE_LIMIT} compiled versions and ran uncompiled from "
        "then on; the numbers are right, the speed is not (TORCH_LOGS=recompiles says why)"
    )
