"""`key=value` on the command line: what it changes in a recipe before the recipe is validated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe.text import parse_yaml

SHORTHANDS = {
    "model": "path",
    "loss": "name",
    "train.optimizer": "name",
    "model.quantization": "type",
    "reference.quantization": "type",
}
"""Keys that may be written as a bare word, and the key of a mapping that the word stands for."""
LISTS = {"data.train": "path", "data.eval": "path", "loss": "name"}
"""Keys that may be a list of bare words, and the key that such a word stands for."""

EITHER_OR = (("train", "epochs"), ("train", "max_steps"))
"""Two ways to say the length of a run: one on the command line takes the place of the other in the file."""


@dataclass(frozen=True)
class Override:
    """One key and its new value."""

    path: tuple[str, ...]
    value: Any
    written: str


def parse_overrides(words: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that the words say, and what is wrong with the other words."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, text = word.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path) or word.startswith("-"):
            if not equals and left and "=" not in left[0]:
                word = f"{word} {left.pop(0)}"
            problems.append(Problem("command line", "key=value", word, _how_to_write(word)))
            continue
        try:
            overrides.append(Override(path, parse_yaml(text, where=key), word))
        except RecipeError as error:
            problems += error.problems
    return overrides, problems + list(_overwritten(overrides))


def _overwritten(overrides: Sequence[Override]) -> Iterator[Problem]:
    for index, later in enumerate(overrides):
        for earlier in overrides[:index]:
            if earlier.path[: len(later.path)] == later.path:
                fix = "keep one of them" if earlier.path == later.path else f"write {later.written} first"
                given = f"{earlier.written}, then {later.written}"
                yield Problem(".".join(earlier.path), "every override to count", given, fix)


def apply_override(mapping: dict[str, Any], override: Override) -> Problem | None:
    """Set one key in the mapping, opening shorthands on the way.

    Returns:
        what is wrong, or None.
    """
    node: Any = mapping
    for depth, key in enumerate(override.path):
        here = ".".join(override.path[:depth])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                valid = ", ".join(f"{here}.{index}" for index in range(len(node)))
                return Problem(override.written, f"an entry of the list: {valid}", ".".join(override.path))
            slot: Any = int(key)
        else:
            slot = key
        if depth == len(override.path) - 1:
            node[slot] = override.value
            return None
        child = node[slot] if isinstance(node, list) else node.get(slot)
        child = _opened(child, override.path[: depth + 1])
        if here == "" and key == "loss" and isinstance(child, dict) and "+" in str(child.get("name")):
            parts = str(child["name"])
            fix = "write the sum as a list: loss=[{name: simpo, beta: 2}, sft], or change one part: loss.0.beta=2"
            return Problem(override.written, "one loss; a sum has a hyper-parameter for each part", parts, fix)
        if not isinstance(child, dict | list):
            inner = ".".join(override.path[: depth + 1])
            return Problem(override.written, f"a key; {inner} is a value and has no keys", repr(child), f"set {inner}")
        node[slot] = child
        node = child
    return None


def replace_alternative(mapping: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Drop the file's length of the run where the command line says it the other way."""
    given = {override.path for override in overrides if override.path in EITHER_OR and override.value is not None}
    section = mapping.get("train")
    if len(given) == 1 and isinstance(section, dict):
        for _, key in set(EITHER_OR) - given:
            section.pop(key, None)


def _opened(value: Any, path: tuple[str, ...]) -> Any:
    """Return a section in a form that takes one more key: a bare word opened, nothing as empty."""
    if value is None:
        return {}
    key = ".".join(path)
    if isinstance(value, str) and key in SHORTHANDS:
        return {SHORTHANDS[key]: value}
    if isinstance(value, str) and key in LISTS:
        return [value]
    if isinstance(value, str) and path[-1].isdecimal() and (parent := ".".join(path[:-1])) in LISTS:
        return {LISTS[parent]: value}
    return value


def _how_to_write(word: str) -> str:
    key, _, value = word.lstrip("-").replace(" ", "=").partition("=")
    written = f"{key}={value or 'value'}"
    if word.startswith("-"):
        return f"keys are written without dashes: {written}"
    if word.startswith("="):
        return "put the key in front of the ="
    return "one dot between two keys" if "=" in word else f"write {written}"
