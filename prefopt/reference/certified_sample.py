"""Comparisons of which two log-probs are known: the one the cache holds, and the one of full precision."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt.batching import make_batch
from prefopt.data.groups import Comparison, GroupDataset, PromptGroup
from prefopt.forward import Scorer, score
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.keys import Keys, dataset_keys

SAMPLE = 128
"""Comparisons of a certificate: 128 prompts tell the mean size of an error to about a tenth of it."""


@dataclass(frozen=True, eq=False)
class CertifiedSample:
    """Completions with both log-probs, in nats, and the comparisons between them."""

    prompts: np.ndarray
    """(completions,) int, number of the prompt each continues."""
    lengths: np.ndarray
    """(completions,) int, scored tokens."""
    full: np.ndarray
    """(completions,) fp64, summed log-probs at full precision."""
    cached: np.ndarray
    """(completions,) fp64, summed log-probs that the cache holds."""
    token_errors: np.ndarray
    """(tokens,) fp16, cached minus full, completion after completion."""
    comparisons: tuple[Comparison, ...]
    """Sides are numbers of completions."""

    @property
    def completion_errors(self) -> np.ndarray:
        """(completions,) cached minus full, nats."""
        return self.cached - self.full

    @property
    def pairs(self) -> np.ndarray:
        """(pairs, 2) chosen and rejected completion of the comparisons that have both."""
        both = [(one.chosen, one.rejected) for one in self.comparisons if None not in (one.chosen, one.rejected)]
        return np.array(both, dtype=np.int64).reshape(-1, 2)

    @property
    def pair_prompts(self) -> np.ndarray:
        """(pairs,) number of the prompt of each."""
        return self.prompts[self.pairs[:, 0]]

    def margins(self, logps: np.ndarray) -> np.ndarray:
        """Return (pairs,) chosen minus rejected of (completions,) numbers."""
        chosen, rejected = self.pairs.T
        return logps[chosen] - logps[rejected]

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as JSON holds it."""
        return {
            "prompts": self.prompts.tolist(),
            "lengths": self.lengths.tolist(),
            "full": self.full.tolist(),
            "cached": self.cached.tolist(),
            "token_errors_fp16_base64": base64.b64encode(self.token_errors.astype("<f2").tobytes()).decode(),
            "comparisons": [asdict(one) for one in self.comparisons],
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> CertifiedSample:
        """Read what `as_dict` gave; raises KeyError, TypeError or ValueError for anything else."""
        sample = cls(
            prompts=np.asarray(stored["prompts"], dtype=np.int64),
            lengths=np.asarray(stored["lengths"], dtype=np.int64),
            full=np.asarray(stored["full"], dtype=np.float64),
            cached=np.asarray(stored["cached"], dtype=np.float64),
            token_errors=np.frombuffer(base64.b64decode(stored["token_errors_fp16_base64"]), dtype="<f2"),
            comparisons=tuple(_comparison(one) for one in stored["comparisons"]),
        )
        count = len(sample.prompts)
        if not count == len(sample.lengths) == len(sample.full) == len(sample.cached):
            raise ValueError("columns of different lengths")
        if sample.lengths.sum() != len(sample.token_errors):
            raise ValueError("tokens are missing")
        return sample


def _comparison(stored: dict[str, Any]) -> Comparison:
    """Read a comparison; JSON made lists of its tuples."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return Comparison(**fields)


def certifiable(dataset: GroupDataset) -> int:
    """Comparisons that `draw` would take of a dataset."""
    return min(SAMPLE, len(dataset.layout.chosen))


def draw(dataset: GroupDataset, count: int = SAMPLE) -> list[tuple[int, list[int]]]:
    """Choose comparisons by content alone: neither the order of the rows nor their number before them matters.

    Every prompt gives one comparison before any gives a second; within a round the smallest hashes come first.

    Returns:
        (group, its comparisons) of every group that is in the sample.
    """
    layout = dataset.layout
    groups = np.repeat(np.arange(len(dataset)), np.diff(layout.comparison_offsets))
    prompts = layout.prompt_hashes[groups]
    first = layout.completion_offsets[:-1][groups]
    sides = [
        np.where(side >= 0, layout.completion_hashes[first + np.maximum(side, 0)], 0)
        for side in (layout.chosen, layout.rejected)
    ]
    order = np.lexsort((sides[1], sides[0], prompts))
    ranked = prompts[order]
    starts = np.r_[True, ranked[1:] != ranked[:-1]]
    places = np.arange(len(ranked))
    rounds = places - np.maximum.accumulate(np.where(starts, places, 0))
    taken = order[np.argsort(rounds, kind="stable")[:count]]
    within = taken - layout.comparison_offsets[:-1][groups[taken]]
    chosen: dict[int, list[int]] = {}
    for group, number in zip(groups[taken].tolist(), within.tolist()):
        chosen.setdefault(group, []).append(number)
    return list(chosen.items())


def cached_part(dataset: GroupDataset, cache: ReferenceCache, count: int = SAMPLE) -> _CachedPart:
    """Return the drawn comparisons as far as the cache holds their completions."""
    drawn = draw(dataset, count)
    few = dataset.select([group for group, _ in drawn])
    keys, _ = dataset_keys(few)
    found, sums, _ = cache.lookup(keys)
    groups, comparisons, kept = [], list[Comparison](), list[int]()
    prompts, numbers = list[int](), dict[bytes, int]()
    for number, (_, wanted) in enumerate(drawn):
        group, begin = few[number], int(few.layout.completion_offsets[number])
        fresh: list[int] = []
        for one in (group.comparisons[index] for index in wanted):
            sides = [side if side is not None and found[begin + side] else None for side in (one.chosen, one.rejected)]
            if sides == [None, None]:
                continue
            for side in sides:
                if side is not None and keys[begin + side] not in numbers:
                    numbers[keys[begin + side]] = len(numbers)
                    fresh.append(side)
                    kept.append(begin + side)
                    prompts.append(int(few.layout.prompt_hashes[number]))
            places = [None if side is None else numbers[keys[begin + side]] for side in sides]
            comparisons.append(_renumbered(one, places))
        if fresh:
            groups.append(PromptGroup(group.prompt, tuple(group.completions[index] for index in fresh), ()))
    places_kept = np.asarray(kept, dtype=np.int64)
    _, numbered = np.unique(prompts, return_inverse=True)
    return _CachedPart(groups, keys.take(places_kept), sums[places_kept], numbered, tuple(comparisons))


def _renumbered(one: Comparison, places: Sequence[int | None]) -> Comparison:
    return Comparison(**{**asdict(one), "chosen": places[0], "rejected": places[1], "gold": None})


@dataclass(frozen=True, eq=False)
class _CachedPart:
    """The drawn comparisons and what the cache says of them."""

    groups: list[PromptGroup]
    """Their completions one after another are the sample's."""
    keys: Keys
    sums: np.ndarray
    prompts: np.ndarray
    comparisons: tuple[Comparison, ...]


def score_again(
    part: _CachedPart, cache: ReferenceCache, scorer: Scorer, *, precision: str, token_budget: int
) -> CertifiedSample:
    """Score the drawn completions with a model and put the cache's log-probs beside."""
    sums, tokens = list[np.ndarray](), list[np.ndarray]()
    batches = (make_batch(groups) for groups in _to_budget(part.groups, token_budget))
    for _, result in score(scorer, batches, precision=precision):
        assert result.tokens is not None  # a scorer always has them
        sums.append(result.sums.double().cpu().numpy())
        tokens += np.split(result.tokens.double().cpu().numpy(), np.cumsum(result.lengths.cpu().numpy())[:-1])
    cached_tokens = cache.token_logps(part.keys)
    errors = [held.astype(np.float64) - again for held, again in zip(cached_tokens, tokens)]
    return CertifiedSample(
        prompts=part.prompts,
        lengths=np.array([len(one) for one in tokens], dtype=np.int64),
        full=np.concatenate(sums),
        cached=part.sums.astype(np.float64),
        token_errors=np.concatenate(errors).astype(np.float16),
        comparisons=part.comparisons,
    )


def _to_budget(groups: Sequence[PromptGroup], token_budget: int) -> Iterator[list[PromptGroup]]:
    pending: list[PromptGroup] = []
    size = 0
    for group in groups:
        tokens = len(group.prompt) + sum(len(completion) - 1 for completion in group.completions)
        if pending and size + tokens > token_budget:
            yield pending
            pending, size = [], 0
        pending.append(group)
        size += tokens
    if pending:
        yield pending
