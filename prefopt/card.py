"""The model card: what the model is, what it measured, and the recipe that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.recipe import Recipe


def model_card(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """Return the card as Markdown with the hub's front matter."""
    library = "peft" if recipe.adapter is not None else "transformers"
    base = recipe.model.path if not recipe.model.path.startswith((".", "/", "~")) else "a local model"
    measures = "\n".join(f"| {name} | {_shown(value)} |" for name, value in _flat(result["eval"]))
    conventions = "\n".join(f"- **{name}**: {text}" for name, text in result["conventions"].items())
    reference = result["reference"]
    return f"""---
library_name: {library}
tags: [prefopt, preference-optimization, {result["loss"]["name"].split("+")[0]}]
pipeline_tag: text-generation
---

# {recipe.name}

Trained from {base} with [prefopt](https://pypi.org/project/prefopt/), {result["steps"]} steps of
{recipe.train.batch_size} comparisons, loss `{result["loss"]["name"]}`.

## Conventions

{conventions}

{_reference(reference)}{_moved(reference)}

## Held-out measures

| measure | value |
|---|---|
{measures}

## Recipe

```yaml
{recipe.to_yaml().strip()}
```
"""


def _reference(reference: Mapping[str, Any]) -> str:
    """Say how the reference was held, and how wrong that made it."""
    certificate = reference.get("certificate")
    if certificate is not None:
        return f"Reference: {certificate['sentence']}"
    quantization = reference["quantization"]
    held = quantization if isinstance(quantization, str) else quantization["type"]
    return (
        f"Reference: quantization {held}, largest error of a completion's log-prob "
        f"{_shown(reference['max_abs_error'])} nats."
    )


def _moved(reference: Mapping[str, Any]) -> str:
    """Say that the reference followed the policy, and against which one the measures are."""
    sync = reference.get("sync")
    if sync is None:
        return ""
    return (
        f"\nIt moved towards the policy {sync['syncs']} times, every {sync['every']} steps by {sync['mix']:g} "
        "(TR-DPO); held-out measures are against the initial reference."
    )


def _flat(measures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in measures.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(_shown(part) for part in value)
    return "not measured" if value is None else str(value)
