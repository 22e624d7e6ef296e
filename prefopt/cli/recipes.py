"""`prefopt recipes`: the shipped recipes listed, one printed, or the schema of them all."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

from rich.syntax import Syntax
from rich.table import Table

from prefopt.cli.printing import console, print_hints
from prefopt.errors import Problem, RecipeError, suggest
from prefopt.recipe import recipe_schema, shipped_recipes


def show_recipes() -> None:
    """Print name and purpose of every shipped recipe, the one to begin with first."""
    out = console()
    out.print()
    for name, path in sorted(shipped_recipes().items(), key=lambda shipped: shipped[0] != "quickstart"):
        row = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        row.add_column(style="bold", width=16)
        row.add_column()
        row.add_row(name, purpose(path))
        out.print(row)
    print_hints(
        out,
        {
            "prefopt recipes NAME > my.yaml": "a commented file to start from",
            "prefopt train NAME KEY=VALUE": "run one, with keys changed",
        },
    )


def show_recipe(name: str) -> None:
    """Print one shipped recipe: coloured on a terminal, byte for byte into a pipe."""
    shipped = shipped_recipes()
    if name not in shipped:
        fix = suggest(name, list(shipped)) or "choose one of these"
        raise RecipeError(Problem("recipe", f"a shipped recipe: {', '.join(shipped)}", name, fix))
    text = shipped[name].read_text(encoding="utf-8")
    out = console()
    if out.is_terminal:
        out.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        print(text, end="")


def show_schema() -> None:
    """Print the JSON schema of a recipe."""
    print(json.dumps(recipe_schema(), indent=2))


def purpose(path: Path) -> str:
    """Return the first sentence of a recipe's opening comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return opening.partition(". ")[0].rstrip(".")
