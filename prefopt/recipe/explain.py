"""What pydantic found, said in the recipe's own words: the key, what it allows, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from prefopt.errors import Problem, suggest
from prefopt.recipe.allowed import Path, all_keys, choices, in_words, keys_of, schema_at
from prefopt.recipe.conflicts import Conflict

OTHER_NAMES = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "bf16": "train.precision",
    "beta": "loss.beta",
    "loss_type": "loss",
    "model_name_or_path": "model",
    "ref_model": "reference.model",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "output_dir": "output",
    "report_to": "tracking.wandb",
    "lora": "adapter",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
}
"""What other trainers call a key, and what it is called here."""


@dataclass(frozen=True)
class Finding:
    """A problem, and the key that has it."""

    key: str
    """Path of the key, as far as it has no index into a list."""
    problem: Problem


def findings(error: ValidationError, given: Any) -> list[Finding]:
    """Return what is wrong with single keys.

    Args:
        error: what pydantic raised.
        given: the mapping that was validated.
    """
    found: dict[Path, list[Problem]] = {}
    for detail in error.errors(include_url=False):
        path = _path_in(given, detail["loc"], missing=detail["type"] == "missing")
        if detail["type"] == "missing" and isinstance(path[-1], int):  # of a list that is too short
            path, detail["type"] = path[:-1], "too_short"
        if detail["type"] == "problems":
            found[path] = detail["ctx"]["problems"]
        elif detail["type"] != "conflicts":
            found.setdefault(path, [_problem(detail["type"], path, given)])
    # A union complains once for each of its members; the member that was meant complains deepest.
    shallow = {path[:depth] for path in found for depth in range(len(path))}
    return [Finding(_key(path), problem) for path in found if path not in shallow for problem in found[path]]


def _key(path: Path) -> str:
    indexed = next((depth for depth, part in enumerate(path) if isinstance(part, int)), len(path))
    return ".".join(map(str, path[:indexed]))


def conflicts(error: ValidationError) -> list[Conflict]:
    """Return the keys that exclude each other."""
    details = [detail for detail in error.errors() if detail["type"] == "conflicts"]
    return [conflict for detail in details for conflict in detail["ctx"]["conflicts"]]


def _problem(kind: str, path: Path, given: Any) -> Problem:
    where = ".".join(map(str, path)) or "recipe"
    if kind == "extra_forbidden":
        return unknown_key(path)
    schema = schema_at(path)
    expected = in_words(schema)
    if kind == "missing":
        return Problem(where, expected, "nothing", f"set {where}; it has no default")
    value = _value_at(path, given)
    if value is None and where in REQUIRED:
        return Problem(where, expected, "nothing", f"write a value after {where}, indented below it if it is a section")
    return Problem(where, expected, shown(value), _remedy(where, value, choices(schema)))


REQUIRED = ("model", "data", "data.train", "loss")
"""Keys without a default."""


def _remedy(where: str, value: Any, named: list[str]) -> str:
    if value is None:
        return f"remove the line to use the default of {where}"
    if isinstance(value, bool) and "off" in named:
        return f'write "{"online" if value else "off"}"'
    if not isinstance(value, str):
        return ""
    if _is_number(value) and not named:
        return f"write {value} without quotes"
    return suggest(value, named)


def unknown_key(path: Path) -> Problem:
    """Say which keys there are where an unknown one stands, and which was meant."""
    *parents, key = map(str, path)
    where = ".".join(map(str, path))
    if where == "sweep":
        return Problem(where, "one run per recipe", "a sweep of many runs", "run it with prefopt sweep")
    known = keys_of(path[:-1])
    home = {known_path[-1]: ".".join(map(str, known_path)) for known_path in reversed(list(all_keys()))}
    fix = suggest(key, known)
    if key in OTHER_NAMES or key in home:
        fix = f'did you mean "{OTHER_NAMES.get(key) or home[key]}"?'
    return Problem(
        where,
        f"a key of {'.'.join(parents) or 'the recipe'}: {', '.join(known)}",
        "an unknown key",
        fix or "remove it; unknown keys are never ignored",
    )


def _path_in(given: Any, loc: Path, *, missing: bool) -> Path:
    """Drop the names of union members from pydantic's location: they are no keys of the recipe."""
    path: list[str | int] = []
    for depth, part in enumerate(loc):
        if _holds(given, part):
            given = given[part]
        elif not (missing and depth == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _holds(given: Any, part: str | int) -> bool:
    if isinstance(given, list):
        return isinstance(part, int) and part < len(given)
    return isinstance(given, dict) and part in given


def _value_at(path: Path, given: Any) -> Any:
    for part in path:
        given = given[part]
    return given


def shown(value: Any) -> str:
    """Return a value as the recipe would write it, cut where it is long."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
