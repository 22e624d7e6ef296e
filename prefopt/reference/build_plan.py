"""Which missing texts are scored together: planned once, remembered until the last of them is committed.

A log-prob depends in its last bits on what is computed beside it. So the batches of a build are a function of the set
of texts that were missing when it began, and that set is kept beside the shards: a killed build that goes on, and
several processes that share one, run the very same batches and end with the same bits.

    .plan-<digest>.json    one bit per text asked for: whether it was missing; the digest is of what is asked

Stale plans do no harm, for what is committed since is never scored again; they are removed after a week.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.reference.keys import Keys
from prefopt.reference.publishing import discard, publish
from prefopt.reference.shards import HASH_BYTES

PLAN_FORMAT = 1
"""Raised when the same missing texts would be batched otherwise."""
STALE_AFTER = 7 * 24 * 3600.0
"""Seconds without a claim after which a plan is removed."""


@dataclass(frozen=True)
class Wanted:
    """What a run asks of one dataset."""

    dataset: GroupDataset
    keys: Keys
    """Of every completion, in order."""
    needed: np.ndarray
    """(completions,) bool."""


@dataclass(frozen=True)
class Texts:
    """Every different text that is asked for, in the order of their keys: texts of one prompt are neighbours."""

    keys: Keys
    dataset: np.ndarray
    """(texts,) number of the dataset that holds it."""
    completion: np.ndarray
    """(texts,) number of the completion in that dataset."""
    group: np.ndarray
    """(texts,) number of its group."""
    prompt_tokens: np.ndarray
    """(texts,)"""
    tokens: np.ndarray
    """(texts,) of the completion."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def prompts(self) -> np.ndarray:
        """(texts,) number of the text's prompt, told apart by its token ids."""
        hashes = self.keys.hashes[:, :HASH_BYTES]
        changes = (hashes[1:] != hashes[:-1]).any(axis=1)
        return np.concatenate(([0], np.cumsum(changes)))[: len(self)]


def distinct_texts(wanted: Sequence[Wanted]) -> Texts:
    """Collect what is needed of all datasets of a run, each text once whatever its rows and datasets."""
    places = [np.flatnonzero(one.needed) for one in wanted]
    keys = Keys(b"".join(one.keys.take(place).buffer for one, place in zip(wanted, places)))
    _, first = np.unique(keys.sortable, return_index=True)
    columns = [_columns(number, one.dataset, place) for number, (one, place) in enumerate(zip(wanted, places))]
    return Texts(keys.take(first), *(np.concatenate(column)[first] for column in zip(*columns)))


def _columns(number: int, dataset: GroupDataset, place: np.ndarray) -> tuple[np.ndarray, ...]:
    layout = dataset.layout
    group = np.searchsorted(layout.completion_offsets, place, side="right") - 1
    lengths = layout.completion_lengths[place].astype(np.int64)
    return np.full(len(place), number), place, group, layout.prompt_lengths[group].astype(np.int64), lengths


@dataclass(frozen=True)
class BuildPlan:
    """The batches of one build."""

    file: Path
    order: np.ndarray
    """(missing,) numbers of texts, batch after batch; neighbours with one prompt share it."""
    offsets: np.ndarray
    """(batches + 1,) where each batch begins in `order`."""
    sizes: np.ndarray
    """(batches,) computed tokens."""

    def __len__(self) -> int:
        return len(self.sizes)

    def texts(self, batch: int) -> np.ndarray:
        """Numbers of a batch's texts."""
        return self.order[self.offsets[batch] : self.offsets[batch + 1]]

    @property
    def claims(self) -> Path:
        """Where processes say which batches they take."""
        return self.file.with_suffix(".claims")

    def remove(self) -> None:
        """Forget a plan of which everything is committed."""
        discard(self.file)
        discard(self.claims)


def agreed_plan(folder: Path, texts: Texts, missing: np.ndarray, *, token_budget: int, shared: bool) -> BuildPlan:
    """Plan the missing texts, or return the plan that an earlier or another process made of the same texts.

    Args:
        folder: of the cache.
        texts: everything that is asked for.
        missing: (texts,) bool, what the cache lacks.
        token_budget: computed tokens per batch.
        shared: whether texts of one prompt compute it once.
    """
    asked = hashlib.blake2b(f"{PLAN_FORMAT} {token_budget} {shared} ".encode(), digest_size=12)
    asked.update(texts.keys.buffer)
    file = folder / f".plan-{asked.hexdigest()}.json"
    for _ in range(2):
        was_missing = _read(file, len(texts))
        if was_missing is not None:
            break
        discard(file)  # damaged
        publish(file, _content(missing))  # the first writer wins: what stands there is read again
    return make_plan(file, texts, missing if was_missing is None else was_missing, token_budget, shared=shared)


def _content(missing: np.ndarray) -> bytes:
    bits = base64.b64encode(zlib.compress(np.packbits(missing).tobytes())).decode()
    return json.dumps({"texts": len(missing), "missing": int(missing.sum()), "bits": bits}).encode()


def _read(file: Path, texts: int) -> np.ndarray | None:
    """Read which texts were missing; None where there is no such plan or it is not readable as one."""
    try:
        content = json.loads(file.read_bytes())
        bits = np.frombuffer(zlib.decompress(base64.b64decode(content["bits"])), dtype=np.uint8)
    except (OSError, ValueError, KeyError, TypeError, binascii.Error, zlib.error):
        return None
    fits = content.get("texts") == texts and len(bits) == -(-texts // 8)
    return np.unpackbits(bits, count=texts).astype(bool) if fits else None


def remove_stale_plans(folder: Path) -> None:
    """Remove plans to which nobody came back for a week."""
    for file in folder.glob(".plan-*.json"):
        claims = file.with_suffix(".claims")
        touched = [path.stat().st_mtime for path in (file, claims) if path.exists()]
        if touched and time.time() - max(touched) > STALE_AFTER:
            discard(file)
            discard(claims)


def make_plan(file: Path, texts: Texts, missing: np.ndarray, token_budget: int, *, shared: bool) -> BuildPlan:
    """Batch texts: longest first, near-equal lengths together, a prompt once for all its completions.

    A prompt with more completions than the budget holds stands in several batches; a single text beyond the budget
    has a batch of its own.
    """
    number = np.flatnonzero(missing)
    number = number[np.lexsort((number, -texts.tokens[number], texts.prompts[number]))]
    unit = _units(texts, number, token_budget, shared=shared)
    begins = np.flatnonzero(np.diff(unit, prepend=-1))
    longest = (texts.prompt_tokens + texts.tokens)[number[begins]]
    sizes = texts.prompt_tokens[number[begins]] + np.add.reduceat(texts.tokens[number] - 1, begins)
    ranked = np.lexsort((begins, -sizes, -longest))
    batch = _batches(sizes[ranked], longest[ranked], token_budget, shared=shared)
    counts = np.diff(np.append(begins, len(number)))[ranked]
    shift = np.repeat(begins[ranked] - np.concatenate(([0], np.cumsum(counts[:-1]))), counts)
    order = number[np.arange(len(number)) + shift]
    ends = np.cumsum(np.bincount(batch, weights=counts)).astype(np.int64)
    computed = np.bincount(batch, weights=sizes[ranked]).astype(np.int64)
    return BuildPlan(file, order, np.concatenate(([0], ends)), computed)


def _units(texts: Texts, number: np.ndarray, token_budget: int, *, shared: bool) -> np.ndarray:
    """(missing,) which texts are computed as one tree: those of one prompt, as many as the budget holds."""
    if not shared:
        return np.arange(len(number))
    units, unit, last, size = [], -1, -1, 0
    rows = zip(texts.prompts[number].tolist(), texts.prompt_tokens[number].tolist(), texts.tokens[number].tolist())
    for prompt, prompt_tokens, tokens in rows:
        if prompt != last or size + tokens - 1 > token_budget:
            unit, last, size = unit + 1, prompt, prompt_tokens
        size += tokens - 1
        units.append(unit)
    return np.asarray(units, dtype=np.int64)


def _batches(sizes: np.ndarray, longest: np.ndarray, token_budget: int, *, shared: bool) -> np.ndarray:
    """(units,) the batch of each; where prompts are not shared, every row of a batch is padded to its first one."""
    numbers, batch, used, row = [], -1, 0, 0
    for size, length in zip(sizes.tolist(), longest.tolist()):
        cost = size if shared or used == 0 else row
        if batch < 0 or used + cost > token_budget:
            batch, used, row = batch + 1, 0, length
            cost = size if shared else row
        used += cost
        numbers.append(batch)
    return np.asarray(numbers, dtype=np.int64)


def planned_groups(wanted: Sequence[Wanted], texts: Texts, numbers: np.ndarray) -> Iterator[PromptGroup]:
    """Read the texts of one batch, as a group without comparisons per prompt."""
    read: dict[tuple[int, int], PromptGroup] = {}
    prompts = texts.prompts[numbers]
    for members in np.split(numbers, np.flatnonzero(np.diff(prompts)) + 1):
        completions = []
        for text in members.tolist():
            place = int(texts.dataset[text]), int(texts.group[text])
            if place not in read:
                read[place] = wanted[place[0]].dataset[place[1]]
            first = wanted[place[0]].dataset.layout.completion_offsets[place[1]]
            completions.append(read[place].completions[int(texts.completion[text] - first)])
        yield PromptGroup(read[place].prompt, tuple(completions), ())
