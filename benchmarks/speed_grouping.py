"""How many tokens an epoch of a preference file computes with prompts brought together, and without."""

from __future__ import annotations

import os
from pathlib import Path

LEAST = 1.7
"""So many times fewer tokens bringing prompts together must give, on data with eight pairs a prompt."""


def count_tokens(data: Path, folder: Path, max_length: int, batches: tuple[int, ...] = (4, 64)) -> list[str]:
    """Ask prefopt's planner; `folder` has the model and its tokenizer."""
    from prefopt.prepare import prepare
    from prefopt.recipe import recipe_from_mapping
    from prefopt.run import make_planner

    os.environ["PREFOPT_CACHE"] = str(folder / "grouping-cache")
    totals: dict[tuple[bool, int], int] = {}
    for grouped in (False, True):
        for batch in batches:
            recipe = recipe_from_mapping(
                {
                    "model": str(folder / "model"),
                    "data": {
                        "train": str(data), "max_length": max_length, "eval_fraction": 0.0, "group_by_prompt": grouped
                    },
                    "loss": "dpo",
                    "train": {"batch_size": batch},
                    "output": str(folder / "grouping"),
                },
                name="grouping",
            )  # fmt: skip
            planner = make_planner(prepare(recipe, quiet=True), token_budget=2**40)
            steps, end = planner.total_steps(epochs=1, max_steps=None), planner.comparisons_in(1)
            totals[grouped, batch] = sum(
                planner.step(number, last_comparison=end).computed_tokens for number in range(steps)
            )
    lines = [
        "\n| batch size | computed tokens of an epoch | with data.group_by_prompt | times fewer |\n|---|---|---|---|"
    ]
    for batch in batches:
        alone, together = totals[False, batch], totals[True, batch]
        lines.append(f"| {batch} | {alone:,} | {together:,} | {alone / together:.2f} |")
    best = max(totals[False, batch] / totals[True, batch] for batch in batches)
    return [*lines, f"\nAt least {LEAST} times fewer: {'yes' if best >= LEAST else 'NO'}."]
