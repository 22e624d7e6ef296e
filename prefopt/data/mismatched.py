"""Completions of other prompts, with which KTO and BCO estimate how far the policy has moved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from prefopt.data.group_layout import GroupLayout
from prefopt.data.groups import GroupDataset
from prefopt.errors import DataError, Problem


def only_prompt(dataset: GroupDataset, where: str) -> Iterator[Problem]:
    """Yield the problem of data that have no other prompt to lend a completion."""
    if len(np.unique(dataset.layout.prompt_hashes)) < 2:
        yield Problem(
            where,
            "at least 2 different prompts: the loss reads completions of other prompts",
            f"{min(len(dataset), 1)} in {len(dataset):,} groups",
            "add rows with other prompts, or take a loss that reads none",
        )


def mismatched(dataset: GroupDataset, *, max_length: int) -> GroupDataset:
    """Put a completion of another prompt after every prompt.

    The groups stand in a circle in the order of a hash of their content, and each takes its partner from the next one
    whose prompt is another and whose completion is not one of its own (or, where all completions are equal, from the
    next one whose prompt is another). Partners therefore do not depend on the order of the dataset or on a seed, but
    on which groups there are: a subset has other partners. Take the partners of a whole dataset, and the subset of
    both.

    Args:
        dataset: the groups.
        max_length: longest prompt plus partner, in tokens. A longer partner is cut at its end, down to one token: it
            is scored only to estimate a mean, for which its beginning will do.

    Returns:
        One group per group of the dataset, at the same position: its prompt and one completion, with the comparison
        (0, None).

    Raises:
        DataError: fewer than two different prompts.
    """
    layout = dataset.layout
    if problems := list(only_prompt(dataset, "data")):
        raise DataError(problems)
    taken = _representatives(layout)
    completion = taken[_partners(layout, taken)]
    groups = len(dataset)
    first = layout.comparison_offsets[:-1]
    room = np.maximum(max_length - layout.prompt_lengths, 1)
    return dataset.laid_out(
        GroupLayout(
            prompt_rows=layout.prompt_rows,
            prompt_lengths=layout.prompt_lengths,
            prompt_hashes=layout.prompt_hashes,
            completion_offsets=np.arange(groups + 1),
            completion_rows=layout.completion_rows[completion],
            completion_places=layout.completion_places[completion],
            completion_lengths=np.minimum(layout.completion_lengths[completion], room),
            completion_hashes=layout.completion_hashes[completion],
            comparison_offsets=np.arange(groups + 1),
            chosen=np.zeros(groups, dtype=np.int64),
            rejected=np.full(groups, -1),
            gold=np.full(groups, -1),
            list_numbers=np.zeros(groups, dtype=np.int64),
            list_scores=np.tile((1.0, 0.0), (groups, 1)),
            scores=np.full((groups, 2, 1), np.nan),
            probabilities=np.full(groups, np.nan),
            values=np.full(groups, np.nan),
            source_rows=layout.source_rows[first],
        ),
        paired=False,
    )


def _representatives(layout: GroupLayout) -> np.ndarray:
    """Return (groups,) the completion that each group lends: of those that are judged, the one with the least hash."""
    group_of = np.repeat(np.arange(len(layout.prompt_rows)), np.diff(layout.comparison_offsets))
    sides = np.concatenate((layout.chosen, layout.rejected))
    judged = layout.completion_offsets[np.concatenate((group_of, group_of))] + sides
    judged = np.unique(judged[sides >= 0])
    group = np.searchsorted(layout.completion_offsets, judged, side="right") - 1
    order = np.lexsort((layout.completion_lengths[judged], layout.completion_hashes[judged], group))
    _, first = np.unique(group[order], return_index=True)
    return judged[order][first]


def _partners(layout: GroupLayout, taken: np.ndarray) -> np.ndarray:
    """Return (groups,) the group that lends its completion to each."""
    circle = np.asarray(sorted(range(len(taken)), key=lambda group: _content(layout, group)))
    texts = _numbers(layout.completion_hashes, layout.completion_lengths)
    prompt, lent = layout.prompt_hashes[circle], texts[taken[circle]]
    next_prompt, next_lent = _next_other(prompt), _next_other(lent)
    partner = np.empty(len(taken), dtype=np.int64)
    for place, group in enumerate(circle):
        own = set(texts[layout.completion_offsets[group] : layout.completion_offsets[group + 1]].tolist())
        other = place + next_prompt[place]
        nearest = other
        # Where prompt or completion is its own, on to the end of that run; at most once around.
        while other < place + len(circle):
            at = other % len(circle)
            if prompt[at] == prompt[place]:
                other += next_prompt[at]
            elif lent[at] in own:
                other += next_lent[at]
            else:
                nearest = other
                break
        partner[group] = circle[nearest % len(circle)]
    return partner


def _next_other(values: np.ndarray) -> np.ndarray:
    """Return (n,) how many steps around the circle the next different value is; n where all are equal."""
    count = len(values)
    steps = np.full(2 * count, count)
    twice = np.concatenate((values, values))
    changes = np.flatnonzero(twice[1:] != twice[:-1]) + 1
    if len(changes):
        places = np.arange(changes[-1])
        steps[: changes[-1]] = changes[np.searchsorted(changes, places, side="right")] - places
    return steps[:count]


def _numbers(hashes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (n,) a number per text; a cut one has the hash of the whole and is told apart by its length."""
    _, numbers = np.unique(np.stack((hashes, lengths), axis=1), axis=0, return_inverse=True)
    return numbers.reshape(-1)


def _content(layout: GroupLayout, group: int) -> bytes:
    """Return a hash of a prompt and its completions, whatever their order."""
    start, end = layout.completion_offsets[group : group + 2]
    hashes, lengths = layout.completion_hashes[start:end], layout.completion_lengths[start:end]
    order = np.lexsort((lengths, hashes))
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(np.asarray([layout.prompt_hashes[group], layout.prompt_lengths[group]], dtype="<i8").tobytes())
    hasher.update(np.stack((hashes[order], lengths[order])).astype("<i8").tobytes())
    return hasher.digest()
