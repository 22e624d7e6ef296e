"""What each key of the recipe allows, read off the JSON schema and said in words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from prefopt.recipe.schema import Recipe

Schema = dict[str, Any]
Path = tuple[str | int, ...]

PATTERNS = {
    r"^[\w.]+:\w+$": "module:function",
    r"^eval(\.\w+)+$": "a metric such as eval.accuracy",
}
"""Regular expressions of the schema, in words."""


@cache
def recipe_schema() -> Schema:
    """Return the JSON schema of a recipe file, for editors and for other programs."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(mode="validation"),
    }


@cache
def _whole_schema() -> Schema:
    return _inlined(recipe_schema(), recipe_schema()["$defs"])


def _inlined(node: Any, definitions: Schema) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return {
            **_inlined(target, definitions),
            **{key: value for key, value in node.items() if key != "$ref"},
        }
    return {key: _inlined(value, definitions) for key, value in node.items() if key != "$defs"}


def schema_at(path: Path) -> Schema:
    """Return the schema of the key at a path, or an empty one where there is no such key."""
    schema = _whole_schema()
    for part in path:
        members = schema.get("anyOf", [schema])
        if isinstance(part, int):
            schema = next((member["items"] for member in members if "items" in member), {})
        else:
            schema = _keys(schema).get(part, {})
    return schema


def keys_of(path: Path) -> list[str]:
    """Return the keys of the section at a path."""
    return list(_keys(schema_at(path)))


def all_keys(path: Path = ()) -> Iterator[Path]:
    """Yield the path of every key below a section, a section before its own keys."""
    for key in keys_of(path):
        yield (*path, key)
        yield from all_keys((*path, key))


def choices(schema: Schema) -> list[str]:
    """Return the words that a schema allows by name."""
    inner = [choice for member in schema.get("anyOf", []) for choice in choices(member)]
    named = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [*inner, *map(str, named)]


def in_words(schema: Schema) -> str:
    """Return what a schema allows: `auto or a whole number of at least 1`."""
    if "anyOf" in schema:
        return _either([word for member in schema["anyOf"] for word in _alternatives(member)])
    if named := choices(schema):
        return _either(named)
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]]
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {in_words(schema['prefixItems'][0])}"
    if kind == "array":
        return f"a list (each entry {in_words(schema['items'])})"
    if kind in ("number", "integer"):
        return ("a number" if kind == "number" else "a whole number") + _range(schema)
    return {"boolean": "true or false", "null": "null", "object": "a mapping"}.get(str(kind), "text")


def _keys(schema: Schema) -> Schema:
    members = schema.get("anyOf", [schema])
    return next((member["properties"] for member in members if "properties" in member), {})


def _alternatives(schema: Schema) -> list[str]:
    return ["true", "false"] if schema.get("type") == "boolean" else choices(schema) or [in_words(schema)]


def _either(alternatives: list[str]) -> str:
    *first, last = alternatives
    return f"{', '.join(first)} or {last}" if first else last


def _range(schema: Schema) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    below = schema.get("exclusiveMaximum")
    if least is not None and below is not None:
        return f" from {least:g} to below {below:g}"
    if least is not None:
        return f" of at least {least:g}"
    return "" if above is None else f" above {above:g}"
