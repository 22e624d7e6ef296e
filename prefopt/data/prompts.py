"""Where the prompt ends: a prompt that is given, one that the completions repeat, one that they merely share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.data.cells import BadRow, Message, Text, messages_of
from prefopt.data.report import Dropped

WORD = 32
"""Characters that a common beginning is cut back at most to end between words; longer words are rare, and
languages without spaces have none."""


def split_plain(given: Text | None, texts: Sequence[Any]) -> tuple[str, list[Text], str]:
    """Return prompt and completions of plain text, and why they cannot be used, or nothing."""
    if given is not None:
        assert isinstance(given, str)
        return given, list(texts), ""
    if len(texts) == 1:
        raise BadRow("a prompt", "none", "name its column: data.columns: {prompt: …}")
    first, *others = texts
    if all(other == first for other in others):
        return "", list(texts), ""
    end = min(shared_beginning(first, other) for other in others)
    return first[:end], [text[end:] for text in texts], "" if end else Dropped.NO_SHARED_PROMPT


def split_conversation(given: Text | None, turns: Sequence[list[Message]]) -> tuple[list[Message], list[Text], str]:
    """Return prompt and completions of conversations, and why they cannot be used, or nothing.

    A prompt that the completions repeat (as text or as messages) is taken out of them.
    """
    if given is None or (isinstance(given, str) and all(_holds_prompt(messages) for messages in turns)):
        return _implicit(turns)
    prompt = messages_of(given, "user")
    repeated = all(messages[: len(prompt)] == prompt for messages in turns)
    return prompt, [messages[len(prompt) :] if repeated else messages for messages in turns], ""


def without_prompt(prompt: Text, text: Any) -> Text:
    """Return a text without the prompt, where it begins with it."""
    return text[len(prompt) :] if text[: len(prompt)] == prompt else text


def shared_beginning(first: str, second: str) -> int:
    """Return how many characters two texts share, cut back to the end of a word, before a space."""
    end = _common_length(first, second)
    for boundary in range(end, max(end - WORD, 0), -1):
        if first[boundary - 1].isspace():
            return boundary - 1 if first[boundary - 1] == " " else boundary
    return end


def _implicit(turns: Sequence[list[Message]]) -> tuple[list[Message], list[Text], str]:
    if len(turns) == 1:
        start = len(turns[0])
        while start and turns[0][start - 1]["role"] == "assistant":
            start -= 1
        return turns[0][:start], [turns[0][start:]], ""
    first, *others = turns
    if all(other == first for other in others):
        return first, list(turns), ""
    start = min(_common_length(first, other) for other in others)
    return first[:start], [messages[start:] for messages in turns], "" if start else Dropped.NO_SHARED_PROMPT


def _holds_prompt(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] in ("system", "developer", "user")


def _common_length(first: Sequence[object], second: Sequence[object]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
