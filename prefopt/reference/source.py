"""What the loop asks: the reference's log-probs of a batch, from the cache or from a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from prefopt.batching import RaggedBatch
from prefopt.data.groups import GroupDataset
from prefopt.forward import CompletionLogProbs, Scorer, autocast
from prefopt.reference.cache import ReferenceCache


class CachedLogps:
    """Log-probs of one dataset, read from the cache once and held as flat arrays."""

    def __init__(
        self, cache: ReferenceCache, dataset: GroupDataset, keys: Sequence[bytes], *, tokens: bool = False
    ) -> None:
        _, self._sums, self._lengths = cache.lookup(keys)
        counts = np.diff(dataset.layout.completion_offsets)
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self._tokens = cache.token_logps(keys) if tokens else None

    def __call__(self, batch: RaggedBatch) -> CompletionLogProbs:
        """Return the cached log-probs of the batch's completions; per token where they were asked for."""
        device = batch.input_ids.device
        places = [int(self._starts[group]) + completion for group, completion in batch.keys]
        sums = torch.from_numpy(self._sums[places]).to(device, non_blocking=True)
        tokens = None
        if self._tokens is not None:
            exact = np.concatenate([self._exact_sum(place) for place in places])
            tokens = torch.from_numpy(exact).to(device, non_blocking=True)
        return CompletionLogProbs(sums, batch.completion_lengths, tokens)

    def _exact_sum(self, place: int) -> np.ndarray:
        """Token log-probs of one completion; what 16 bits rounded off is spread evenly, so that their sum is right."""
        assert self._tokens is not None
        tokens = self._tokens[place].astype(np.float32)
        return tokens + (self._sums[place] - tokens.sum(dtype=np.float64)).astype(np.float32) / max(len(tokens), 1)


class OnlineLogps:
    """Log-probs computed by a reference model that stays in memory."""

    def __init__(self, scorer: Scorer, *, precision: str, distribution: bool = False) -> None:
        self.scorer = scorer
        self.precision = precision
        self.distribution = distribution
        """Whether the whole next-token distributions are given too."""
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, batch: RaggedBatch) -> CompletionLogProbs:
        """Return the log-probs under the reference, in eval mode."""
        self.tokens += batch.targets.numel()
        with self.reference() as scorer, autocast(batch.input_ids.device, self.precision):
            return scorer(batch, distribution=self.distribution)

    @contextmanager
    def reference(self) -> Iterator[Scorer]:
        """Give the scorer as the reference: in eval mode."""
        was_training = self.scorer.training
        self.scorer.eval()
        try:
            yield self.scorer
        finally:
            self.scorer.train(was_training)
