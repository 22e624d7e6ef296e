"""Where metrics go: `metrics.jsonl` always, Weights & Biases and TensorBoard on request."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import Recipe
from prefopt.run_folder import write_lines

Sink = Callable[[int, Mapping[str, float]], None]


class Tracker:
    """Writes one line per log to every sink."""

    def __init__(self, folder: Path, recipe: Recipe, *, resumed_at: int, resolved: Mapping[str, Any]) -> None:
        """Open the sinks; lines after the step a run resumes at are dropped, for they are written again."""
        self.file = folder / "metrics.jsonl"
        _drop_after(self.file, resumed_at)
        self._stream = self.file.open("a", encoding="utf-8")
        self._sinks: list[Sink] = []
        self._closers: list[Callable[[], None]] = [self._stream.close]
        if recipe.tracking.wandb != "off":
            self._add_wandb(folder, recipe, resolved)
        if recipe.tracking.tensorboard:
            self._add_tensorboard(folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()
        for sink in self._sinks:
            sink(step, metrics)

    def close(self) -> None:
        """Flush and close every sink."""
        for close in self._closers:
            close()

    def _add_wandb(self, folder: Path, recipe: Recipe, resolved: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RecipeError(
                Problem(
                    "tracking.wandb",
                    "wandb to be installed",
                    "it is not",
                    "pip install wandb, or tracking.wandb=off",
                )
            ) from error
        run = wandb.init(
            project=recipe.tracking.project,
            name=folder.name,
            dir=str(folder),
            mode=recipe.tracking.wandb,
            config={**recipe.to_mapping(), "resolved": dict(resolved)},
        )
        self._sinks.append(lambda step, metrics: run.log(dict(metrics), step=step))
        self._closers.append(run.finish)

    def _add_tensorboard(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError(
                Problem("tracking.tensorboard", "tensorboard to be installed", "it is not",
                        "pip install tensorboard, or tracking.tensorboard=false")
            ) from error  # fmt: skip
        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self._sinks.append(write)
        self._closers.append(writer.close)


def read_metrics(file: Path, *, last: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a line that a kill cut short, or that is no log, is left out.

    Args:
        file: may be absent.
        last: bytes to read, from the end; all where absent.
    """
    lines: list[dict[str, Any]] = []
    if not file.exists():
        return lines
    with file.open("rb") as stream:
        stream.seek(0 if last is None else max(0, stream.seek(0, os.SEEK_END) - last))
        content = stream.read().decode("utf-8", errors="replace")
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            lines.append(row)
    return lines


def _drop_after(file: Path, step: int) -> None:
    if not file.exists():
        return
    kept = [line for line in read_metrics(file) if line["step"] <= step] if step >= 0 else []
    write_lines(file, kept)
