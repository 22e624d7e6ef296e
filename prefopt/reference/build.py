"""Scoring what the cache does not hold: planned once, claimed batch by batch, committed in groups of whole batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size

from prefopt.batching import RaggedBatch, make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import ModelError, Problem
from prefopt.forward import Scorer, score
from prefopt.memory import collect_and_return_memory
from prefopt.reference.build_plan import (
    BuildPlan,
    Texts,
    Wanted,
    agreed_plan,
    distinct_texts,
    planned_groups,
    remove_stale_plans,
)
from prefopt.reference.build_progress import BuildProgress
from prefopt.reference.cache import ReferenceCache, ScoredRows
from prefopt.reference.claims import Claims, Worker
from prefopt.reference.keys import Keys

COMMIT_SECONDS = 20.0
"""Work between two commits: what a kill loses, with the batch that was being computed."""
COMMIT_TOKENS = 4_000_000
"""Completion tokens between two commits at most: 8 MB of 16-bit log-probs in memory."""
WAIT_SECONDS = 0.5
"""Between two looks at what other processes have committed."""


@dataclass(frozen=True)
class BuildReport:
    """What a look at the cache found and what was scored for it."""

    hits: int
    """Completions that the cache already held."""
    misses: int
    """Completions that it lacked and holds now."""
    tokens: int
    """Completion tokens of those."""
    computed_tokens: int
    """Tokens computed for them, prompts included."""
    seconds: float
    own_tokens: int = 0
    """Tokens computed by this process; fewer than `computed_tokens` where others took part."""


def fill_cache(
    cache: ReferenceCache,
    wanted: Sequence[Wanted],
    *,
    scorer: Callable[[], Scorer],
    precision: str,
    token_budget: int,
    worker: Worker | None = None,
    progress: BuildProgress | None = None,
) -> BuildReport:
    """Score and commit the completions that the cache lacks, alone or with other processes.

    Args:
        cache: where they go.
        wanted: what a run asks of its datasets; a text that several of them hold is scored once.
        scorer: gives the reference; called only when something is missing.
        precision: as in `train.precision`: the reference is computed in the regime of the policy.
        token_budget: computed tokens per batch.
        worker: which of the processes of one launch this is; processes that know nothing of each other share the
            work all the same.
        progress: where to show progress.

    Returns:
        What was found and what was scored, when everything is in the cache. A build that is killed goes on from its
        last commit, with the same batches.
    """
    began = time.perf_counter()
    if not wanted:
        return BuildReport(0, 0, 0, 0, 0.0)
    texts = distinct_texts(wanted)
    missing = _missing(cache, texts)
    misses, computed, own = int(missing.sum()), 0, 0
    tokens = int(texts.tokens[missing].sum())
    if misses:
        with cache.said_plainly():
            remove_stale_plans(cache.folder)
    while missing.any():  # a second time only where a plan of earlier days knew less than is missing now
        shared = scorer().layout == "shared"
        with cache.said_plainly():
            plan = agreed_plan(cache.folder, texts, missing, token_budget=token_budget, shared=shared)
        build = _Build(cache, wanted, texts, plan, scorer(), precision, worker or Worker(), progress)
        build.run()
        computed, own = computed + build.planned, own + build.own
        missing = _missing(cache, texts)
    return BuildReport(len(texts) - misses, misses, tokens, computed, time.perf_counter() - began, own)


def _missing(cache: ReferenceCache, texts: Texts) -> np.ndarray:
    """(texts,) bool, what the cache lacks now."""
    cache.refresh()
    return ~cache.lookup(texts.keys)[0]


class _Build:
    """One process's part in one plan."""

    def __init__(
        self,
        cache: ReferenceCache,
        wanted: Sequence[Wanted],
        texts: Texts,
        plan: BuildPlan,
        scorer: Scorer,
        precision: str,
        worker: Worker,
        progress: BuildProgress | None,
    ) -> None:
        self.cache, self.wanted, self.texts, self.plan = cache, wanted, texts, plan
        self.scorer, self.precision, self.worker, self.progress = scorer, precision, worker, progress
        self.claims = Claims(plan.claims)
        preferred = worker.preferred(len(plan))
        committed = self._committed(preferred)
        self.open = [batch for batch in preferred if batch not in committed]
        """Batches that are not known to be committed, in the order in which this process would take them."""
        self.planned = int(plan.sizes[self.open].sum())
        self.own = 0
        self.seconds = 0.0
        """Time in which this process computed its `own` tokens."""
        self.limit: int | None = None
        """Computed tokens that fit the memory, once a batch did not."""

    def run(self) -> None:
        """Score until everything in the plan is committed, by whichever process."""
        if self.open and self.progress is not None:
            completions = sum(len(self.plan.texts(batch)) for batch in self.open)
            self.progress.start(completions=completions, tokens=self.planned)
        try:
            while self.open:
                taken = self._take()
                if taken:
                    self._score_and_commit(taken)
                else:
                    self._wait()
        finally:
            self.claims.release()
        self.plan.remove()

    def _take(self) -> list[int]:
        """Claim the next batches, about one commit's worth, that nobody has committed or is at work on."""
        free = self.claims.free(self.open)
        wish = self._prefix(free, self._appetite(free)) if free else []
        self.cache.refresh()
        committed = self._committed(wish)
        self._close(committed, own=False)
        return self.claims.take([batch for batch in wish if batch not in committed])

    def _appetite(self, free: Sequence[int]) -> float:
        """Computed tokens to take at once: a commit's worth, and towards the end a fair share of what is left."""
        appetite = COMMIT_SECONDS * self.own / self.seconds if self.seconds else 0.0
        company = max(self.worker.processes - 1, self.claims.others())
        if company:
            appetite = min(appetite, float(self.plan.sizes[list(free)].sum()) / (2 * (company + 1)))
        return appetite

    def _prefix(self, batches: Sequence[int], tokens: float) -> list[int]:
        """Return the first batches, up to so many computed tokens; at least one."""
        sizes = np.cumsum(self.plan.sizes[list(batches)])
        return list(batches[: max(1, int(np.searchsorted(sizes, tokens, side="right")))])

    def _committed(self, batches: Sequence[int]) -> set[int]:
        """Return the batches whose texts are all in the cache; one that is there in part is computed whole."""
        if not batches:
            return set()
        members = [self.plan.texts(batch) for batch in batches]
        held = self.cache.lookup(self.texts.keys.take(np.concatenate(members)))[0]
        starts = np.cumsum([0, *map(len, members[:-1])])
        return {batch for batch, all_held in zip(batches, np.logical_and.reduceat(held, starts)) if all_held}

    def _close(self, committed: set[int], *, own: bool) -> None:
        self.open = [batch for batch in self.open if batch not in committed]
        if self.progress is not None and committed and not own:
            self.progress.advance(int(self.plan.sizes[list(committed)].sum()), own=False)

    def _wait(self) -> None:
        """Wait for what other processes are computing; a dead one's batches are free at the next look."""
        self.cache.refresh()
        self._close(self._committed(self.open), own=False)
        if self.open and not self.claims.free(self.open):
            time.sleep(WAIT_SECONDS)

    def _score_and_commit(self, batches: Sequence[int]) -> None:
        """Score batches one after the other; commit whole ones, at the end and as often as a kill may cost."""
        collected, done, last = _Collected(), set(), time.perf_counter()
        for batch in batches:
            began = time.perf_counter()
            numbers = self.plan.texts(batch)
            for scored, tokens, sums in self._scored(list(planned_groups(self.wanted, self.texts, numbers))):
                collected.add(scored, sums, tokens)
            collected.keys.append(self.texts.keys.take(numbers).buffer)
            done.add(batch)
            size = int(self.plan.sizes[batch])
            self.own, self.seconds = self.own + size, self.seconds + time.perf_counter() - began
            if self.progress is not None:
                self.progress.advance(size)
            if batch == batches[-1] or time.perf_counter() - last > COMMIT_SECONDS or collected.tokens > COMMIT_TOKENS:
                self.cache.commit(collected.rows())
                self._close(done, own=True)
                collected, done, last = _Collected(), set(), time.perf_counter()

    def _scored(self, groups: list[PromptGroup]) -> Iterator[tuple[RaggedBatch, np.ndarray, np.ndarray]]:
        """Yield (batch, token log-probs, sums) of the groups, in as many batches as the memory asks for."""
        parts = [groups]
        while parts:
            part = parts.pop(0)
            batch = make_batch(part)
            if self.limit is not None and batch.tokens > self.limit and len(batch.completion_lengths) > 1:
                parts[:0] = _halves(part)
                continue
            try:
                scored = next(iter(score(self.scorer, [batch], precision=self.precision)))[1]
                assert scored.tokens is not None  # a scorer always has them
                result = batch, scored.tokens.float().cpu().numpy(), scored.sums.cpu().numpy()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                refused = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            else:
                yield result
                continue
            # Outside of the handler, whose traceback holds the tensors of the failed batch.
            collect_and_return_memory()
            self._halve(batch, refused)
            parts[:0] = _halves(part)

    def _halve(self, batch: RaggedBatch, refused: str) -> None:
        """Lower the limit to half of a batch that did not fit, and say so.

        Raises:
            ModelError: it was a single text.
        """
        if len(batch.completion_lengths) == 1:
            raise ModelError(
                Problem("reference", f"memory for one text of {batch.tokens:,} tokens", refused,
                        "lower data.max_length, or quantize the reference (reference.quantization); what was scored "
                        "so far is committed, and the same command goes on from there")
            )  # fmt: skip
        self.limit = batch.tokens // 2
        if self.progress is not None:
            self.progress.say(
                f"out of memory with {batch.tokens:,} tokens in a batch; going on with at most {self.limit:,} "
                f"(reference.token_budget={self.limit} says so from the start)"
            )


def _halves(groups: Sequence[PromptGroup]) -> list[list[PromptGroup]]:
    """Split a batch in two between its prompts, or a single prompt between its completions."""
    if len(groups) > 1:
        middle = len(groups) // 2
        return [list(groups[:middle]), list(groups[middle:])]
    group = groups[0]
    middle = len(group.completions) // 2
    return [[PromptGroup(group.prompt, part, ())] for part in (group.completions[:middle], group.completions[middle:])]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class _Collected:
    """Rows since the last commit."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        """Of one batch each, one after the other in one string."""
        self.sums: list[np.ndarray] = []
        self.token_logps: list[np.ndarray] = []
        self.tokens = 0

    def add(self, batch: RaggedBatch, sums: np.ndarray, tokens: np.ndarray) -> None:
        ends = np.cumsum(batch.completion_lengths.numpy())
        self.token_logps += np.split(tokens, ends[:-1])
        self.sums.append(sums)
        self.tokens += len(tokens)

    def rows(self) -> ScoredRows:
        lengths = np.array([len(values) for values in self.token_logps])
        return ScoredRows(list(Keys(b"".join(self.keys))), np.concatenate(self.sums), lengths, self.token_logps)
