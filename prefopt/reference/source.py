"""What the loop asks: the reference's log-probs of a batch, from the cache or from a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prefopt.batching import RaggedBatch
from prefopt.data.groups import GroupDataset
from prefopt.forward import Scorer, autocast
from prefopt.reference.cache import ReferenceCache


class ReferenceLogps(Protocol):
    """Summed reference log-probs of a batch's completions."""

    def __call__(self, batch: RaggedBatch) -> Tensor:
        """Return (completions,) fp32, nats, on the batch's device."""
        ...


class CachedLogps:
    """Log-probs of one dataset, read from the cache once and held as one flat array."""

    def __init__(self, cache: ReferenceCache, dataset: GroupDataset, keys: list[bytes]) -> None:
        _, self._sums, _ = cache.lookup(keys)
        counts = [len(dataset.completion_lengths(number)) for number in range(len(dataset))]
        self._starts = np.concatenate(([0], np.cumsum(counts)))

    def __call__(self, batch: RaggedBatch) -> Tensor:
        """Return the cached sums of the batch's completions."""
        places = [int(self._starts[group]) + completion for group, completion in batch.keys]
        return torch.from_numpy(self._sums[places]).to(batch.input_ids.device)


class OnlineLogps:
    """Log-probs computed by a reference model that stays in memory."""

    def __init__(self, scorer: Scorer, *, precision: str, adapter_off: bool = False) -> None:
        self.scorer = scorer
        self.precision = precision
        self.adapter_off = adapter_off
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, batch: RaggedBatch) -> Tensor:
        """Return the sums under the reference, in eval mode."""
        self.tokens += int(batch.completion_lengths.sum())
        with self.reference() as scorer, autocast(batch.input_ids.device, self.precision):
            return scorer(batch).sums

    @contextmanager
    def reference(self) -> Iterator[Scorer]:
        """Give the scorer as the reference: in eval mode, its adapter switched off where it is the policy's own."""
        was_training = self.scorer.training
        self.scorer.eval()
        off = self.scorer.model.disable_adapter() if self.adapter_off else nullcontext()
        try:
            with off:
                yield self.scorer
        finally:
            self.scorer.train(was_training)
