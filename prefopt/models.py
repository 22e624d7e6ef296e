"""Policy, reference and tokenizer: loading, quantizing, adapting.

A language model is loaded from a folder or the hub in the precision its use asks for. Trainable weights are fp32
masters unless the recipe says otherwise; frozen quantized weights go through bitsandbytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prefopt.adapters import AdapterSource, load_adapter
from prefopt.errors import ModelError, Problem
from prefopt.quantization import expand_on_cpu, import_bitsandbytes, quantization_settings, skipped_layers
from prefopt.recipe.quantization import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from and how they are held."""

    path: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    quantization: Quantization = "none"
    """A word, or a mapping with the details."""
    compute: torch.dtype = torch.float32
    """The dtype that quantized weights are expanded to."""
    key: str = "model"
    """The recipe key, for messages."""
    adapter: AdapterSource | None = None
    """An adapter that is put on the weights, frozen."""


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and advice off the screen while it loads or saves."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)


def check_source(source: ModelSource) -> None:
    """Raise ModelError with a way out when a local folder cannot hold a model."""
    path = Path(source.path).expanduser()
    looks_local = source.path.startswith(("/", "./", "../", "~")) or path.exists()
    if not looks_local:
        return
    if not path.is_dir():
        raise ModelError(Problem(source.key, "a model folder or a hub name", source.path,
                                 "check the path; a folder must hold config.json"))  # fmt: skip
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        fix = "merge it first: adapter.merge=true writes model-merged, prefopt export RUN does so afterwards"
        raise ModelError(Problem(source.key, "a whole model", f"{path} is an adapter", fix))
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:6]) or "nothing"
        raise ModelError(Problem(source.key, "a folder with config.json and weights", f"{path} holds {found}",
                                 "give the folder that from_pretrained would load"))  # fmt: skip


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    path = Path(source.path).expanduser()
    if not path.is_dir():
        check_source(source)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if path.is_dir() and not any((path / name).exists() for name in files):
        raise ModelError(
            Problem(source.key, "a model folder with its tokenizer", f"{path} has no tokenizer files",
                    f"save it there: tokenizer.save_pretrained({str(path)!r})")
        )  # fmt: skip
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(_name(source), revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_load_problem(source, "tokenizer", error)) from error


def load_config(source: ModelSource) -> Any:
    """Load a model's configuration.

    Raises:
        ModelError: there is none, or transformers does not know it.
    """
    check_source(source)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(_name(source), revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_load_problem(source, "configuration", error)) from error


def load_model(source: ModelSource, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model onto the device, in eval mode, with the source's adapter where it has one.

    Raises:
        ModelError: it cannot be loaded as a causal language model, or the adapter does not belong to it.
    """
    device = device or default_device()
    config = load_config(source)
    settings = quantization_settings(source.quantization, source.compute)
    arguments: dict[str, Any] = {"dtype": source.dtype, "revision": source.revision}
    if settings:
        arguments |= _quantized_loading(source, config, settings, device)
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                _name(source), config=config, output_loading_info=True, **arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(_load_problem(source, "causal language model", error)) from error
    _refuse_made_up_weights(source, loading)
    if settings:
        expand_on_cpu(model)
    model = model if settings else model.to(device)
    return (model if source.adapter is None else load_adapter(model, source.adapter, trainable=False)).eval()


def _quantized_loading(
    source: ModelSource, config: Any, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize on the way; skipped modules by their full names."""
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    skip = settings["llm_int8_skip_modules"]
    left = skipped_layers(config, skip, where=f"{source.key.split('.')[0]}.quantization.skip")
    return {
        "quantization_config": BitsAndBytesConfig(**{**settings, "llm_int8_skip_modules": left}),
        "device_map": {"": device},
        "dtype": source.compute,
    }


def _refuse_made_up_weights(source: ModelSource, loading: dict[str, Any]) -> None:
    """Raise ModelError where transformers filled weights with random numbers because the files lack them."""
    missing = sorted(map(str, loading.get("missing_keys", ())))
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading.get("mismatched_keys", ()))
    problems = [
        Problem(source.key, "every weight of the model in its files",
                f"{source.path} {what} {len(names)}: {_some(names)}",
                "save the whole model again; random numbers in their place would be trained on")
        for what, names in (("lacks", missing), ("has in other shapes", mismatched))
        if names
    ]  # fmt: skip
    if problems:
        raise ModelError(problems)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _name(source: ModelSource) -> str:
    path = Path(source.path).expanduser()
    return str(path) if path.is_dir() else source.path


def _load_problem(source: ModelSource, what: str, error: Exception) -> Problem:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Problem(
        source.key,
        f"a {what} that transformers can load",
        f"{source.path}: {first_line[:300]}",
        "check the name, the revision and, for a hub model, the network and your access rights",
    )


def mend_generation_settings(model: PreTrainedModel) -> None:
    """Make a generation_config that transformers would refuse to save one that it saves.

    Some published models set sampling options without `do_sample`; they load, and `save_pretrained` raises.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError):
        settings.do_sample = True


_RANDOM = re.compile("drop|^(input_)?jitter_noise$")
"""Names of what models do at random while they train: dropout of all kinds, dropped layers, jitter before experts."""


_SWITCHED_OFF: WeakKeyDictionary[nn.Module, list[tuple[Any, str, float]]] = WeakKeyDictionary()
"""Per model: what its configuration said before."""


def switch_off_dropout(model: nn.Module) -> int:
    """Set every probability of dropping something to zero, in modules and in configs; returns how many were above it.

    A shared prompt would share its dropout mask between completions, and the reference has none. Models keep these
    probabilities in modules of torch, in attributes of their own and in their configs, under many names.
    """
    switched: list[tuple[Any, str, float]] = []
    owners: list[Any] = [*model.modules()]
    owners += {id(one): one for part in owners if (one := getattr(part, "config", None)) is not None}.values()
    count = 0
    for owner in owners:
        for name, value in list(vars(owner).items()):
            named = _RANDOM.search(name) or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
            if named and isinstance(value, float) and value > 0:
                setattr(owner, name, 0.0)
                count += 1
                if not isinstance(owner, nn.Module):
                    switched.append((owner, name, value))
    _SWITCHED_OFF[model] = [*_SWITCHED_OFF.get(model, []), *switched]
    return count


@contextmanager
def own_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model's own probabilities back into its configuration, which is saved with it."""
    switched = _SWITCHED_OFF.get(model, [])
    for config, name, value in switched:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in switched:
            setattr(config, name, 0.0)
