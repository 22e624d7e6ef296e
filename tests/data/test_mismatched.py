"""Every prompt gets a completion of another one: never its own, whatever the order, the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.grouping import TokenRows, group_rows
from prefopt.data.groups import GroupDataset
from prefopt.data.mismatched import mismatched
from prefopt.errors import DataError


class NoTable:
    """A table of which no token is read."""

    def with_format(self, _):
        return self


def labelled(rows, *, by_prompt=False, prompt_length=3):
    """Groups of rows (prompt, completion, desirable), which are told apart by these numbers."""
    prompts, completions = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
    has = np.array([(row[2], not row[2]) for row in rows], dtype=bool)
    known = TokenRows(
        used=np.ones(len(rows), dtype=bool),
        prompt_lengths=np.full(len(rows), prompt_length),
        prompt_hashes=prompts * 0x9E3779B97F4A7C1 + 5,
        has=has,
        lengths=np.where(has, completions[:, None] + 4, 0),
        hashes=np.where(has, completions[:, None] * 0x2545F4914F6CDD1 + 1, 0),
        scores=np.full((len(rows), 2, 1), np.nan),
        list_scores=np.full((len(rows), 2), np.nan),
        values=np.full(len(rows), np.nan),
        probabilities=np.full(len(rows), np.nan),
        source_rows=np.arange(1, len(rows) + 1),
    )
    return GroupDataset(NoTable(), group_rows(known, np.arange(len(rows)), by_prompt=by_prompt), paired=False)


def partners(rows, *, by_prompt=False):
    """(prompt, completion that is put after it) of every group."""
    data = labelled(rows, by_prompt=by_prompt)
    layout = mismatched(data, max_length=10**6).layout
    assert layout.prompt_hashes.tolist() == data.layout.prompt_hashes.tolist()
    assert layout.completion_offsets.tolist() == list(range(len(data) + 1))
    return [
        ((prompt - 5) // 0x9E3779B97F4A7C1, length - 4)
        for prompt, length in zip(layout.prompt_hashes.tolist(), layout.completion_lengths.tolist(), strict=True)
    ]


ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=2, max_size=14).filter(
    lambda rows: len({row[0] for row in rows}) > 1
)


@given(ROWS, st.booleans())
def test_a_partner_comes_from_another_prompt_and_is_another_text_where_there_is_one(rows, by_prompt):
    owners = {}
    for prompt, completion, _ in rows:
        owners.setdefault(completion, set()).add(prompt)
    own = {}
    for prompt, completion, _ in rows:
        own.setdefault(prompt, []).append(completion)
    for number, (prompt, partner) in enumerate(partners(rows, by_prompt=by_prompt)):
        assert owners[partner] - {prompt}
        mine = own[prompt] if by_prompt else [rows[number][1]]
        if not by_prompt and any(other[0] != prompt and other[1] not in mine for other in rows):
            assert partner not in mine


@given(ROWS, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_data_changes_no_partner(rows, random, by_prompt):
    shuffled = random.sample(rows, len(rows))

    def found(these):
        pairs = partners(these, by_prompt=by_prompt)
        keys = [pair[0] for pair in pairs] if by_prompt else [row[:2] for row in these]
        return sorted(zip(keys, pairs, strict=True))

    assert found(rows) == found(shuffled)


def test_partners_are_spread_over_the_data():
    rows = [(i, i, True) for i in range(200)]
    assert sorted(partner for _, partner in partners(rows)) == list(range(200))
    assert [partner for _, partner in partners(rows)] != [(i + 1) % 200 for i in range(200)]


def test_a_subset_has_partners_of_its_own():
    rows = [(i, i, True) for i in range(30)]
    data = labelled(rows)
    half = mismatched(data.select(range(15)), max_length=99).layout.completion_hashes
    assert set(half.tolist()) <= set(data.layout.completion_hashes[:15].tolist())


def test_a_long_partner_is_cut_and_keeps_a_token():
    data = labelled([(0, 0, True), (1, 30, True)], prompt_length=10)
    assert mismatched(data, max_length=18).layout.completion_lengths.tolist() == [8, 4]
    assert mismatched(data, max_length=10).layout.completion_lengths.tolist() == [1, 1]


def test_one_prompt_alone_is_an_error():
    with pytest.raises(DataError, match="at least 2 different prompts"):
        mismatched(labelled([(3, 0, True), (3, 1, False)]), max_length=99)


def test_the_partner_is_one_undesirable_nothing_beside_its_prompt(load, shown, plain):
    rows = [{"prompt": f"Q{i}?", "completion": f" one two three {i}", "label": bool(i % 2)} for i in range(5)]
    train = load(rows).train
    other = mismatched(train, max_length=256)
    assert len(other) == len(train)
    assert not other.paired
    texts = {row["completion"] + "</s>" for row in rows}
    for number, group in enumerate(other):
        prompt, (partner,) = shown(group, plain)
        assert prompt == rows[number]["prompt"]
        assert partner in texts - {rows[number]["completion"] + "</s>"}
        assert [(c.chosen, c.rejected, c.row) for c in group.comparisons] == [(0, None, number + 1)]
    cut = mismatched(train, max_length=int(train.prompt_lengths.max()) + 2)
    for whole, short in zip(other, cut, strict=True):
        assert short.completions[0].tolist() == whole.completions[0][:2].tolist()
    assert cut.fingerprint != other.fingerprint


def test_pairs_lend_what_is_judged_and_never_gold(load, shown, plain):
    rows = [{"prompt": f"Q{i}?", "chosen": f" yes {i}", "rejected": f" no {i}", "gold": f" one {i}"} for i in range(9)]
    other = mismatched(load(rows).train, max_length=256)
    assert not [text for group in other for text in shown(group, plain)[1] if text.startswith(" one")]


def test_another_process_finds_the_same_partners():
    here = repr(partners([(i % 7, i % 11, i % 2 == 0) for i in range(40)]))
    folder = os.path.dirname(os.path.abspath(__file__))
    code = "import test_mismatched as t; print(t.partners([(i % 7, i % 11, i % 2 == 0) for i in range(40)]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == here
