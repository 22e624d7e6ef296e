"""Scoring what the cache does not hold: longest texts first, prompts shared, one shard every so many batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import Progress

from prefopt.batching import RaggedBatch, make_batch, needed_completions
from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.forward import Scorer, score
from prefopt.reference.cache import ReferenceCache, ScoredRows, text_key

BATCHES_PER_SHARD = 64
"""What a kill can lose, against the number of shards: about half a million tokens at the usual budget."""


@dataclass(frozen=True)
class BuildReport:
    """What a look at the cache found and what was scored for it."""

    hits: int
    """Completions that the cache already held."""
    misses: int
    """Completions scored now."""
    tokens: int
    """Completion tokens scored now."""
    computed_tokens: int
    """Tokens computed for them, prompts included."""
    seconds: float

    def __add__(self, other: BuildReport) -> BuildReport:
        mine, theirs = vars(self), vars(other)
        return BuildReport(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class _Missing:
    """A group's completions that no shard holds."""

    group: int
    completions: tuple[int, ...]
    size: int
    """Computed tokens."""


def dataset_keys(dataset: GroupDataset, *, rejected: bool = True) -> tuple[list[bytes], np.ndarray]:
    """Keys of every completion, group after group, and which of them a run needs.

    Returns:
        keys (completions,), needed (completions,) bool: those that a comparison names as chosen or, with `rejected`,
        as rejected; no loss reads the reference of gold completions.
    """
    keys: list[bytes] = []
    needed: list[bool] = []
    for number in range(len(dataset)):
        group = dataset[number]
        wanted = set(needed_completions(group.comparisons, rejected=rejected))
        for index, completion in enumerate(group.completions):
            keys.append(text_key(group.prompt, completion))
            needed.append(index in wanted)
    return keys, np.asarray(needed, dtype=bool)


def fill_cache(
    cache: ReferenceCache,
    dataset: GroupDataset,
    keys: Sequence[bytes],
    needed: np.ndarray,
    *,
    scorer: Callable[[], Scorer],
    precision: str,
    token_budget: int,
    progress: Progress | None = None,
) -> BuildReport:
    """Score and commit the completions that the cache lacks.

    Args:
        cache: where they go.
        dataset: the groups.
        keys: of every completion of the dataset, in order.
        needed: (completions,) which of them this run needs.
        scorer: gives the reference; called only when something is missing.
        precision: as in `train.precision`: the reference is computed in the regime of the policy.
        token_budget: computed tokens per batch.
        progress: where to show progress.

    Returns:
        What was found and what was scored. A build that is killed goes on from its last shard.
    """
    began = time.perf_counter()
    unique = {key: None for key, wanted in zip(keys, needed) if wanted}
    missing = _missing(cache, dataset, keys, needed)
    misses = sum(len(part.completions) for part in missing)
    total = sum(part.size for part in missing)
    tokens = 0
    task = None
    if progress is not None and misses:
        progress.console.print(f"scoring {misses:,} completions with the reference ({total:,} tokens to compute)")
        task = progress.add_task("reference log-probs", total=total)
    if missing:
        plan = _plan(missing, token_budget)
        batches = _batches(dataset, plan)
        collected = _Collected()
        for number, (batch, result) in enumerate(score(scorer(), batches, precision=precision), start=1):
            assert result.tokens is not None  # a scorer always has them
            collected.add(batch, result.sums.cpu().numpy(), result.tokens.float().cpu().numpy())
            tokens += int(batch.completion_lengths.sum())
            if task is not None and progress is not None:
                progress.advance(task, batch.tokens)
            if number % BATCHES_PER_SHARD == 0 or number == len(plan):
                cache.commit(collected.rows())
                collected = _Collected()
    if task is not None and progress is not None:
        progress.remove_task(task)
    return BuildReport(len(unique) - misses, misses, tokens, total, time.perf_counter() - began)


def _missing(cache: ReferenceCache, dataset: GroupDataset, keys: Sequence[bytes], needed: np.ndarray) -> list[_Missing]:
    """Group by group, the completions that are needed, not cached and not asked for earlier."""
    found, _, _ = cache.lookup(keys)
    absent = needed & ~found
    seen: set[bytes] = set()
    missing = []
    begin = 0
    for number in range(len(dataset)):
        lengths = dataset.completion_lengths(number)
        end = begin + len(lengths)
        fresh = [i for i in range(len(lengths)) if absent[begin + i] and keys[begin + i] not in seen]
        seen.update(keys[begin + i] for i in fresh)
        if fresh:
            size = int(dataset.prompt_lengths[number]) + sum(int(lengths[i]) - 1 for i in fresh)
            missing.append(_Missing(number, tuple(fresh), size))
        begin = end
    return missing


def _plan(missing: Sequence[_Missing], token_budget: int) -> list[list[_Missing]]:
    """Longest first, neighbours in length together, each batch filled to the budget."""
    plan: list[list[_Missing]] = []
    room = 0
    for part in sorted(missing, key=lambda part: -part.size):
        if part.size > room:
            plan.append([])
            room = token_budget
        plan[-1].append(part)
        room -= part.size
    return plan


def _batches(dataset: GroupDataset, plan: Sequence[Sequence[_Missing]]) -> Iterator[RaggedBatch]:
    for members in plan:
        groups = []
        for part in members:
            group = dataset[part.group]
            completions = tuple(group.completions[index] for index in part.completions)
            groups.append(PromptGroup(group.prompt, completions, ()))
        yield make_batch(groups)


class _Collected:
    """Rows since the last shard."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.sums: list[np.ndarray] = []
        self.token_logps: list[np.ndarray] = []

    def add(self, batch: RaggedBatch, sums: np.ndarray, tokens: np.ndarray) -> None:
        lengths = batch.completion_lengths.cpu().numpy()
        ends = np.cumsum(lengths)
        self.token_logps += np.split(tokens, ends[:-1])
        self.sums.append(sums)
        self.keys += _batch_keys(batch)

    def rows(self) -> ScoredRows:
        lengths = np.array([len(values) for values in self.token_logps])
        return ScoredRows(self.keys, np.concatenate(self.sums), lengths, self.token_logps)


def _batch_keys(batch: RaggedBatch) -> list[bytes]:
    """Keys of the batch's completions, from the very ids that were scored."""
    ids, targets = batch.input_ids.cpu().numpy(), batch.targets.cpu().numpy()
    ends = np.cumsum(batch.completion_lengths.cpu().numpy())
    completions = iter(np.split(targets, ends[:-1]))
    return [
        text_key(ids[tree.start : tree.start + tree.prompt], next(completions))
        for tree in batch.trees
        for _ in tree.branches
    ]
