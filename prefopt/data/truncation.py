"""What gives way in a row that is longer than `data.max_length`. Planned per row, before any id is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.data.report import Dropped
from prefopt.data.settings import Truncation


@dataclass(frozen=True)
class CutPlan:
    """How many tokens stay."""

    head: int
    """Tokens kept at the start of the prompt (BOS, where the start is cut)."""
    tail: int
    """Tokens kept at the end of the prompt; the prompt becomes its first `head` and last `tail` tokens."""
    completions: tuple[int, ...]
    """Tokens kept at the start of each completion."""


def plan_cut(
    prompt: int, completions: Sequence[int], *, max_length: int, truncation: Truncation, bos: int
) -> CutPlan | Dropped:
    """Plan a row so that prompt plus completion fits and every completion keeps a token.

    All completions of the row keep the same prompt. With `completion` the ends of the completions give way;
    with `prompt` the start of the prompt gives way first, down to BOS and one token; with `drop` the row.

    Args:
        prompt: prompt tokens, at least 1.
        completions: tokens of each completion, each at least 1.
        max_length: longest prompt plus completion, in tokens.
        truncation: what gives way.
        bos: 1 if the prompt begins with BOS, which is kept; else 0.

    Returns:
        The plan, or why the row cannot be used.
    """
    if prompt + max(completions) <= max_length:
        return CutPlan(0, prompt, tuple(completions))
    if truncation == "drop":
        return Dropped.PROMPT_TOO_LONG if prompt >= max_length else Dropped.TOO_LONG
    kept = prompt
    if truncation == "prompt":
        kept = min(prompt, max(max_length - max(completions), bos + 1))
    room = max_length - kept
    if room < 1:
        return Dropped.PROMPT_TOO_LONG
    head = bos if kept < prompt else 0
    return CutPlan(head, kept - head, tuple(min(length, room) for length in completions))
