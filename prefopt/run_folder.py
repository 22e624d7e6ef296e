"""The run folder: which one a recipe gets, and the files that explain it.

recipe.yaml       every key, resolved, with the loss's conventions as comments
environment.json  versions, device, threads
metrics.jsonl     one line per log
samples.jsonl     what reference and policy wrote for the same held-out prompts
result.json       the outcome
model/            plain from_pretrained format with a model card
checkpoints/      what a resumed run goes on from
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import Recipe, load_recipe
from prefopt.reference.identity import file_hashes
from prefopt_losses import Loss

RECIPE, RESULT, SAMPLES = "recipe.yaml", "result.json", "samples.jsonl"
STEP_ZERO, REFERENCE_SAMPLES = "step_zero.json", "reference_samples.jsonl"
INPUTS, LOCK = "inputs.json", ".lock"

DIGEST_LINE = "# What it computes: "
"""Begins the second line of a stored recipe, which names its numbers."""

FREE_TO_CHANGE = ("tracking.", "checkpoint.", "output", "eval.show", "data.processes")
"""Keys that change nothing of what a run computes: a run may be resumed under others."""


@dataclass
class RunFolder:
    """Where a run lives, and what stood there already."""

    path: Path
    note: str
    """Why it is this folder, where that needs saying."""
    result: dict[str, Any] | None
    """The result of the same recipe, where it has finished before."""
    _lock: IO[str] | None = None

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def claim_folder(recipe: Recipe, *, lock: bool = True) -> RunFolder:
    """Find the folder of a run: the recipe's own where it is free or holds the same run, and lock it.

    The same run: equal recipes (but for keys that change no number) on files of equal content. A folder that follows
    the default pattern moves on to `-<loss>`, `-<loss>-2`, ... when it holds another run, and says so; a folder that
    the recipe names itself does not. A run that failed before its first step holds nothing.

    Raises:
        RecipeError: the named folder holds another run, is in use, or cannot be written.
    """
    wanted = recipe.output_folder()
    inputs = input_hashes(recipe)
    moves_on = "{recipe}" in recipe.output
    for path in _candidates(wanted, recipe):
        differing = _differences(path, recipe, inputs)
        if not differing and not (moves_on and lock and _in_use_by_another(path, recipe)):
            break
        if not moves_on:
            raise RecipeError(
                Problem("output", "a new folder, or one of the same run",
                        f"{path} holds a run with other {', '.join(differing[:6])}",
                        f"choose another output=FOLDER, or remove {path}")
            )  # fmt: skip
    note = "" if path == wanted else f"{wanted} holds another run; this one goes to {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = _locked(path) if lock else None
        result = _finished(path)
        if lock and result is None:
            write_text(path / RECIPE, recipe_text(recipe))
            write_json(path / INPUTS, inputs)
    except OSError as error:
        raise RecipeError(
            Problem("output", "a folder that can be written", f"{path}: {error.strerror or error}", "output=FOLDER")
        ) from error
    return RunFolder(path, note, result, held)


def _candidates(wanted: Path, recipe: Recipe) -> Iterator[Path]:
    """The recipe's folder, then one that names the loss, then numbered ones."""
    yield wanted
    named = wanted.with_name(f"{wanted.name}-{recipe.build_loss().name.replace('*', 'x')}")
    yield named
    for number in itertools.count(2):
        yield named.with_name(f"{named.name}-{number}")


def _in_use_by_another(path: Path, recipe: Recipe) -> bool:
    """Whether another process is setting up another run in the folder, which holds nothing of it yet."""
    if not (path / LOCK).exists() or not (path / RECIPE).is_file():
        return False
    try:
        _locked(path).close()
    except RecipeError:
        return bool(_differing_keys(path, recipe))
    return False


def _locked(path: Path) -> IO[str]:
    """Open the folder's lock file and hold it; the system lets go when the process ends."""
    stream = (path / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise RecipeError(
            Problem("output", "a run folder that no other process is using", str(path),
                    "wait for the other run, or choose another output=FOLDER")
        ) from error  # fmt: skip
    except OSError:
        pass  # a file system without locks
    return stream


MODEL_FILES = (
    "*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json", "tokenizer*", "vocab*", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "*.jinja",
)  # fmt: skip
"""What of a model folder a run reads; a README beside it may change."""


def input_hashes(recipe: Recipe) -> dict[str, str]:
    """One SHA-256 for each local file or folder that a recipe reads: data, model and reference, by its path."""
    sources = [recipe.data.train, recipe.data.eval]
    listed = [[source] if isinstance(source, str) else source for source in sources if source is not None]
    data = [one if isinstance(one, str) else one.path for group in listed for one in group]
    models = [recipe.model.path, *([recipe.reference.model] if recipe.reference.model else [])]
    models += [recipe.adapter.path] if recipe.adapter is not None and recipe.adapter.path else []
    own = recipe.output_folder().resolve()
    hashes = {}
    for text, patterns in [*((one, ("**/*",)) for one in data), *((one, MODEL_FILES) for one in models)]:
        path = Path(text).expanduser()
        found = {child for pattern in patterns for child in path.glob(pattern)} if path.is_dir() else {path}
        files = sorted(file for file in found if file.is_file() and not file.resolve().is_relative_to(own))
        if files:
            lines = [f"{file.name}:{digest}" for file, digest in zip(files, file_hashes(files))]
            hashes[text] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return hashes


def _differences(path: Path, recipe: Recipe, inputs: Mapping[str, str]) -> list[str]:
    """Dotted keys and files in which the folder's run differs; none where it is free or the same."""
    if path.exists() and not path.is_dir():
        raise RecipeError(Problem("output", "a folder", f"{path} is a file", "output=FOLDER"))
    if not path.exists() or not any(path.iterdir()):
        return []
    if not (path / RECIPE).is_file():
        return [f"content (no {RECIPE})"]
    if not any((path / name).exists() for name in (RESULT, "metrics.jsonl", "checkpoints")):
        return []
    before = json.loads((path / INPUTS).read_text(encoding="utf-8")) if (path / INPUTS).is_file() else {}
    changed = [f"content of {path}" for path in before if path in inputs and before[path] != inputs[path]]
    return _differing_keys(path, recipe) + changed


def _differing_keys(path: Path, recipe: Recipe) -> list[str]:
    return differing_keys(load_recipe(str(path / RECIPE), check_files=False), recipe)


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted keys that change a number and have another value in the other recipe."""
    there, here = flat_keys(one.to_mapping()), flat_keys(other.to_mapping())
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return [key for key in keys if not key.startswith(FREE_TO_CHANGE)]


def flat_keys(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_keys(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _finished(path: Path) -> dict[str, Any] | None:
    result = read_json(path / RESULT)
    return result if result.get("status") == "finished" else None


def recipe_text(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, headed by what its loss's numbers mean."""
    lines = [f"# {name}: {text}" for name, text in conventions(recipe.build_loss()).items()]
    head = ["# The resolved recipe of this run.", f"{DIGEST_LINE}{recipe_digest(recipe)}", "# Its loss, spelled out:"]
    return "\n".join([*head, *lines, recipe.to_yaml()])


def recipe_digest(recipe: Recipe) -> str:
    """Return what is equal for recipes that compute the same."""
    flat = flat_keys(recipe.to_mapping())
    kept = sorted((key, value) for key, value in flat.items() if not key.startswith(FREE_TO_CHANGE))
    return hashlib.blake2b(repr(kept).encode(), digest_size=8).hexdigest()


def stored_digest(file: Path) -> str | None:
    """Return the digest that heads a stored recipe; None where there is no such file, or no digest in it."""
    try:
        with file.open(encoding="utf-8") as stream:
            head = [next(stream, "") for _ in range(2)]
    except OSError:
        return None
    return next((line.removeprefix(DIGEST_LINE).strip() for line in head if line.startswith(DIGEST_LINE)), None)


def conventions(loss: Loss) -> dict[str, str]:
    """Return the conventions of a loss, one line each."""
    return {"loss": loss.name, **{name: " ".join(text.split()) for name, text in loss.conventions.items()}}


def environment() -> dict[str, Any]:
    """Versions and machine of this process."""
    packages = ("torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "prefopt")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        **versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file whole: beside, then renamed."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def read_json(file: Path) -> dict[str, Any]:
    """Return a mapping that a file holds; empty where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines whole."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
