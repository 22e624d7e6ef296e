"""What a batch's completions ask of the decoder: one pass for all of them, or several.

Prompt trees go through it in one row, in one pass. Two things need more:

    padded rows     one row per completion is padded to the longest of its pass, so completions of like lengths go
                    together, and padding is at most a fifth of what is computed
    long rotary     (rope type `longrope`: Phi-3 with 128k) one set of frequencies for rows of up to so many tokens and
                    another beyond, chosen by transformers for a whole call. A completion's log-prob must not depend on
                    its neighbours, so either kind has a pass of its own; a prompt whose completions differ is computed
                    in both
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.batching import RaggedBatch, Tree, moved

WASTE = 1.25
"""Computed over real tokens at which a pass of padded rows takes no shorter completion along."""


@dataclass(frozen=True)
class Completion:
    """A completion as the decoder reads it: its prompt and its own tokens but the last, which predicts nothing."""

    tree: Tree
    begin: int
    """Row index of its first computed token."""
    count: int
    """Computed tokens of its own."""
    first: int
    """Place of its first scored token among the batch's."""

    @property
    def tokens(self) -> int:
        """Tokens that the decoder reads."""
        return self.tree.prompt + self.count

    @property
    def scored(self) -> Tensor:
        """(count + 1,) places of its scored tokens among the batch's."""
        return torch.arange(self.first, self.first + self.count + 1)

    @property
    def row(self) -> Tensor:
        """(tokens,) row indices of what the decoder reads."""
        tree = self.tree
        own = torch.arange(self.begin, self.begin + self.count)
        return torch.cat((torch.arange(tree.start, tree.start + tree.prompt), own))


@dataclass(frozen=True)
class TreePass:
    """One row of prompt trees."""

    input_ids: Tensor
    """(tokens,)"""
    position_ids: Tensor
    """(tokens,)"""
    trees: tuple[Tree, ...]
    predict_index: Tensor
    """(scored,) row index of the hidden state that predicts each scored token of this pass."""
    scored: Tensor | None
    """(scored,) place of each among the batch's, on the CPU; None where the pass is the batch."""


@dataclass(frozen=True)
class PaddedPass:
    """One row per completion; padding follows, so causality hides it."""

    input_ids: Tensor
    """(completions, longest); beyond a completion's end the batch's first token, for no row reads what follows it."""
    predict: tuple[Tensor, Tensor]
    """(scored,) row and column of the hidden state that predicts each scored token of this pass."""
    scored: Tensor
    """(scored,) place of each among the batch's, on the CPU."""


def frequency_limits(config: Any) -> tuple[int, ...]:
    """Tokens of a row beyond which a model turns positions by other frequencies; nothing for most models."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    limits = {one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"}
    return tuple(sorted(int(limit) for limit in limits if limit))


def completions_of(batch: RaggedBatch) -> Iterator[Completion]:
    """Yield the completions of a batch, in their order."""
    first = 0
    for tree in batch.trees:
        for begin, count in tree.branches:
            yield Completion(tree, begin, count, first)
            first += count + 1


def tree_passes(batch: RaggedBatch, limits: Sequence[int] = ()) -> list[TreePass]:
    """Return the passes of the layout that shares prompts: one, unless rows lie on both sides of a limit."""
    kinds = _by_regime(completions_of(batch), limits) if limits else []
    if len(kinds) < 2:
        return [TreePass(batch.input_ids, batch.position_ids, batch.trees, batch.predict_index, None)]
    return [_trees_of(batch, kind) for kind in kinds]


def padded_passes(batch: RaggedBatch, limits: Sequence[int] = ()) -> list[PaddedPass]:
    """Return the passes of the layout with one row per completion."""
    passes = []
    for kind in _by_regime(completions_of(batch), limits):
        waiting: list[Completion] = []
        real = 0
        for one in sorted(kind, key=lambda completion: -completion.tokens):
            if waiting and waiting[0].tokens * (len(waiting) + 1) > WASTE * (real + one.tokens):
                passes.append(_padded(batch, waiting))
                waiting, real = [], 0
            waiting.append(one)
            real += one.tokens
        passes.append(_padded(batch, waiting))
    return passes


def in_order(hidden: Sequence[Tensor], passes: Sequence[TreePass] | Sequence[PaddedPass]) -> Tensor:
    """Join what the passes gave, (scored, hidden) each, in the order of the batch's scored tokens."""
    joined = hidden[0] if len(hidden) == 1 else torch.cat(list(hidden))
    places = [one.scored for one in passes if one.scored is not None]
    return joined.index_select(0, moved(torch.cat(places).argsort(), joined.device)) if places else joined


def _by_regime(completions: Iterable[Completion], limits: Sequence[int]) -> list[list[Completion]]:
    kinds: dict[int, list[Completion]] = {}
    for one in completions:
        kinds.setdefault(sum(one.tokens > limit for limit in limits), []).append(one)
    return list(kinds.values())


def _trees_of(batch: RaggedBatch, completions: Sequence[Completion]) -> TreePass:
    """Lay some of a batch's completions out as a row of their own."""
    rows: list[Tensor] = []
    trees: list[Tree] = []
    predict: list[Tensor] = []
    place = 0
    for tree, mine in groupby(completions, key=lambda one: one.tree):  # they stand tree by tree
        begun, branches = place, []
        rows.append(torch.arange(tree.start, tree.start + tree.prompt))
        place += tree.prompt
        for one in mine:
            rows.append(torch.arange(one.begin, one.begin + one.count))
            predict += [torch.tensor([begun + tree.prompt - 1]), torch.arange(place, place + one.count)]
            branches.append((place, one.count))
            place += one.count
        trees.append(Tree(begun, tree.prompt, tuple(branches)))
    device = batch.input_ids.device
    index = moved(torch.cat(rows), device)
    return TreePass(
        input_ids=batch.input_ids[index],
        position_ids=batch.position_ids[index],
        trees=tuple(trees),
        predict_index=moved(torch.cat(predict), device),
        scored=torch.cat([one.scored for one in completions]),
    )


def _padded(batch: RaggedBatch, completions: Sequence[Completion]) -> PaddedPass:
    """Lay completions out with a row each."""
    device = batch.input_ids.device
    index = nn.utils.rnn.pad_sequence([one.row for one in completions], batch_first=True)
    rows = [torch.full((one.count + 1,), number) for number, one in enumerate(completions)]
    columns = [torch.arange(one.tree.prompt - 1, one.tokens) for one in completions]
    return PaddedPass(
        input_ids=batch.input_ids[moved(index, device)],
        predict=(moved(torch.cat(rows), device), moved(torch.cat(columns), device)),
        scored=torch.cat([one.scored for one in completions]),
    )
