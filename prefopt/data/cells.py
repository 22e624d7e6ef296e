"""What one cell of a row may hold: text, messages, a label, a number, scores. Anything else is a wrong row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_OTHER_MEANING = "correct the row, or rename the column if it holds something else"


class BadRow(ValueError):
    """A value of the wrong type: what was expected, what was given, what to do."""

    def __init__(self, expected: str, given: str, fix: str = "correct or remove the row") -> None:
        super().__init__(f"{expected}, given {given}")
        self.expected, self.given, self.fix = expected, given, fix


def text_of(value: Any, name: str) -> Text:
    """Check that a value is text or messages."""
    if isinstance(value, str):
        return _storable(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{name}: text or a list of {{role, content}} messages", described(value))
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name}: messages with a role and a content", described(message))
        if not isinstance(message.get("content"), str | list | None):
            raise BadRow(f"{name}: a message whose content is text", described(message["content"]))
    # Columnar files give every message every key that any message has; the template must not see those.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def messages_of(text: Text, role: str) -> list[Message]:
    """Return text as one message of a role, messages as they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def stored(text: Text) -> str:
    """Return text as it is, messages as JSON."""
    return text if isinstance(text, str) else _storable(json.dumps(text, ensure_ascii=False), "a message")


def is_blank(text: Text) -> bool:
    """Return whether there is nothing but whitespace."""
    if isinstance(text, str):
        return not text.strip()
    return not any(_says_something(message) for message in text)


def label_of(value: Any) -> bool:
    """Return whether a completion is desirable."""
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow("label: true, false, 1 or 0", described(value))
    return label


def number_of(value: Any, name: str) -> float | None:
    """Return a number, which may be text (CSV); null, an empty cell and NaN (Parquet's null) mean none."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRow(f"{name}: a number", described(value), _OTHER_MEANING)
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"{name}: a number", described(value), _OTHER_MEANING) from error
    return None if math.isnan(number) else number


def finite_of(value: Any, name: str) -> float | None:
    """Return a finite number or none."""
    number = number_of(value, name)
    if number is not None and math.isinf(number):
        raise BadRow(f"{name}: a finite number", described(value))
    return number


def score_of(value: Any, name: str) -> tuple[float, ...] | None:
    """Return a score as one number per model: a number is that of one model, a list that of an ensemble."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadRow(f"{name}: a number, or a number of each reward model", "an empty list")
    numbers = [finite_of(item, name) for item in values]
    if isinstance(value, list) and len(value) > 1 and None in numbers and set(numbers) != {None}:
        raise BadRow(f"{name}: a number of every reward model", described(value))
    return None if None in numbers else tuple(number for number in numbers if number is not None)


def listed(value: Any, name: str) -> list[Any]:
    """Check that a value is a list: one entry per completion."""
    if not isinstance(value, list):
        raise BadRow(f"{name}: a list with one entry per completion", described(value), _OTHER_MEANING)
    return value


def template_arguments(values: Mapping[str, Any]) -> str:
    """Return `tools` and `chat_template_kwargs` as a JSON object, or nothing."""
    arguments = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = values.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value else None
            except json.JSONDecodeError as error:
                raise BadRow(f"{name}: valid JSON", error.msg) from error
        if value is not None and not isinstance(value, kind):
            raise BadRow(f"{name}: a {kind.__name__}", described(value))
        if value:
            arguments[name] = value
    return json.dumps(arguments, ensure_ascii=False) if arguments else ""


def described(value: Any) -> str:
    """Return a value as it is shown in a message."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _storable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name}: text that UTF-8 can hold", f"half a surrogate pair at {error.start}") from error
    return text
