"""Which back ends a model can take on a device, in the order in which they are tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefopt.attention.plan import Backend
from prefopt.attention.varlen import DTYPES, LARGEST_HEAD, torch_flash, windows_supported


def backends(
    model: PreTrainedModel, dtype: torch.dtype, *, wanted: str = "auto"
) -> tuple[list[Backend], dict[str, str]]:
    """Return the back ends to try, fastest first, and why others are not among them.

    Args:
        model: on the device that it will run on.
        dtype: in which it multiplies.
        wanted: ``auto``, or the one back end to take.
    """
    device, config, sinks = model.device, model.config.get_text_config(), has_sinks(model)
    refused = {
        "varlen": _not_varlen(config, device, dtype, sinks=sinks),
        "flex": _not_flex(device),
        "products": _not_products(config, device, dtype, sinks=sinks),
    }
    reasons = {name: reason for name, reason in refused.items() if reason}
    order: list[Backend] = ["varlen", "flex", "products", "sdpa"]
    able = [name for name in order if name not in reasons]
    return (able if wanted == "auto" else [name for name in able if name == wanted]), reasons


def has_sinks(model: nn.Module) -> bool:
    """Whether some of a model's attention has sinks: a learned score per head that takes a share of every query."""
    return any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters())


def _not_varlen(config: Any, device: torch.device, dtype: torch.dtype, *, sinks: bool) -> str:
    if device.type != "cuda":
        return "it is made for accelerators"
    if dtype not in DTYPES:
        return f"it is made for 16 bit, and {str(dtype).removeprefix('torch.')} is asked for"
    try:
        torch_flash()
    except ImportError:
        return "this torch has no variable-length attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "torch's kernel has no soft-cap on the scores"
    if sinks:
        return "torch's kernel has no attention sinks"
    if getattr(config, "sliding_window", None) is not None and not windows_supported():
        return "this torch's kernel has no sliding window"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "" if size <= LARGEST_HEAD else f"heads of {size} numbers are more than {LARGEST_HEAD}"


def _not_flex(device: torch.device) -> str:
    return "" if device.type == "cuda" else "it has no gradient on a CPU"


def _not_products(config: Any, device: torch.device, dtype: torch.dtype, *, sinks: bool) -> str:
    if device.type != "cpu":
        return "it is made for CPUs"
    if dtype != torch.float32 and torch.cpu._is_amx_tile_supported():
        return f"torch's kernel has tiles of its own for {str(dtype).removeprefix('torch.')} on this CPU (AMX)"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no soft-cap on the scores"
    return "it has no attention sinks" if sinks else ""
