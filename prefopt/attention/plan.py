"""Who sees whom in one batch: segments, masks and indices, made once and used by every layer.

A row is cut into segments. Each tree's prompt with its first completion is one, which attends to itself; each
further completion is one, which attends to [prompt, itself]. Both are causal, aligned to the lower right: a query's
last key is its own row. A sliding window counts positions, which restart after the prompt, not rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.batching import Tree, moved

Backend = Literal["sdpa", "products", "varlen", "flex"]


@dataclass(frozen=True)
class Segment:
    """Queries of a row that see the same keys, as far as causality lets them."""

    rows: slice
    """Its queries, which are its last keys too."""
    prompt: slice | None
    """Its first keys, where they stand elsewhere: the prompt of a further completion."""
    unread: int
    """Queries at its front that predict no completion's token: a prompt's, but for the last one."""

    @property
    def keys(self) -> tuple[slice, ...]:
        """The rows of its keys, piece by piece; its own ones are the last."""
        return (self.rows,) if self.prompt is None else (self.prompt, self.rows)

    @property
    def sizes(self) -> list[int]:
        """Rows of each piece."""
        return [piece.stop - piece.start for piece in self.keys]


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


def segments_of(tree: Tree) -> Iterator[Segment]:
    """Yield the prompt with its first completion, then each further completion that computes anything."""
    (begin, count), *others = tree.branches
    yield Segment(slice(tree.start, begin + count), None, max(0, tree.prompt - 1))
    prompt = slice(tree.start, tree.start + tree.prompt) if tree.prompt else None
    for begin, count in others:
        if count:
            yield Segment(slice(begin, begin + count), prompt, 0)


class AttentionPlan:
    """Segments and masks of one batch.

    Attributes:
        backend: what computes it.
        segments: one after another they are the whole row; a prompt's own one comes before those that begin with it.
        sizes: queries of each segment.
        most_keys: of a segment.
        calls: how often a layer asked for attention; the start-up guard compares it with the layers.
        windows: what windows the layers asked for; the start-up guard compares them with the configuration's.
    """

    def __init__(self, trees: tuple[Tree, ...], device: torch.device, *, backend: Backend = "sdpa") -> None:
        self.device = device
        self.backend: Backend = backend
        self.calls = 0
        self.windows: set[int | None] = set()
        self.trees = trees
        self.segments = [segment for tree in trees for segment in segments_of(tree)]
        self.sizes = [segment.sizes[-1] for segment in self.segments]
        self.most_keys = max((sum(segment.sizes) for segment in self.segments), default=0)
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
        return moved(torch.cat(rows), self.device)

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(self.sizes)

    @cached_property
    def gathered(self) -> GatheredSegments:
        """The segments for one variable-length call, on the device; made on the host and moved without waiting."""
        rows = [torch.arange(part.start, part.stop) for segment in self.segments for part in segment.keys]
        counts = [sum(segment.sizes) for segment in self.segments]
        starts = [0, *accumulate(self.sizes)]
        key_starts = torch.tensor([0, *counts]).cumsum(0)
        return GatheredSegments(
            keys=moved(torch.cat(rows), self.device),
            query_starts=moved(torch.tensor(starts).int(), self.device),
            key_starts=moved(key_starts.int(), self.device),
            most_queries=max(self.sizes),
            most_keys=self.most_keys,
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
        tree, branch, position = (moved(torch.tensor(each), self.device) for each in (trees, branches, positions))
        return tree, branch, position
