"""The reference of every key, made from the schema.

    python -m prefopt.recipe.document docs

writes `docs/recipe.md` and `docs/recipe.schema.json`. A test fails when either is stale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from prefopt.recipe.allowed import Path as KeyPath
from prefopt.recipe.allowed import Schema, in_words, keys_of, recipe_schema, schema_at
from prefopt.recipe.explain import OTHER_NAMES, shown

INTRODUCTION = """\
# The recipe

One YAML file is one run. This page lists every key; it is made from the schema
(`python -m prefopt.recipe.document docs`), and so is [recipe.schema.json](recipe.schema.json), which editors
can use for completion (`prefopt recipes --schema` prints it).

* **Three keys are required**: `model`, `data.train` and `loss`. Everything else has a default.
* **Every key can be changed on the command line**, by its dotted name, with a value in YAML:
  `prefopt train dpo loss.beta=0.2 data.train=pairs.jsonl`. `loss=ipo` replaces the whole loss,
  `loss.beta=0.2` changes one key of it. An entry of a list has a number: `data.train.0.weight=2`.
* **Nothing is ignored.** An unknown key, a key twice, a hyper-parameter that the loss does not have, or two
  keys that exclude each other stop the run before anything is loaded; all problems are listed at once.
* **YAML 1.2**: `off` is a word, `5e-7` is a number.
* Relative paths start at the folder in which `prefopt` is called.
"""

LOSS = """\
## loss

Spellings:

    loss: ipo                               # a method with its defaults
    loss: {name: dpo, beta: 0.1}            # with hyper-parameters of that method
    loss: dpo+0.5*sft                       # a weighted sum of methods with their defaults
    loss:                                   # a weighted sum with hyper-parameters; weight 1 where absent
      - {name: dpo, beta: 0.1}
      - {name: sft, weight: 0.5}
    loss: {name: gpo, f: my_module:my_f}    # a function of your own: elementwise, torch tensor to tensor
    loss:                                   # written in the algebra itself; every key of a term has a default
      name: mine
      terms:
        - {f: squared, beta: 0.2, aggregate: mean}
        - {f: linear, contrast: chosen, reference: false, coefficient: 0.5}

A term is `coefficient * weight * (q f(x) + (1 - q) f(-x))` with `x = beta * (a . s - shift)`; its keys are `f`,
`beta`, `aggregate` (sum, mean), `reference`, `link`, `contrast` (pair, chosen, rejected, negated_chosen), `shift`,
`q`, `soft_labels`, `coefficient` and `weight` (one, token_share). `my_module` is looked for where Python looks, and
in the folder in which `prefopt` is called.

`prefopt losses` lists the methods, `prefopt losses dpo` explains one with its hyper-parameters.
"""


def recipe_reference() -> str:
    """Return the reference of every key as Markdown."""
    sections = [key for key in keys_of(()) if keys_of((key,))]
    loose = [key for key in keys_of(()) if key not in sections and key != "loss"]
    parts = [INTRODUCTION, "## Top level\n", _table([(key,) for key in loose])]
    for section in sections:
        parts += [*_section((section,)), *([LOSS] if section == "data" else [])]
    return "\n".join([*parts, _other_names()])


def _section(path: KeyPath) -> Iterator[str]:
    schema = schema_at(path)
    yield f"## {'.'.join(map(str, path))}\n"
    yield f"{schema['description']}\n"
    if shorthand := _shorthand(schema):
        yield f"{shorthand}\n"
    yield _table([(*path, key) for key in keys_of(path)])
    for key in keys_of(path):
        inner: KeyPath = (*path, key)
        if keys_of(inner):
            yield from _section(inner)
        elif key == "train" and keys_of((*inner, 0)):
            yield "An entry of a list of sources is a word, or a mapping:\n"
            yield _table([(*inner, 0, source_key) for source_key in keys_of((*inner, 0))])


def _shorthand(schema: Schema) -> str:
    members = schema.get("anyOf", [])
    if any(member.get("type") == "string" for member in members):
        first = next(iter(next(member for member in members if "properties" in member)["properties"]))
        return f"A bare word is short for its `{first}`."
    return "Absent by default; `{}` or any key of it switches it on." if members else ""


def _table(paths: list[KeyPath]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for path in paths:
        schema = schema_at(path)
        default = "section" if keys_of(path) else f"`{_default(schema)}`" if "default" in schema else "**required**"
        allowed = "mapping" if keys_of(path) else in_words(schema)
        meaning = schema.get("description", "").replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{path[-1]}` | {allowed} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(schema: Schema) -> str:
    default = schema["default"]
    return default if isinstance(default, str) else shown(default)


def _other_names() -> str:
    rows = ["## Names from other trainers\n", "| elsewhere | here |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | `{key}` |" for name, key in OTHER_NAMES.items())]) + "\n"


def write_documents(folder: Path) -> None:
    """Write both files into a folder."""
    (folder / "recipe.md").write_text(recipe_reference(), encoding="utf-8")
    schema = json.dumps(recipe_schema(), indent=2)
    (folder / "recipe.schema.json").write_text(schema + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
