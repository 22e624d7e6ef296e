"""One record -> one row of text: TRL's preference formats, standard and conversational, paired and unpaired.

    {prompt, chosen, rejected}      explicit prompt
    {chosen, rejected}              implicit prompt: what both begin with
    {prompt, completion, label}     unpaired; for conversations the prompt may lie in the completion

Each text is a string or a list of {role, content} messages. `preference_probability`, `tools` and
`chat_template_kwargs` may be added. Reference: TRL's documentation, "Dataset formats and types".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.data.report import Dropped

Kind = Literal["paired", "unpaired"]
Message = dict[str, Any]
Text = str | list[Message]

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "preference_probability",
    "tools",
    "chat_template_kwargs",
)
"""The roles that columns can have; the keys of `data.columns`."""

WORD = 32
"""Characters that a common beginning is cut back at most to end between words; longer words are rare, and
languages without spaces have none."""

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class BadRow(ValueError):
    """A value of the wrong type: what was expected, what was given, what to do."""

    def __init__(self, expected: str, given: str, fix: str = "correct or remove the row") -> None:
        super().__init__(f"{expected}, given {given}")
        self.expected, self.given, self.fix = expected, given, fix


@dataclass(frozen=True)
class TextRow:
    """One row, its prompt made explicit. Conversations are JSON lists of messages."""

    prompt: str = ""
    chosen: str | None = None
    """None in unpaired rows that are not desirable."""
    rejected: str | None = None
    """None in unpaired rows that are desirable."""
    conversational: bool = False
    template_arguments: str = ""
    """JSON object of `tools` and `chat_template_kwargs`, or nothing."""
    preference_probability: float | None = None
    dropped: str = ""
    """Why the row is not used, or nothing."""


def by_role(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a record by role, under the names that `columns` gives."""
    return {role: values[name] for role in COLUMNS if (name := columns.get(role, role)) in values}


def kind_of(values: Mapping[str, Any]) -> Kind | None:
    """Return what the columns make of a row, None if they do not suffice; pairs come before labels."""
    if "chosen" in values and "rejected" in values:
        return "paired"
    return "unpaired" if "completion" in values and "label" in values else None


def text_row(values: Mapping[str, Any], kind: Kind) -> TextRow:
    """Return a row of text from values by role.

    Raises:
        BadRow: a value has the wrong type.
    """
    sides = ("chosen", "rejected") if kind == "paired" else ("completion",)
    label = _label(values["label"]) if kind == "unpaired" else None
    probability = _probability(values.get("preference_probability"))
    if probability is not None and not 0 <= probability <= 1:
        return TextRow(dropped=Dropped.PROBABILITY)
    for name in ("prompt", *sides):
        if name in values and values[name] is None:
            return TextRow(dropped=f"{name} is null")
    texts = [_text(values[side], side) for side in sides]
    given = _text(values["prompt"], "prompt") if "prompt" in values else None
    conversational = isinstance(given, list) or any(isinstance(text, list) for text in texts)
    if conversational:
        prompt, completions, dropped = _conversation(given, [_messages(text, "assistant") for text in texts])
    else:
        prompt, completions, dropped = _plain(given, texts)
    dropped = dropped or _useless(prompt, completions, sides)
    if dropped:
        return TextRow(dropped=dropped)
    stored = [_stored(completion) for completion in completions]
    return TextRow(
        prompt=_stored(prompt),
        chosen=stored[0] if label is not False else None,
        rejected=stored[-1] if label is not True else None,
        conversational=conversational,
        template_arguments=_template_arguments(values),
        preference_probability=probability,
    )


def shared_beginning(first: str, second: str) -> int:
    """Return how many characters two texts share, cut back to the end of a word, before a space."""
    end = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    for boundary in range(end, max(end - WORD, 0), -1):
        if first[boundary - 1].isspace():
            return boundary - 1 if first[boundary - 1] == " " else boundary
    return end


def _plain(given: Text | None, texts: Sequence[Text]) -> tuple[Text, list[Text], str]:
    if given is not None:
        return given, list(texts), ""
    if len(texts) == 1:
        raise BadRow("a prompt", "none", "name its column: data.columns: {prompt: …}")
    first, second = texts
    assert isinstance(first, str)
    assert isinstance(second, str)
    if first == second:
        return "", [first, second], Dropped.IDENTICAL
    end = shared_beginning(first, second)
    dropped = "" if end else Dropped.NO_SHARED_PROMPT
    return first[:end], [first[end:], second[end:]], dropped


def _conversation(given: Text | None, turns: Sequence[list[Message]]) -> tuple[Text, list[Text], str]:
    """Split conversations into prompt and completions.

    A prompt that the completions repeat (as text or as messages) is taken out of them.
    """
    if given is None or (isinstance(given, str) and all(_holds_prompt(messages) for messages in turns)):
        return _implicit(turns)
    prompt = _messages(given, "user")
    repeated = all(messages[: len(prompt)] == prompt for messages in turns)
    return prompt, [messages[len(prompt) :] if repeated else messages for messages in turns], ""


def _implicit(turns: Sequence[list[Message]]) -> tuple[Text, list[Text], str]:
    if len(turns) == 1:
        start = len(turns[0])
        while start and turns[0][start - 1]["role"] == "assistant":
            start -= 1
        return turns[0][:start], [turns[0][start:]], ""
    first, second = turns
    if first == second:
        return [], [first, second], Dropped.IDENTICAL
    start = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    dropped = "" if start else Dropped.NO_SHARED_PROMPT
    return first[:start], [first[start:], second[start:]], dropped


def _holds_prompt(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] in ("system", "developer", "user")


def _useless(prompt: Text, completions: Sequence[Text], sides: Sequence[str]) -> str:
    """Return why the row teaches nothing, or nothing."""
    if isinstance(prompt, list) and not prompt:
        return Dropped.PROMPT_EMPTY
    for side, completion in zip(sides, completions):
        if _blank(completion):
            return f"{side} is empty"
    return Dropped.IDENTICAL if len(completions) == 2 and completions[0] == completions[1] else ""


def _blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any(_says_something(message) for message in text)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _text(value: Any, name: str) -> Text:
    """Check that a value is text or messages."""
    if isinstance(value, str):
        return _storable(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{name}: text or a list of {{role, content}} messages", _described(value))
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name}: messages with a role and a content", _described(message))
        if not isinstance(message.get("content"), str | list | None):
            raise BadRow(f"{name}: a message whose content is text", _described(message["content"]))
    # Columnar files give every message every key that any message has; the template must not see those.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _stored(text: Text) -> str:
    return text if isinstance(text, str) else _storable(json.dumps(text, ensure_ascii=False), "a message")


def _storable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name}: text that UTF-8 can hold", f"half a surrogate pair at {error.start}") from error
    return text


def _template_arguments(values: Mapping[str, Any]) -> str:
    arguments = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = values.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value else None
            except json.JSONDecodeError as error:
                raise BadRow(f"{name}: valid JSON", error.msg) from error
        if value is not None and not isinstance(value, kind):
            raise BadRow(f"{name}: a {kind.__name__}", _described(value))
        if value:
            arguments[name] = value
    return json.dumps(arguments, ensure_ascii=False) if arguments else ""


def _label(value: Any) -> bool:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow("label: true, false, 1 or 0", _described(value))
    return label


def _probability(value: Any) -> float | None:
    """Return the soft label; null, an empty cell and NaN (Parquet's null) mean none."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRow("preference_probability: a number", _described(value))
    try:
        return float(value)
    except ValueError as error:
        raise BadRow("preference_probability: a number", _described(value)) from error


def _described(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "…"
