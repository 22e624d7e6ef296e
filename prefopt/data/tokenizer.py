"""What is needed of a tokenizer: special ids, encoding, and a hash of everything that changes ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.settings import Choice
from prefopt.errors import ModelError, Problem


@dataclass(frozen=True)
class SpecialIds:
    """What is read from a tokenizer once."""

    bos: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS in front of plain text."""
    eos: int | None
    closing: frozenset[int]
    """Special tokens with which a chat template may close a turn; EOS is one."""


def special_ids(tokenizer: Any, eos: Choice) -> SpecialIds:
    """Read BOS, EOS and the tokens that close a turn.

    Raises:
        ModelError: EOS is asked for and the tokenizer has none.
    """
    if tokenizer.eos_token_id is None and eos != "never":
        raise ModelError(
            Problem(
                "tokenizer",
                "an EOS token, which ends every completion",
                f"{tokenizer.name_or_path or type(tokenizer).__name__} has none",
                "set eos_token in the tokenizer's tokenizer_config.json, or data.eos: never",
            )
        )
    with_special = encode(tokenizer, ["a"], add_special_tokens=True)["a"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and with_special[:1] == [bos]
    other = {bos, tokenizer.pad_token_id, tokenizer.unk_token_id}
    closing = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - other
    if tokenizer.eos_token_id is not None:
        closing.add(tokenizer.eos_token_id)
    return SpecialIds(bos, adds_bos, tokenizer.eos_token_id, frozenset(closing))


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that can change ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # left behind by earlier calls, not used here
    else:
        state = {"vocabulary": tokenizer.get_vocab(), "settings": str(sorted(tokenizer.init_kwargs.items()))}
    state = {
        "class": type(tokenizer).__name__,
        "backend": state,
        "special": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


class Whitespace:
    """Which token ids are whitespace only; decoded once each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def holds(self, token: int) -> bool:
        """Return whether a token decodes to whitespace."""
        if token not in self._known:
            self._known[token] = not self._tokenizer.decode([token]).strip()
        return self._known[token]


def encode(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[int]]:
    """Return the ids of each text; each distinct text is tokenized once."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(
        distinct,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return dict(zip(distinct, encoded["input_ids"]))
