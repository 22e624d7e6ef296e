"""What a run left on disk, as one record; nothing of it is computed again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.errors import Problem, RecipeError, UserError
from prefopt.held_out import FILE as HELD_OUT
from prefopt.recipe import Recipe, load_recipe
from prefopt.report.strength import Strength, strength_of
from prefopt.run_folder import FREE_TO_CHANGE, INPUTS, RECIPE, RESULT, SAMPLES, flat_keys, read_json, read_json_lines
from prefopt.tracking import read_metrics
from prefopt_losses import Loss

SWEEP = "sweep.json"
CONTENT = "content of "
"""Beginning of a key that says what stood in a file or folder that the run read."""


@dataclass(frozen=True)
class HeldOutTable:
    """The final policy on every held-out comparison, column by column; shape (comparisons,)."""

    prompt: np.ndarray
    """Digest of the prompt."""
    columns: Mapping[str, np.ndarray]

    @cached_property
    def identity(self) -> str:
        """Return a digest of what was compared: prompts, comparisons, and their lengths in tokens."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("group", "comparison", "chosen_tokens", "rejected_tokens"):
            digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        digest.update("".join(self.prompt.tolist()).encode())
        return digest.hexdigest()

    @property
    def tokens(self) -> float:
        """Mean tokens of a completion."""
        return float(np.concatenate([self.columns["chosen_tokens"], self.columns["rejected_tokens"]]).mean())

    def margins(self) -> np.ndarray:
        """Return the difference of the log-ratios, nats per completion: what compares across losses."""
        return self.columns["chosen_logratio"] - self.columns["rejected_logratio"]


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    label: str
    folder: Path
    recipe: Recipe
    loss: Loss
    state: str
    """finished, or how it ended otherwise."""
    reason: str
    result: Mapping[str, Any]
    """`result.json`; empty where it did not finish."""
    seconds: float | None
    """Of its processes, start-up, evaluation and broken attempts included, where a sweep measured it."""
    tokens: float | None = None
    """Of a completion, as the sweep counted them."""

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.state == "finished"

    @property
    def measures(self) -> Mapping[str, Any]:
        """What was measured on held-out data at the end."""
        return self.result.get("eval") or {}

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key that changes what the run computes, dotted; the loss by name and hyper-parameters."""
        flat = flat_keys(self.recipe.to_mapping())
        kept = {
            key: value
            for key, value in flat.items()
            if key not in ("loss", "seed") and not key.startswith(("loss.", *FREE_TO_CHANGE))
        }
        content = {f"{CONTENT}{path}": digest[:8] for path, digest in read_json(self.folder / INPUTS).items()}
        own = {f"loss.{name}": value for name, value in flat_keys(self.loss.hyperparameters).items()}
        return {"loss": self.loss.name, **own, **kept, **content}

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.recipe.seed

    @cached_property
    def looks(self) -> list[dict[str, Any]]:
        """Every look at held-out data, in order of steps; names without `eval/`."""
        return [
            {"step": line["step"], **{k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}}
            for line in self._lines
            if "eval/loss" in line
        ]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Every logged step of training."""
        return [line for line in self._lines if "learning_rate" in line]

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def clipped(self) -> float | None:
        """Share of the logged steps whose gradient was cut to `train.max_grad_norm`."""
        limit = self.recipe.train.max_grad_norm
        norms = [line["grad_norm"] for line in self.steps if "grad_norm" in line]
        return None if limit is None or not norms else float(np.mean([norm > limit for norm in norms]))

    @cached_property
    def held_out(self) -> HeldOutTable | None:
        """The held-out comparisons; None where nothing paired was held out."""
        file = self.folder / HELD_OUT
        if not self.finished or not file.exists():
            return None
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            fix = "remove this run's folder and run it again"
            raise RecipeError(Problem(str(file), "held-out comparisons of a run", str(error)[:200], fix)) from error
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "prompt"}
        return HeldOutTable(np.array(table["prompt"].to_pylist()), columns)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """What reference and policy wrote for the same held-out prompts."""
        return read_json_lines(self.folder / SAMPLES) if self.finished else []

    @cached_property
    def strength(self) -> Strength:
        """What its beta amounts to."""
        return strength_of(self.loss, self.completion_tokens)

    @property
    def completion_tokens(self) -> float | None:
        """Tokens of a completion: as the sweep counted them, else of those held out; None where neither is known."""
        return self.tokens or (self.held_out.tokens if self.held_out is not None else None)


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Return every run in the folders of runs and sweeps, labels made different where two agree.

    Raises:
        UserError: with every folder that is neither, and every run that cannot be read.
    """
    records: list[RunRecord] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            records += _read_sweep(path) if (path / SWEEP).is_file() else [read_run(path)]
        except UserError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return _told_apart(records)


def _told_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs with labels that are all different: where two agree, with as much of the path as it takes."""
    told = list(records)
    for depth in range(1, max((len(record.folder.resolve().parts) for record in records), default=1)):
        counts = Counter(record.label for record in told)
        if max(counts.values(), default=1) == 1:
            break
        for number, record in enumerate(told):
            if counts[record.label] > 1:
                told[number] = replace(records[number], label="/".join(_places(record)[-depth - 1 :]))
    return told


def _places(record: RunRecord) -> list[str]:
    """Return the folders that a run lies in, itself last, without those that every sweep has."""
    parts = record.folder.resolve().parts
    return [part for part in parts if part not in ("runs", "recipes")]


def _read_sweep(path: Path) -> list[RunRecord]:
    content = read_json(path / SWEEP)
    if not isinstance(content.get("runs"), list):
        fix = "give the command of the sweep again: it writes the file anew, and finished runs stay"
        raise RecipeError(Problem(str(path / SWEEP), "the runs of a sweep", "a file that is damaged", fix))
    records = []
    for entry in content["runs"]:
        folder, label = path / entry["folder"], entry["label"]
        if not entry.get("planned", True) and read_json(folder / RESULT).get("status") != "finished":
            continue  # left over from a larger grid
        status = read_json(path / "status" / f"{label}.json")
        where = folder if (folder / RECIPE).is_file() else path / "recipes" / f"{label}.yaml"
        record = read_run(where, label=label, status=status, tokens=content.get("tokens"))
        records.append(record)
    return records


def read_run(
    path: Path, *, label: str | None = None, status: Mapping[str, Any] | None = None, tokens: float | None = None
) -> RunRecord:
    """Return the record of a run folder, or of the recipe of a run that never began.

    Raises:
        RecipeError: it is neither.
    """
    if path.is_dir() and not (path / RECIPE).is_file():
        given = f"{path}, which has neither {RECIPE} nor {SWEEP}"
        raise RecipeError(Problem("RUN", "the folder of a run or of a sweep", given, "prefopt train RECIPE makes one"))
    if path.is_file() and label is None:
        given = f"{path}, a file"
        raise RecipeError(Problem("RUN", "the folder of a run or of a sweep", given, f"give {path.parent}"))
    if not path.exists():
        given = f"{path}, which does not exist"
        raise RecipeError(Problem("RUN", "the folder of a run or of a sweep", given, "look under runs/"))
    recipe = load_recipe(str(path), check_files=False)
    folder = path if path.is_dir() else path.parent
    result = read_json(folder / RESULT) if path.is_dir() else {}
    known = status or {}
    finished = result.get("status") == "finished"
    state = "finished" if finished else known.get("state", "unfinished")
    return RunRecord(
        label or path.name, folder, recipe, recipe.build_loss(), state if state != "finished" or finished else "lost",
        "" if finished else known.get("reason", ""), result if finished else {},
        known.get("spent") or known.get("seconds") or None, tokens,
    )  # fmt: skip


def refuse_mixture(records: Sequence[RunRecord]) -> None:
    """Raise RecipeError where runs were measured on different held-out data, or by other measures."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.finished:
            groups.setdefault(_measured_on(record), []).append(record)
    if len(groups) < 2:
        return
    said = "; ".join(f"{_named(members)} on {_held_out_words(members[0])}" for members in groups.values())
    fix = "report each of them apart: prefopt report RUN [RUN]... with runs of one kind"
    raise RecipeError(
        Problem("RUN", "runs that were measured on the same held-out comparisons, in the same way",
                f"{len(groups)} kinds: {said}", fix)
    )  # fmt: skip


def _measured_on(record: RunRecord) -> tuple[str, ...]:
    measured = record.recipe.eval
    how = f"{measured.samples} {measured.max_new_tokens} {measured.temperature} {measured.gold_reward}"
    if record.held_out is not None:
        return (record.held_out.identity, how)
    data = record.recipe.data
    return (repr((data.train, data.eval, data.eval_fraction, data.held_out_seed, data.split, data.filter)), how)


def _named(records: Sequence[RunRecord]) -> str:
    more = f" and {len(records) - 1} more" if len(records) > 1 else ""
    return f"{records[0].label}{more}"


def _held_out_words(record: RunRecord) -> str:
    source = record.recipe.data.eval or record.recipe.data.train
    count = f"{len(record.held_out.prompt):,} comparisons of " if record.held_out is not None else ""
    name = source if isinstance(source, str) else "several sources"
    return f"{count}{name}, max_length {record.recipe.data.max_length}, {record.recipe.eval.samples} samples"
