"""Adapters: a fresh LoRA, one that goes on from a folder or the hub, and the frozen ones that a reference acts with.

One model holds them side by side: `default` is trained, `reference` is a frozen copy of the adapter that training
goes on from, `moving` follows the trained one. Switching between them moves no weight.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prefopt.errors import ModelError, Problem
from prefopt.quantization import ready_for_peft

TRAINED, FROZEN, MOVING = "default", "reference", "moving"
"""Names of adapters inside one model."""

WEIGHTS = ("adapter_model.safetensors",)
"""Where peft puts the weights; its pickled form is not read."""


@dataclass(frozen=True)
class AdapterSource:
    """Where a pretrained adapter comes from."""

    path: str
    revision: str | None = None


def add_lora(model: Any, *, rank: int, alpha: float, dropout: float, targets: str | list[str]) -> nn.Module:
    """Put a fresh LoRA adapter on a frozen model; a quantized one is prepared as peft recommends.

    Raises:
        ModelError: a target names no module of the model.
    """
    ready_for_peft()
    from peft import LoraConfig, get_peft_model

    from prefopt.lora import fuse_adapters

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted: nn.Module = get_peft_model(prepared_base(model), config)
    except ValueError as error:
        raise ModelError(
            Problem("adapter.targets", "names of linear modules, or all-linear", str(targets),
                    str(error).splitlines()[0])
        ) from error  # fmt: skip
    fuse_adapters(adapted)
    return adapted


def prepared_base(model: Any) -> Any:
    """Freeze a quantized model and hold what is not quantized in 32 bit, as peft recommends; others stay."""
    if not getattr(model, "is_quantized", False):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def load_adapter(model: Any, source: AdapterSource, *, trainable: bool, dropout: float = 0.0) -> Any:
    """Put a pretrained adapter on a model.

    Args:
        model: the base; its quantization is its own.
        source: where the adapter comes from.
        trainable: whether it is trained; otherwise it is frozen.
        dropout: what replaces the dropout that the adapter was trained with.

    Raises:
        ModelError: it is no LoRA adapter, or belongs to another base.
    """
    ready_for_peft()
    from peft import PeftModel

    from prefopt.lora import fuse_adapters

    folder = adapter_folder(source)
    config = adapter_settings(folder)
    config.lora_dropout = dropout
    config.inference_mode = not trainable
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(
                prepared_base(model), str(folder), adapter_name=TRAINED, is_trainable=trainable, config=config
            )
    except (ValueError, RuntimeError, OSError, KeyError, SafetensorError, UserWarning) as error:
        raise ModelError(unfit(source, str(error).strip().splitlines()[0][:300])) from error
    fuse_adapters(adapted)
    return adapted


def keep_frozen(model: Any, name: str) -> None:
    """Put a frozen copy of the trained adapter, as it is now, beside it."""
    _add_beside(model, name, model.peft_config[TRAINED])
    with torch.no_grad():
        for mine, trained in pairs(model, name).values():
            mine.copy_(trained)
    _freeze_all_but_trained(model, name)


def keep_initial(model: Any, source: AdapterSource) -> None:
    """Put the pretrained adapter, frozen and as it stands in its folder, beside the trained one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    folder = adapter_folder(source)
    _add_beside(model, FROZEN, adapter_settings(folder))
    weights = load_peft_weights(str(folder), device=str(next(model.parameters()).device))
    set_peft_model_state_dict(model, weights, adapter_name=FROZEN)
    _freeze_all_but_trained(model, FROZEN)


def _add_beside(model: Any, name: str, settings: Any) -> None:
    """Add an adapter whose tensors will be overwritten.

    It starts as a plain one: PiSSA and OLoRA take their start out of the base's weights, a second time then.

    Raises:
        ModelError: peft keeps one adapter with trained biases, not two.
    """
    settings = copy.deepcopy(settings)
    settings.init_lora_weights = True
    if settings.bias != "none":
        raise ModelError(
            Problem("adapter.path", "an adapter without trained biases, for a second one stands beside it as the "
                    "reference", f"bias={settings.bias}", "set reference.model to the model that it is compared with")
        )  # fmt: skip
    with torch.random.fork_rng():
        model.add_adapter(name, settings)


def _freeze_all_but_trained(model: Any, name: str) -> None:
    model.set_adapter(TRAINED)
    for mine, _ in pairs(model, name).values():
        mine.requires_grad_(False)


def pairs(model: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors of an adapter and of the trained one, by the trained one's names."""
    parameters = dict(model.named_parameters())
    mark = f".{TRAINED}"
    return {
        key: (parameters[other], parameters[key])
        for key in parameters
        if (f"{mark}." in key or key.endswith(mark)) and (other := key.replace(mark, f".{name}")) in parameters
    }


@contextmanager
def acting_with(model: Any, name: str | None) -> Iterator[None]:
    """Let another adapter act in the place of the trained one; None lets the base act alone."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def forget(model: Any, name: str) -> None:
    """Remove an adapter from a model that has it."""
    if name in getattr(model, "peft_config", {}):
        model.delete_adapter(name)
        model.set_adapter(TRAINED)


def adapter_folder(source: AdapterSource) -> Path:
    """Return the folder with an adapter's two files; a hub adapter is fetched into the hub's own cache first.

    Raises:
        ModelError: there is none.
    """
    path = Path(source.path).expanduser()
    if not path.is_dir():
        path = _fetched(source)
    if not (path / "adapter_config.json").is_file() or not (path / WEIGHTS[0]).is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:6]) or "nothing"
        fix = "give the folder that PEFT saved; a whole model belongs into model.path"
        raise ModelError(Problem("adapter.path", f"a folder with adapter_config.json and {WEIGHTS[0]}",
                                 f"{path} holds {found}", fix))  # fmt: skip
    return path


def _fetched(source: AdapterSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["adapter_config.json", *WEIGHTS]
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            Problem("adapter.path", "a folder, or the name of an adapter on the hub", f"{source.path}: {reason}",
                    "check the path or name, the network and your access rights")
        ) from error  # fmt: skip


def adapter_settings(folder: Path) -> Any:
    """Read an adapter's settings; anything but LoRA is refused."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(Problem("adapter.path", "an adapter that peft can read", f"{folder}: {str(error)[:200]}",
                                 "save it again with save_pretrained")) from error  # fmt: skip
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(Problem("adapter.path", "a LoRA adapter", f"{folder} is of type {config.peft_type}",
                                 "merge it into its base, and train a fresh adapter"))  # fmt: skip
    return config


def unfit(source: AdapterSource, given: str) -> Problem:
    """Return the problem of an adapter that does not belong to its base."""
    fix = "set model.path to the model that the adapter was trained on"
    return Problem("adapter.path", "an adapter of model.path", f"{source.path}: {given}", fix)
