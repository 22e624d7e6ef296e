"""YAML 1.2, in and out: `off` is a word, `5e-7` is a number, a key that appears twice is an error."""

from __future__ import annotations

from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

from prefopt.errors import Problem, RecipeError


class _PlainRepresenter(RoundTripRepresenter):
    """Says `null` where there is nothing, and keeps a list of plain values on one line."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_list(self, data: list[Any]) -> SequenceNode:
        plain = not any(isinstance(each, dict | list) for each in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_PlainRepresenter.add_representer(type(None), _PlainRepresenter.represent_none)
_PlainRepresenter.add_representer(list, _PlainRepresenter.represent_list)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what the YAML text says, in plain Python types.

    Args:
        text: one YAML document.
        where: file name or key, for the error.

    Raises:
        RecipeError: with line and column, where the text is not YAML.
    """
    try:
        return _with_text_keys(YAML(typ="safe", pure=True).load(text))
    except YAMLError as error:
        raise RecipeError(_syntax_problem(error, where)) from None


def dump_yaml(mapping: dict[str, Any]) -> str:
    """Return the mapping as YAML that `parse_yaml` reads back unchanged, keys in their order."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _PlainRepresenter
    yaml.width = 110
    stream = StringIO()
    yaml.dump(mapping, stream)
    return stream.getvalue()


def _with_text_keys(value: Any) -> Any:
    """Make keys text: YAML reads `1: a` as a number, a recipe and the columns of a table have names only."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _syntax_problem(error: YAMLError, where: str) -> Problem:
    if not isinstance(error, MarkedYAMLError):
        return Problem(where, "a YAML document", given=str(error).splitlines()[0])
    mark = error.problem_mark or error.context_mark
    if mark is not None:
        where = f"{where}, line {mark.line + 1}, column {mark.column + 1}"
    said = (error.problem or "not YAML").splitlines()[0]
    if isinstance(error, DuplicateKeyError):
        return Problem(where, "every key once", said.removeprefix("found "), "keep one of the two")
    fix = "indent with spaces" if "'\\t'" in said else "look at this line and the one above it"
    return Problem(where, "YAML", said, fix)
