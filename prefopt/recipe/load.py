"""A file, or the name of a shipped recipe, and overrides -> a Recipe; everything wrong is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefopt.errors import Problem, RecipeError, suggest
from prefopt.recipe.explain import conflicts, findings, shown
from prefopt.recipe.files import missing_files
from prefopt.recipe.override import apply_override, parse_overrides, replace_alternative
from prefopt.recipe.schema import Recipe
from prefopt.recipe.text import parse_yaml

STAND_INS: dict[str, Any] = {
    "model": "sandbox",
    "model.path": "sandbox",
    "data": {"train": "sandbox"},
    "data.train": "sandbox",
    "loss": "dpo",
}
"""Values for required keys that are wrong or absent, so that the rest can still be looked at."""
ROUNDS = 6
"""Wrong keys, keys that they hid, keys that exclude each other, and some to spare."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Return the recipe of a file or of a shipped name, with overrides applied.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe (`prefopt recipes` lists them).
        overrides: `key=value` words, dotted keys, values in YAML.
        check_files: whether data and models that are written as paths must exist.

    Raises:
        RecipeError: with every problem of file, overrides and keys.
    """
    path = find_recipe(name_or_path)
    changes, problems = parse_overrides(overrides)
    try:
        mapping = read_mapping(path)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from None
    problems += [problem for change in changes if (problem := apply_override(mapping, change))]
    replace_alternative(mapping, changes)
    recipe, found = _validated(mapping)
    problems += found
    if recipe is not None and check_files:
        problems += missing_files(recipe)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe.named(path.parent.resolve().name if path.stem == "recipe" else path.stem)


def recipe_from_mapping(mapping: dict[str, Any], *, name: str = "recipe") -> Recipe:
    """Return the recipe that a plain mapping describes.

    Raises:
        RecipeError: with every problem at once.
    """
    recipe, problems = _validated(deepcopy(mapping))
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe.named(name)


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with prefopt, by name."""
    package = Path(__file__).parent.parent
    folders = [package / "recipes", package.parent / "recipes"]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: where there is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    expected = f"a file, or a shipped recipe: {', '.join(shipped)}"
    given = f"{name_or_path} ({'a folder without recipe.yaml' if path.is_dir() else 'no such file'})"
    fix = suggest(path.stem, list(shipped)) or "`prefopt recipes` shows what is shipped"
    raise RecipeError(Problem("recipe", expected, given, fix))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what a recipe's file says, unchecked.

    Raises:
        RecipeError: it is no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(str(path), "UTF-8 text", f"byte {error.start} is not")) from None
    mapping = parse_yaml(text, where=str(path))
    if not isinstance(mapping, dict):
        raise RecipeError(Problem(str(path), "a mapping: key: value on each line", shown(mapping)))
    return mapping


def _validated(mapping: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Validate; set wrong keys aside and look again, for pydantic stops before it sees what they hide."""
    problems: list[Problem] = []
    broken: set[str] = set()
    for _ in range(ROUNDS):
        try:
            return Recipe.model_validate(mapping), problems
        except ValidationError as error:
            wrong = findings(error, mapping)
            clashes = [] if wrong else conflicts(error)
        problems += [finding.problem for finding in wrong]
        problems += [clash.problem for clash in clashes if not _touches(clash.keys, broken)]
        keys = [finding.key for finding in wrong] + [key for clash in clashes for key in clash.keys]
        broken.update(keys)
        for key in keys:
            _set_aside(mapping, key)
    return None, problems


def _touches(keys: Sequence[str], broken: set[str]) -> bool:
    """Whether a key is broken, lies in a broken section, or is the section of a broken key."""
    return any(
        f"{one}.".startswith(f"{other}.")
        for key in keys
        for wrong in broken
        for one, other in ((key, wrong), (wrong, key))
    )


def _set_aside(mapping: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    node: Any = mapping
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)
        if key in STAND_INS:
            node[last] = deepcopy(STAND_INS[key])
