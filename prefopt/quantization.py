"""How frozen weights are quantized with bitsandbytes, and which layers are left as they are.

int8        8 bit per weight, one scale per row; threshold 0, so that a row is its own function
nf4, fp4    4 bit per weight in blocks of 64, a 32-bit scale per block: half a bit per weight; double quantization
keeps the scales in 8 bit, 0.13 bit per weight
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from prefopt.errors import ModelError, Problem
from prefopt.recipe.quantization import Quantization, quantization_details

# LLM.int8 keeps columns whose activation exceeds its threshold in 16 bit, and it looks for them over the whole
# batch: with the usual 6.0 a row's result depends on its neighbours, which no cache may allow. 0 turns that off.
INT8_THRESHOLD = 0.0

HEAD = "lm_head"
"""In `skip`, the output layer, whatever the architecture calls it."""


def quantization_settings(quantization: Quantization, compute: torch.dtype) -> dict[str, Any]:
    """Every setting that decides what the quantized weights are: bitsandbytes' arguments, and part of a cache key.

    Args:
        quantization: as in the recipe, a word or a mapping.
        compute: the dtype that the weights are expanded to.
    """
    details = quantization_details(quantization)
    left = {"llm_int8_skip_modules": list(details.skip)}
    if details.type == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": INT8_THRESHOLD, **left}
    if details.type in ("nf4", "fp4"):
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": details.type,
            "bnb_4bit_use_double_quant": details.double,
            "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
            **left,
        }
    return {}


def skeleton(config: Any) -> nn.Module:
    """Return a causal language model without weights, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def skipped_layers(config: Any, skip: Sequence[str], *, where: str) -> list[str]:
    """Full names of the linear layers that stay as they are.

    Args:
        config: the model's configuration; its modules are read off a skeleton without weights.
        skip: module names, each in full (``model.layers.0``) or from a dot on (``down_proj``, ``layers.0.mlp``); all
            linear layers in such a module are left out. ``lm_head`` is the output layer under any name.
        where: the recipe key, for messages.

    Raises:
        ModelError: a name fits no module with a linear layer, or the head is tied to the embedding and not skipped.
    """
    model = skeleton(config)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    head = _head_name(model)
    modules = {name for name, _ in model.named_modules() if name}
    problems, left = [], set()
    for name in skip:
        wanted = {one for one in modules if one == name or one.endswith(f".{name}")} or ({head} if name == HEAD else {})
        found = {layer for layer in linear if any(layer == one or layer.startswith(f"{one}.") for one in wanted)}
        if not found and name != HEAD:
            problems.append(_unknown_module(name, modules, linear, where))
        left |= found
    if head in linear and head not in left and getattr(config.get_text_config(), "tie_word_embeddings", False):
        problems.append(
            Problem(where, f"{HEAD} among them: this model's head shares its weights with the embedding, which stays",
                    f"[{', '.join(skip)}]", f"add {HEAD}")
        )  # fmt: skip
    if problems:
        raise ModelError(problems)
    return sorted(left)


def _head_name(model: nn.Module) -> str:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), HEAD)


def _unknown_module(name: str, modules: set[str], linear: Sequence[str], where: str) -> Problem:
    """Say which names are near one that no module with a linear layer has."""
    ends = {layer.rsplit(".", 1)[-1] for layer in linear}
    near = get_close_matches(name, sorted(ends | modules), n=3, cutoff=0.5)
    fix = f"did you mean {', '.join(near)}?" if near else "give a name in full, or its end from a dot on"
    return Problem(where, f"modules with linear layers: {', '.join(sorted(ends))}, or names in full", name, fix)


def expand_on_cpu(model: nn.Module) -> None:
    """Have quantized layers expand their weights on a CPU, in training and in evaluation.

    bitsandbytes has other products there. For 4 bit with AVX512_BF16 one that packs the weights at the first pass in
    eval mode and is taken in training too from then on, but has no gradient: torch warns, and whatever lies below a
    layer gets a wrong one. It also answers in bf16 whatever the compute dtype is, and fails where a matrix does not
    fit its blocks. For int8 one that rounds activations too, in eval mode alone: a policy would be compared with a
    reference that multiplies differently, 0.1 nats apart in a tiny model.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        elif _is_int8(module) and module.weight.device.type == "cpu":
            kind: Any = type(module)
            module.__class__ = _expanding(kind)


def _is_int8(module: nn.Module) -> bool:
    return hasattr(getattr(module, "state", None), "has_fp16_weights")


@cache
def _expanding(kind: Any) -> Any:
    """Return a kind of int8 layer that multiplies in evaluation as in training."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        training, self.training = self.training, True
        try:
            result: torch.Tensor = kind.forward(self, x)
            return result
        finally:
            self.training = training

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def import_bitsandbytes() -> None:
    """Import bitsandbytes without its optional CPU kernel, which would be fetched from a hub at import."""
    if "bitsandbytes" in sys.modules:
        return
    hidden = object() if torch.cuda.is_available() else sys.modules.get("kernels")
    if not torch.cuda.is_available():
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # Said at every product of an int8 layer in fp32; the casting is what was asked for.
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        importlib.import_module("bitsandbytes")
    finally:
        if not torch.cuda.is_available():
            del sys.modules["kernels"]
            if hidden is not None:
                sys.modules["kernels"] = hidden  # type: ignore[assignment]


def ready_for_peft() -> None:
    """Import bitsandbytes before peft does, which would look for the hub kernel; mute what transformers deprecates."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
