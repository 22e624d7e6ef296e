"""Who sees whom in one batch: segments, masks and indices, made once and used by every layer.

A row is cut into segments. Each tree's prompt with its first completion is one, which attends to itself; each
further completion is one, which attends to [prompt, itself]. Both are causal, aligned to the lower right: a query's
last key is its own row. A sliding window counts positions, which restart after the prompt, not rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.batching import Tree

Backend = Literal["sdpa", "varlen", "flex"]


@dataclass(frozen=True)
class GatheredSegments:
    """The segments as one variable-length call reads them. Queries stand in the order of the row."""

    keys: Tensor
    """(keys,) row index of every key: for each segment its prompt where that stands elsewhere, then its own rows."""
    query_starts: Tensor
    """(segments + 1,) int32, where each segment's queries begin."""
    key_starts: Tensor
    """(segments + 1,) int32, where each segment's keys begin."""
    most_queries: int
    most_keys: int


class AttentionPlan:
    """Segments and masks of one batch.

    Attributes:
        backend: what computes it.
        sizes: rows of each segment; one after another they are the whole row.
        shared: per segment (number of the segment that begins with its prompt, prompt length). The keys are the
            prompt (unless its length is 0: the segment then begins with it) followed by the segment's own rows.
        calls: how often a layer asked for attention; the start-up guard compares it with the layers.
    """

    def __init__(self, trees: tuple[Tree, ...], device: torch.device, *, backend: Backend = "sdpa") -> None:
        self.device = device
        self.backend: Backend = backend
        self.calls = 0
        self.trees = trees
        self.sizes: list[int] = []
        self.shared: list[tuple[int, int]] = []
        for tree in trees:
            (begin, count), *others = tree.branches
            root = len(self.sizes)
            self.sizes += [begin + count - tree.start, *(count for _, count in others if count)]
            self.shared += [(root, 0), *((root, tree.prompt) for _, count in others if count)]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._added: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        self._block_masks: dict[int | None, Any] = {}

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Boolean (queries, keys) mask, lower-right causal, within the window; True attends."""
        key = (queries, keys, window)
        if key not in self._masks:
            query_position = torch.arange(keys - queries, keys, device=self.device)[:, None]
            key_position = torch.arange(keys, device=self.device)[None, :]
            mask = key_position <= query_position
            if window is not None:
                mask &= key_position > query_position - window
            self._masks[key] = mask
        return self._masks[key]

    def added_mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the same mask as a term of the scores, 0 or -inf: what SDPA would make of it in every layer."""
        key = (queries, keys, window, dtype)
        if key not in self._added:
            hidden = ~self.mask(queries, keys, window)
            self._added[key] = torch.zeros(queries, keys, dtype=dtype, device=self.device).masked_fill_(
                hidden, float("-inf")
            )
        return self._added[key]

    @cached_property
    def read_rows(self) -> Tensor:
        """(read,) the rows that predict a token of a completion, each once; on the device."""
        rows = []
        for tree in self.trees:
            first = tree.start + tree.prompt
            rows.append(torch.arange(first - 1, first + sum(count for _, count in tree.branches)))
        return self._moved(torch.cat(rows))

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(self.sizes)

    @cached_property
    def gathered(self) -> GatheredSegments:
        """The segments for one variable-length call, on the device; made on the host and moved without waiting."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        rows, counts = [], []
        for number, (root, prompt) in enumerate(self.shared):
            rows.append(torch.arange(starts[root], starts[root] + prompt))
            rows.append(torch.arange(starts[number], starts[number + 1]))
            counts.append(prompt + self.sizes[number])
        key_starts = torch.tensor([0, *counts]).cumsum(0)
        return GatheredSegments(
            keys=self._moved(torch.cat(rows)),
            query_starts=self._moved(torch.tensor(starts).int()),
            key_starts=self._moved(key_starts.int()),
            most_queries=max(self.sizes),
            most_keys=max(counts),
        )

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's block mask for a window, or for none."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            tree, branch, position = self._places
            tokens = len(tree)

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                # -1 is the prompt, which its completions see; what else a query sees is of its own branch.
                related = (tree[query] == tree[key]) & ((branch[key] == -1) | (branch[key] == branch[query]))
                seen = related & (position[key] <= position[query])
                return seen if window is None else seen & (position[key] > position[query] - window)

            self._block_masks[window] = create_block_mask(
                sees, None, None, tokens, tokens, device=self.device, _compile=self.device.type == "cuda"
            )
        return self._block_masks[window]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens,) tree, branch (-1 in the prompt) and position of every row."""
        trees: list[int] = []
        branches: list[int] = []
        positions: list[int] = []
        for number, tree in enumerate(self.trees):
            counts = [tree.prompt, *(count for _, count in tree.branches)]
            trees += [number] * sum(counts)
            branches += [place - 1 for place, count in enumerate(counts) for _ in range(count)]
            positions += range(tree.prompt)
            positions += [tree.prompt + step for count in counts[1:] for step in range(count)]
        tree, branch, position = (self._moved(torch.tensor(each)) for each in (trees, branches, positions))
        return tree, branch, position

    def _moved(self, made: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return made.pin_memory().to(self.device, non_blocking=True)
        return made.to(self.device)
