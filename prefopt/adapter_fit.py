"""Whether a pretrained adapter belongs to the base that a recipe names; said before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from prefopt.adapters import WEIGHTS, AdapterSource, adapter_folder, adapter_settings, unfit
from prefopt.errors import ModelError, Problem
from prefopt.models import ModelSource, load_config
from prefopt.quantization import ready_for_peft, skeleton

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 2**16
"""What is compared of two weight files of one size: 4 MiB each."""

Size = tuple[int | None, int | None]
"""Inputs and outputs of a linear module, as far as the adapter says them."""


def refuse_another_base(source: AdapterSource, base: ModelSource) -> None:
    """Compare an adapter with its base: the modules' names and sizes, and the model that it says it was made for.

    Raises:
        ModelError: the base lacks its modules, has them in other sizes, or holds other weights.
    """
    ready_for_peft()
    folder = adapter_folder(source)
    adapter_settings(folder)
    made_for = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    names = f"it says it was made for {made_for}; the base is {base.path}"
    sizes = _sizes(source, folder / WEIGHTS[0])
    wrong = list(_misfits(sizes, dict(skeleton(load_config(base)).named_modules())))
    if wrong or not sizes:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(unfit(source, f"{'; '.join(wrong[:3]) or 'it adapts nothing'}{more}; {names}"))
    if _other_weights(str(made_for or ""), base):
        raise ModelError(
            Problem("adapter.path", "an adapter of model.path", f"{source.path}: {names}, with other weights",
                    "set model.path to its base; where these are the same weights, correct its adapter_config.json")
        )  # fmt: skip


def _other_weights(made_for: str, base: ModelSource) -> bool:
    """Whether two folders hold other weights, or two hub names differ; of one folder and one name nothing is known."""
    theirs, ours = Path(made_for).expanduser(), Path(base.path).expanduser()
    if made_for and theirs.is_dir() and ours.is_dir():
        return _files_differ(theirs, ours)
    hub = all(name.count("/") == 1 and name[0] not in "/.~" for name in (made_for, base.path))
    return hub and not theirs.exists() and not ours.exists() and made_for.lower() != base.path.lower()


def _files_differ(theirs: Path, ours: Path) -> bool:
    """Whether weight files of equal names and sizes differ in a sample of bytes; of other layouts nothing is known."""
    pairs = [(file, ours / file.name) for file in sorted(theirs.glob("model*.safetensors"))]
    if not pairs or any(not b.is_file() or a.stat().st_size != b.stat().st_size for a, b in pairs):
        return False
    return any(_sample(a) != _sample(b) for a, b in pairs if not a.samefile(b))


def _sample(file: Path) -> list[bytes]:
    """Blocks spread evenly over a file: two trainings of one architecture differ in some of them."""
    size, blocks = file.stat().st_size, []
    with file.open("rb") as stream:
        for number in range(SAMPLED_BLOCKS):
            stream.seek(number * size // SAMPLED_BLOCKS)
            blocks.append(stream.read(BLOCK_BYTES))
    return blocks


def _sizes(source: AdapterSource, file: Path) -> dict[str, Size]:
    """Sizes of the linear modules that an adapter adapts, by their names in the base; only the header is read."""
    sizes: dict[str, Size] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys() if ".lora_" in key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(unfit(source, f"{file.name} does not read back: {error}")) from error
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        inputs, outputs = sizes.get(name, (None, None))
        sizes[name] = (shape[1] if part == "A.weight" else inputs, shape[0] if part == "B.weight" else outputs)
    return sizes


def _misfits(sizes: Mapping[str, Size], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for name, (inputs, outputs) in sizes.items():
        module = modules.get(name)
        if module is None:
            yield f"it adapts {name}, which the base does not have"
            continue
        there = _linear_size(module)
        if there is not None and ((inputs or there[0]), (outputs or there[1])) != there:
            yield f"{name} is {there[0]} to {there[1]} in the base, {inputs} to {outputs} in the adapter"


def _linear_size(module: Any) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None
