"""Checkpoints of a run: written beside and renamed, so that one is whole or not there.

A checkpoint holds what moves: the trainable weights, the optimizer, the random state of torch, the step (from which
the data position follows) and what `auto` was resolved to. Frozen weights are those of the recipe's model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prefopt.errors import ModelError, Problem


@dataclass(frozen=True)
class TrainState:
    """What a run needs besides tensors to go on."""

    step: int = 0
    """Optimizer steps done."""
    comparisons: int = 0
    """Comparisons trained on."""
    tokens: int = 0
    """Tokens computed for them, the reference's not counted."""
    seconds: float = 0.0
    """Time in optimizer steps."""
    loss: float | None = None
    """Mean loss of the last log."""
    best: tuple[float, int] | None = None
    """Best value of `checkpoint.best` so far, and its step."""
    loss_state: dict[str, float] = field(default_factory=dict)
    """Numbers that the loss carries from step to step."""


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint_folders(run)]


def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    resolved: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint and remove those beyond the last `keep` (the best one stays).

    Raises:
        ModelError: the disk is full or refuses; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{state.step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    try:
        for left_behind in target.parent.glob(".step-*.partial"):  # by a kill
            shutil.rmtree(left_behind, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, partial / "trainable.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        torch.save(_random_state(), partial / "random.pt")
        content = {**asdict(state), "resolved": dict(resolved)}
        (partial / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(
            Problem(f"checkpoint {target}", "room to write a checkpoint", str(error).splitlines()[0],
                    "free space and run the same command again: it goes on from the last checkpoint")
        ) from error  # fmt: skip
    best_step = state.best[1] if state.best else None
    for old in checkpoint_folders(run)[:-keep]:
        if best_step is None or old.name != f"step-{best_step:08d}":
            shutil.rmtree(old)
    return target


def latest_state(run: Path) -> tuple[Path, TrainState, dict[str, Any]] | None:
    """Return the newest checkpoint with its state and what `auto` was resolved to, or None."""
    folders = checkpoint_folders(run)
    if not folders:
        return None
    try:
        content = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
        resolved = content.pop("resolved")
        best = content.pop("best")
        return folders[-1], TrainState(**content, best=tuple(best) if best else None), resolved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folders[-1], error) from error


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, random_state: bool = True
) -> None:
    """Put weights, optimizer and, in the process that saved it, the random state back.

    Raises:
        ModelError: the checkpoint's weights are not those of this model.
    """
    try:
        weights = load_file(folder / "trainable.safetensors")
        moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        random = torch.load(folder / "random.pt", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        raise _damaged(folder, error) from error
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise ModelError(
            Problem(str(folder), f"a checkpoint of this model ({len(own)} trainable tensors)",
                    f"{len(weights)} tensors, {len(own.keys() ^ weights.keys())} names differ",
                    "remove the run folder's checkpoints, or use another output")
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(moments)
    if random_state:
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and len(random["cuda"]):
            torch.cuda.set_rng_state(random["cuda"])


def load_value_head(folder: Path, scorer: nn.Module) -> None:
    """Put the weights of a learned value head back.

    Raises:
        ModelError: the checkpoint does not read back or has none.
    """
    try:
        weights = load_file(folder / "trainable.safetensors")
        head = {name: value for name, value in weights.items() if name.startswith("value_head.")}
        scorer.load_state_dict(head, strict=False)
        if not head:
            raise SafetensorError("it holds no value head")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        Problem(f"checkpoint {folder}", "a checkpoint that reads back", str(error).splitlines()[0][:200],
                f"remove {folder}: the same command then goes on from the checkpoint before it")
    )  # fmt: skip


def _random_state() -> dict[str, torch.Tensor]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
