"""One record -> one row of text: TRL's preference formats and lists; standard and conversational.

    {prompt, chosen, rejected}      explicit prompt
    {chosen, rejected}              implicit prompt: what both begin with
    {prompt, completion, label}     unpaired; for conversations the prompt may lie in the completion
    {prompt, completions}           a list of at least two, best first; or with `scores` (higher is better, one
                                    number per completion) or `ranks` (1 is best), which then give the order

Each text is a string or a list of {role, content} messages. These columns may be added:

    preference_probability          probability that chosen is the better one (pairs)
    chosen_score, rejected_score    a reward model's or annotator's score (pairs); `score` where unpaired. A number,
                                    or a list of numbers: one per reward model of an ensemble
    value                           expected score of the prompt: V(x)
    gold                            a third response, better than both (pairs)
    tools, chat_template_kwargs     for the chat template

Null, an empty cell and NaN mean that a row has none of these. Reference: TRL's documentation, "Dataset formats and
types".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.data.cells import (
    BadRow,
    Text,
    described,
    finite_of,
    is_blank,
    label_of,
    listed,
    messages_of,
    number_of,
    score_of,
    stored,
    template_arguments,
    text_of,
)
from prefopt.data.prompts import split_conversation, split_plain, without_prompt
from prefopt.data.report import Dropped

Kind = Literal["paired", "unpaired", "ranked"]

JUDGED = ("prompt", "chosen", "rejected", "completion", "label", "completions")
"""The roles that make a row what it is."""
ADDED = (
    "scores",
    "ranks",
    "preference_probability",
    "chosen_score",
    "rejected_score",
    "score",
    "value",
    "gold",
    "tools",
    "chat_template_kwargs",
)
COLUMNS = JUDGED + ADDED
"""The roles that columns can have; the keys of `data.columns`."""

LISTED = "a completion of the list"
"""How messages name an entry of `completions`."""


@dataclass(frozen=True)
class TextRow:
    """One row, its prompt made explicit. Conversations are JSON lists of messages."""

    prompt: str = ""
    completions: tuple[str | None, ...] = ()
    """Chosen, rejected and, where there is one, gold; or the list. None: the side that an unpaired row lacks."""
    ranked: bool = False
    """Whether the completions are a list."""
    conversational: bool = False
    template_arguments: str = ""
    """JSON object of `tools` and `chat_template_kwargs`, or nothing."""
    preference_probability: float | None = None
    scores: tuple[tuple[float, ...], ...] = ()
    """(completions, models), nothing where a completion has no score; nothing at all where no completion has."""
    list_scores: tuple[float, ...] = ()
    """(completions,) of a list: minus the rank, or the mean score; higher is better. Nothing for pairs."""
    value: float | None = None
    dropped: str = ""
    """Why the row is not used, or nothing."""


def by_role(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a record by role, under the names that `columns` gives; a column has one role."""
    taken = set(columns.values())
    names = {role: columns.get(role, role) for role in COLUMNS if role in columns or role not in taken}
    return {role: values[name] for role, name in names.items() if name in values}


def kind_of(values: Mapping[str, Any]) -> Kind | None:
    """Return what the columns make of a row, None if they do not suffice; pairs before labels before lists."""
    if "chosen" in values and "rejected" in values:
        return "paired"
    if "completion" in values and "label" in values:
        return "unpaired"
    return "ranked" if "completions" in values else None


def order_of(values: Mapping[str, Any]) -> str:
    """Return what orders the completions of a list: `ranks`, `scores`, or nothing but their own order."""
    return next((name for name in ("ranks", "scores") if name in values), "")


def text_row(values: Mapping[str, Any], kind: Kind) -> TextRow:
    """Return a row of text from values by role.

    Raises:
        BadRow: a value has the wrong type.
    """
    names, cells = _judged(values, kind)
    said, dropped = _numbers(values, kind, len(cells))
    gold = _gold(values, kind)
    if dropped:
        return TextRow(dropped=dropped)
    for name, cell in zip(("prompt", *names), (values.get("prompt", ""), *cells)):
        if cell is None:
            return TextRow(dropped=f"{name} is null")
    texts = [text_of(cell, name) for name, cell in zip(names, cells)]
    given = text_of(values["prompt"], "prompt") if "prompt" in values else None
    conversational = any(isinstance(text, list) for text in (given, *texts, *gold))
    split: tuple[Text, list[Text], str]
    if conversational:
        split = split_conversation(given, [messages_of(text, "assistant") for text in texts])
        gold = [without_prompt(split[0], messages_of(text, "assistant")) for text in gold]
    else:
        split = split_plain(given, texts)
        gold = [without_prompt(split[0], text) for text in gold] if given is None else gold
    prompt, completions, dropped = split
    dropped = dropped or _useless(prompt, completions, names)
    if dropped:
        return TextRow(dropped=dropped)
    sides: list[str | None] = [stored(text) for text in (*completions, *gold) if not is_blank(text)]
    if kind == "unpaired":
        sides.insert(int(label_of(values["label"])), None)
    return TextRow(
        prompt=stored(prompt),
        completions=tuple(sides),
        ranked=kind == "ranked",
        conversational=conversational,
        template_arguments=template_arguments(values),
        **said,
    )


def _judged(values: Mapping[str, Any], kind: Kind) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the names and cells of the completions that are judged."""
    if kind == "ranked":
        cells = listed(values["completions"], "completions")
        return [LISTED] * len(cells), cells
    names = ("chosen", "rejected") if kind == "paired" else ("completion",)
    return names, [values[name] for name in names]


def _gold(values: Mapping[str, Any], kind: Kind) -> list[Text]:
    cell = values.get("gold")
    if cell is None or cell == "" or cell != cell:
        return []
    if kind != "paired":
        fix = "leave it out, or name the pair's columns: data.columns: {chosen: …, rejected: …}"
        raise BadRow("no gold: it can only stand beside chosen and rejected", described(cell), fix)
    gold = text_of(cell, "gold")
    return [] if is_blank(gold) else [gold]


def _numbers(values: Mapping[str, Any], kind: Kind, count: int) -> tuple[dict[str, Any], str]:
    """Return the numbers of a row by field of `TextRow`, and why they cannot be used, or nothing."""
    said: dict[str, Any] = {"value": finite_of(values.get("value"), "value")}
    if kind == "ranked":
        return _list_numbers(values, count, said)
    probability = number_of(values.get("preference_probability"), "preference_probability")
    said["preference_probability"] = probability
    if kind == "paired":
        scores = [score_of(values.get(name), name) for name in ("chosen_score", "rejected_score")]
        if None not in scores:
            said["scores"] = _of_equal_length(scores, "chosen_score and rejected_score")
    else:
        desirable, score = label_of(values["label"]), score_of(values.get("score"), "score")
        if score is not None:
            said["scores"] = (score, ()) if desirable else ((), score)
    outside = probability is not None and not 0 <= probability <= 1
    return said, Dropped.PROBABILITY if outside else ""


def _list_numbers(values: Mapping[str, Any], count: int, said: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Add the scores of a list, and by what it is ordered."""
    scores = _per_completion(values, "scores", count, score_of)
    ranks = _per_completion(values, "ranks", count, finite_of)
    if scores and None not in scores:
        said["scores"] = _of_equal_length(scores, "scores")
    if count < 2:
        return said, Dropped.LIST_SHORT
    order = {"ranks": ranks, "scores": scores, "": list(range(1, count + 1))}[order_of(values)]
    if not order or None in order:
        return said, Dropped.SCORE_NULL
    by_score = order_of(values) == "scores"
    said["list_scores"] = tuple(sum(entry) / len(entry) if by_score else -float(entry) for entry in order)
    return said, Dropped.LIST_TIED if len(set(said["list_scores"])) == 1 else ""


def _per_completion(values: Mapping[str, Any], name: str, count: int, read: Callable[[Any, str], Any]) -> list[Any]:
    cell = values.get(name)
    if cell is None:
        return []
    cells = listed(cell, name)
    if len(cells) != count:
        raise BadRow(f"{name}: one for each of the {count} completions", f"{len(cells)}: {described(cell)}")
    return [read(entry, name) for entry in cells]


def _of_equal_length(scores: Sequence[Any], name: str) -> tuple[tuple[float, ...], ...]:
    if len({len(score) for score in scores}) > 1:
        raise BadRow(f"{name}: the scores of the same reward models", described(scores))
    return tuple(scores)


def _useless(prompt: Text, completions: Sequence[Text], names: Sequence[str]) -> str:
    """Return why the row teaches nothing, or nothing."""
    if isinstance(prompt, list) and not prompt:
        return Dropped.PROMPT_EMPTY
    for name, completion in zip(names, completions):
        if is_blank(completion):
            return f"{name} is empty"
    if len(completions) == 1 or any(completion != completions[0] for completion in completions):
        return ""
    return Dropped.LIST_IDENTICAL if names[0] == LISTED else Dropped.IDENTICAL
