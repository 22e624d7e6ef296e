"""Text rows -> token ids, with an exact boundary between prompt and completion.

Prompt and completion are tokenized separately and their ids are concatenated: that is what a model sees when
it continues a prompt. A chat template is applied to the prompt alone and to prompt plus completion; the
completion is what the second adds to the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.data.formats import LISTED
from prefopt.data.report import Dropped
from prefopt.data.settings import Choice, DataSettings, Truncation
from prefopt.data.tokenizer import SpecialIds, Whitespace, encode
from prefopt.data.truncation import plan_cut

HEAD = 200
"""Characters of a completion that show whether it merges with the prompt; saves half the work."""


@dataclass(frozen=True)
class TokenRules:
    """The settings that decide over token ids."""

    max_length: int
    truncation: Truncation
    eos: Choice
    chat_template: Choice

    @classmethod
    def of(cls, settings: DataSettings) -> TokenRules:
        """Take them from the recipe."""
        return cls(settings.max_length, settings.truncation, settings.eos, settings.chat_template)


@dataclass(frozen=True)
class _Rendered:
    """One row as text that can be tokenized."""

    prompt: str
    completions: tuple[str, ...]
    templated: bool
    consistent: bool = True
    """False: `completions` hold whole conversations, for the template does not begin them with the prompt."""

    def pieces(self) -> list[str]:
        """Return every text whose ids are needed."""
        if not self.consistent:
            return [self.prompt, *self.completions]
        heads = [completion[:HEAD] for completion in self.completions]
        return [self.prompt, *self.completions, *heads, *(self.prompt + head for head in heads)]


@dataclass(frozen=True)
class _Ids:
    """One row as ids, before EOS and cut."""

    prompt: list[int]
    completions: list[list[int]]
    merged: bool
    mismatched: bool


def tokenize_rows(
    batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, special: SpecialIds, rules: TokenRules
) -> dict[str, list[Any]]:
    """Tokenize a batch of text rows.

    Args:
        batch: columns of `reading.TEXT_SCHEMA`.
        tokenizer: a transformers tokenizer.
        special: its special ids.
        rules: EOS, chat template, truncation.

    Returns:
        Columns of `tokenized.TOKEN_FEATURES`, row by row; a row that is not used has no ids and says why.
    """
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    rendered: list[_Rendered | str] = [_render(row, tokenizer, rules) for row in rows]
    texts = [piece for row in rendered if isinstance(row, _Rendered) for piece in row.pieces()]
    ids = encode(tokenizer, texts, add_special_tokens=False)
    spaces = Whitespace(tokenizer)
    results = []
    for row, texts_of_row in zip(rows, rendered):
        result = _unused(row)
        if isinstance(texts_of_row, str):
            result["problem"] = texts_of_row
        elif not row["dropped"]:
            result.update(_finished(row, texts_of_row, ids, special, rules, spaces))
        results.append(result)
    return {name: [result[name] for result in results] for name in results[0]}


def _unused(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [],
        "completions": [],
        "preference_probability": row["preference_probability"],
        "scores": [],
        "list_scores": [],
        "value": row["value"],
        "row": row["row"],
        "prompt_tokens": 0,
        "prompt_hash": 0,
        "completion_hashes": [],
        "dropped": row["dropped"],
        "completion_cut": False,
        "prompt_cut": False,
        "repeated": False,
        "merged": False,
        "mismatched": False,
        "problem": "",
    }


def _render(row: Mapping[str, Any], tokenizer: Any, rules: TokenRules) -> _Rendered | str:
    """Return the texts to tokenize, or why the chat template refuses them."""
    if row["dropped"]:
        return _Rendered("", (), False)
    sides = [side for side in row["completions"] if side is not None]
    if row["conversational"]:
        prompt, completions = json.loads(row["prompt"]), [json.loads(side) for side in sides]
    elif rules.chat_template == "always":
        prompt = [{"role": "user", "content": row["prompt"]}]
        completions = [[{"role": "assistant", "content": side}] for side in sides]
    else:
        return _Rendered(row["prompt"], tuple(sides), False)
    arguments = json.loads(row["template_arguments"] or "{}")
    settings = {
        "tools": arguments.get("tools"),
        **arguments.get("chat_template_kwargs", {}),
        "tokenize": False,
    }
    opens = prompt[-1]["role"] != "assistant"  # after an assistant's message there is no turn to open
    try:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=opens, **settings)
        whole = [tokenizer.apply_chat_template(prompt + turns, **settings) for turns in completions]
    except Exception as error:  # templates are programs: they raise what they like
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if all(text.startswith(start) for text in whole):
        return _Rendered(start, tuple(text[len(start) :] for text in whole), True)
    return _Rendered(start, tuple(whole), True, consistent=False)


def _finished(
    row: Mapping[str, Any],
    texts: _Rendered,
    ids: Mapping[str, list[int]],
    special: SpecialIds,
    rules: TokenRules,
    spaces: Whitespace,
) -> dict[str, Any]:
    """Return the columns of a row that has text: EOS added, cut planned, ids hashed; or why it is dropped."""
    split = _split(texts, ids)
    prompt = split.prompt if texts.templated else _with_bos(split.prompt, special)
    closing = special.closing if texts.templated else frozenset([special.eos])
    uncut = [_with_eos(side, special.eos, closing, rules.eos, spaces) for side in split.completions]
    found: dict[str, Any] = {"prompt_tokens": len(prompt)}
    if dropped := _useless(row, prompt, split.completions, uncut):
        return found | {"dropped": dropped}
    plan = plan_cut(
        len(prompt),
        [len(side) for side in uncut],
        max_length=rules.max_length,
        truncation=rules.truncation,
        bos=int(prompt[0] == special.bos),
    )
    if isinstance(plan, Dropped):
        return found | {"dropped": plan.value}
    kept = [side[:length] for side, length in zip(uncut, plan.completions)]
    if _all_equal(row, kept):
        reason = Dropped.LIST_IDENTICAL_AFTER_CUT if row["ranked"] else Dropped.IDENTICAL_AFTER_CUT
        return found | {"dropped": reason.value}
    columns = _completion_columns(row, kept)
    if "dropped" in columns:
        return found | columns
    found["prompt"] = prompt[: plan.head] + prompt[len(prompt) - plan.tail :]
    found["prompt_hash"] = hash_of(prompt)
    found["prompt_cut"] = plan.head + plan.tail < len(prompt)
    found["completion_cut"] = kept != uncut
    found["merged"], found["mismatched"] = split.merged, split.mismatched
    return found | columns


def _completion_columns(row: Mapping[str, Any], kept: list[list[int]]) -> dict[str, Any]:
    """Return ids, hashes and scores of a row's completions; equal ones of a list once, where they first appear."""
    there = iter(kept)
    sides = [None if side is None else next(there) for side in row["completions"]]
    places = list(range(len(sides)))
    if row["ranked"]:
        first = {tuple(ids): place for place, ids in reversed(list(enumerate(kept)))}
        places = sorted(first.values())
    list_scores = [row["list_scores"][place] for place in places] if row["ranked"] else []
    if row["ranked"] and len(set(list_scores)) == 1:
        return {"dropped": Dropped.LIST_TIED.value}
    return {
        "completions": [sides[place] for place in places],
        "completion_hashes": [hash_of(sides[place] or []) for place in places],
        "scores": [row["scores"][place] for place in places if place < len(row["scores"])],
        "list_scores": list_scores,
        "repeated": len(places) < len(sides),
    }


def _useless(row: Mapping[str, Any], prompt: list[int], completions: list[list[int]], with_eos: list[list[int]]) -> str:
    """Return why the ids teach nothing, or nothing."""
    if not prompt:
        return Dropped.PROMPT_EMPTY.value
    names = [LISTED] * len(completions) if row["ranked"] else ["chosen", "rejected", "gold"]
    for name, side in zip(names, completions):
        if not side:
            return f"{name if len(completions) > 1 else 'completion'} is empty"
    if not _all_equal(row, with_eos):
        return ""
    return Dropped.LIST_SAME_IDS.value if row["ranked"] else Dropped.SAME_IDS.value


def _all_equal(row: Mapping[str, Any], completions: list[list[int]]) -> bool:
    """Return whether no two of the judged completions differ; a gold one beside a pair is not judged."""
    judged = completions if row["ranked"] else completions[:2]
    return len(judged) > 1 and all(side == judged[0] for side in judged)


def _split(texts: _Rendered, ids: Mapping[str, list[int]]) -> _Ids:
    """Return the ids of prompt and completions.

    Where the template is inconsistent, whole conversations are tokenized and the prompt is what all of them
    and the prompt alone begin with.
    """
    prompt = ids[texts.prompt]
    if not texts.consistent:
        whole = [ids[text] for text in texts.completions]
        length = min(_common_length(prompt, side) for side in whole)
        return _Ids(prompt[:length], [side[length:] for side in whole], merged=False, mismatched=True)
    heads = [text[:HEAD] for text in texts.completions]
    merged = any(ids[texts.prompt + head] != prompt + ids[head] for head in heads)
    return _Ids(prompt, [ids[text] for text in texts.completions], merged, mismatched=False)


def _with_bos(ids: list[int], special: SpecialIds) -> list[int]:
    """Put BOS in front of plain text where the tokenizer does, never a second one."""
    if special.bos is None or not special.adds_bos or ids[:1] == [special.bos]:
        return ids
    return [special.bos, *ids]


def _with_eos(
    ids: list[int], eos: int | None, closing: frozenset[int | None], rule: Choice, spaces: Whitespace
) -> list[int]:
    """Append EOS where the rule wants it; `auto` only where nothing closes the turn but for whitespace."""
    if rule == "never" or eos is None or ids[-1:] == [eos]:
        return ids
    if rule == "auto":
        end = len(ids)
        while end and ids[end - 1] not in closing and spaces.holds(ids[end - 1]):
            end -= 1
        if end and ids[end - 1] in closing:
            return ids
    return [*ids, eos]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def hash_of(ids: Sequence[int]) -> int:
    """Return a signed 64-bit hash; ten million texts collide with a probability of 3e-6."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
