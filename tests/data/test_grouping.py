"""Rows of one prompt become one group, equal completions once, and nothing else changes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.group_layout import GroupLayout
from prefopt.data.grouping import TokenRows, group_rows

CELLS = st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 4)), st.one_of(st.none(), st.integers(5, 8)))


def known(rows):
    """Rows (prompt, chosen, rejected) whose hashes are those numbers, and whose lengths are one more."""
    sides = np.array([[-1 if side is None else side for side in row[1:]] for row in rows]).reshape(-1, 2)
    prompts = np.array([row[0] for row in rows], dtype=np.int64)
    return TokenRows(
        used=np.ones(len(rows), dtype=bool),
        prompt_lengths=prompts + 1,
        prompt_hashes=prompts,
        has=sides >= 0,
        lengths=sides + 1,
        hashes=sides,
        scores=np.full((len(rows), 2, 1), np.nan),
        list_scores=np.full((len(rows), 2), np.nan),
        values=np.full(len(rows), np.nan),
        probabilities=np.full(len(rows), np.nan),
        source_rows=np.arange(1, len(rows) + 1),
    )


def by_hand(rows, by_prompt):
    """Group with dictionaries: [(prompt, completions, comparisons with their rows)]."""
    groups = {}
    for number, (prompt, chosen, rejected) in enumerate(rows, start=1):
        completions, comparisons = groups.setdefault(prompt if by_prompt else (prompt, number), ([], []))
        for side in (chosen, rejected):
            if side is not None and side not in completions:
                completions.append(side)
        index = [-1 if side is None else completions.index(side) for side in (chosen, rejected)]
        comparisons.append((*index, number))
    return [(key if by_prompt else key[0], *value) for key, value in groups.items()]


def read_back(layout):
    out = []
    for group in range(len(layout.prompt_rows)):
        completions = slice(*layout.completion_offsets[group : group + 2])
        comparisons = slice(*layout.comparison_offsets[group : group + 2])
        arrays = (layout.chosen, layout.rejected, layout.source_rows)
        out.append(
            (
                int(layout.prompt_hashes[group]),
                layout.completion_hashes[completions].tolist(),
                list(zip(*(array[comparisons].tolist() for array in arrays), strict=True)),
            )
        )
    return out


@given(st.lists(CELLS.filter(lambda row: row[1:] != (None, None)), max_size=12), st.booleans())
def test_groups_are_those_that_dictionaries_would_make(rows, by_prompt):
    layout = group_rows(known(rows), np.arange(len(rows)), by_prompt=by_prompt)
    assert read_back(layout) == by_hand(rows, by_prompt)
    assert (layout.completion_lengths == layout.completion_hashes + 1).all()


@given(st.lists(CELLS.filter(lambda row: row[1:] != (None, None)), min_size=1, max_size=10), st.data())
def test_selecting_groups_is_selecting_from_the_list(rows, data):
    layout = group_rows(known(rows), np.arange(len(rows)), by_prompt=True)
    count = len(layout.prompt_rows)
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=6))
    selected = layout.select(np.array(chosen, dtype=np.int64))
    whole = read_back(layout)
    assert read_back(selected) == [whole[index] for index in chosen]


def test_one_prompt_cut_to_two_lengths_makes_two_groups():
    rows = known([(1, 0, 5), (1, 0, 6)])
    rows.prompt_lengths[1] = 1
    assert len(group_rows(rows, np.arange(2), by_prompt=True).prompt_rows) == 2


ROWS = [
    {"prompt": "A?", "chosen": " one", "rejected": " two", "preference_probability": 0.9},
    {"prompt": "B?", "chosen": " six", "rejected": " ten"},
    {"prompt": "A?", "chosen": " one", "rejected": " three", "preference_probability": 0.2},
    {"prompt": "A?", "chosen": " three", "rejected": " two"},
]


def test_a_completion_that_several_comparisons_share_is_stored_once(load, plain, shown):
    train = load(ROWS, group_by_prompt=True).train
    assert [shown(group, plain) for group in train] == [
        ("A?", [" one</s>", " two</s>", " three</s>"]),
        ("B?", [" six</s>", " ten</s>"]),
    ]
    found = [(c.chosen, c.rejected, c.preference_probability, c.row) for c in train[0].comparisons]
    assert found == [(0, 1, 0.9, 1), (0, 2, 0.2, 3), (2, 1, None, 4)]
    assert train.comparisons_per_group.tolist() == [3, 1]


def test_without_grouping_every_row_is_a_group(load, plain, shown):
    train = load(ROWS).train
    assert [shown(group, plain) for group in train] == [
        (row["prompt"], [row["chosen"] + "</s>", row["rejected"] + "</s>"]) for row in ROWS
    ]
    assert [c.row for group in train for c in group.comparisons] == [1, 2, 3, 4]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_planner_needs_no_token_ids(load, grouped):
    train = load(ROWS, group_by_prompt=grouped).train
    for index, group in enumerate(train):
        assert train.prompt_lengths[index] == len(group.prompt)
        assert train.completion_lengths(index).tolist() == [len(side) for side in group.completions]
        assert train.comparisons(index) == group.comparisons
        assert train.comparisons_per_group[index] == len(group.comparisons)


def test_select_keeps_order_and_content(load, plain, shown):
    train = load(ROWS).train
    part = train.select([3, 0])
    assert [shown(group, plain) for group in part] == [shown(train[3], plain), shown(train[0], plain)]
    assert shown(part.select([1])[0], plain) == shown(train[0], plain)
    assert len(train.select([])) == 0
    assert shown(train.select([-1])[0], plain) == shown(train[-1], plain)
    with pytest.raises(IndexError):
        train[len(train)]


def test_unpaired_feedback_is_one_completion_with_one_side(load, plain):
    rows = [
        {"prompt": "A?", "completion": " one", "label": True},
        {"prompt": "A?", "completion": " two", "label": False},
        {"prompt": "A?", "completion": " one", "label": False},
    ]
    train = load(rows, group_by_prompt=True).train
    assert not train.paired
    assert [(c.chosen, c.rejected) for c in train[0].comparisons] == [(0, None), (None, 1), (None, 0)]
    assert [plain.decode(side) for side in train[0].completions] == [" one</s>", " two</s>"]
    assert load(ROWS).train.paired


def test_a_dataset_can_be_sent_to_a_worker_process(load, plain, shown):
    train = load(ROWS).train
    copy = pickle.loads(pickle.dumps(train))
    assert [shown(group, plain) for group in copy] == [shown(group, plain) for group in train]
    assert copy.fingerprint == train.fingerprint


def test_the_fingerprint_follows_content_not_place(load, write):
    one = load(ROWS).train.fingerprint
    assert load(write(ROWS, "elsewhere/other.jsonl")).train.fingerprint == one
    assert load([{"prompt": "Z?", "chosen": "", "rejected": " x"}, *ROWS]).train.fingerprint == one
    changed = {
        load([{**ROWS[0], "chosen": " ten"}, *ROWS[1:]]).train.fingerprint,
        load([{**ROWS[0], "preference_probability": 0.8}, *ROWS[1:]]).train.fingerprint,
        load(ROWS[::-1]).train.fingerprint,
        load(ROWS, group_by_prompt=True).train.fingerprint,
    }
    assert len(changed | {one}) == 5


@pytest.mark.parametrize(
    ("by_prompt", "before"),
    [(True, "6f5eb17214031a54509f2b6a6eddc462"), (False, "06fd46aa90ead6c46b2cc49703ab0b98")],
)
def test_plain_pairs_and_labels_keep_the_fingerprint_they_had_before_there_were_scores_and_lists(by_prompt, before):
    rows = [(1, 0, 5), (2, None, 6), (1, 0, 6), (1, 3, None)]
    assert group_rows(known(rows), np.arange(4), by_prompt=by_prompt).content_hash() == before


def test_the_records_of_the_data_room_import_nothing_heavy():
    code = "import sys, prefopt.data.mismatched, prefopt.data.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "pyarrow", "torch", "transformers", "pandas"} & set(loaded)


def test_every_array_of_a_layout_belongs_to_groups_completions_or_comparisons(load):
    layout = load(ROWS, group_by_prompt=True).train.layout
    sizes = {field.name: len(getattr(layout, field.name)) for field in fields(GroupLayout)}
    assert set(sizes.values()) == {2, 3, 4, 5}  # groups, offsets, comparisons, completions
