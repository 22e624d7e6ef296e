"""Lists of completions: ordered by scores, by ranks or by place; a pair is a list of two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.batching import make_batch
from prefopt.data.formats import kind_of, text_row
from prefopt.data.grouping import TokenRows, group_rows
from prefopt.data.report import Dropped
from prefopt.errors import DataError

FOUR = [" one", " two", " three", " four"]
USER = {"role": "user", "content": "Name a fruit."}
FRUITS = ("apple", "stone", "maybe")


def beaten(group):
    return [(c.chosen, c.rejected) for c in group.comparisons]


def dropped(**values):
    return text_row(values, kind_of(values)).dropped


# The order


def test_without_scores_and_ranks_the_best_comes_first(load, plain, shown):
    train = load([{"prompt": "A?", "completions": FOUR[:3]}]).train
    assert shown(train[0], plain) == ("A?", [f"{text}</s>" for text in FOUR[:3]])
    assert beaten(train[0]) == [(0, 1), (0, 2), (1, 2)]
    assert [c.list_scores for c in train[0].comparisons] == [(-1, -2), (-1, -3), (-2, -3)]
    assert train.paired
    assert train.without_scores == 3  # a rank is no score
    assert train.without_gold == 3  # nor is the third of a list a gold response


def test_scores_order_a_list_and_equal_ones_are_not_compared(load):
    train = load([{"prompt": "A?", "completions": FOUR, "scores": [1, 3, 1, "2.5"]}]).train
    assert beaten(train[0]) == [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]
    assert [(c.chosen_score, c.rejected_score) for c in train[0].comparisons][:3] == [
        ((3,), (1,)),
        ((3,), (1,)),
        ((3,), (2.5,)),
    ]
    assert train.without_scores == 0


def test_ranks_order_a_list_before_scores_do(load):
    row = {"prompt": "A?", "completions": FOUR[:3], "ranks": [2, 1, 2]}
    assert beaten(load([row]).train[0]) == [(1, 0), (1, 2)]
    both = load([{**row, "scores": [5, 4, 3]}]).train
    assert beaten(both[0]) == [(1, 0), (1, 2)]
    assert both[0].comparisons[0].list_scores == (-1, -2)
    assert both[0].comparisons[0].chosen_score == (4,)


def test_an_ensemble_orders_a_list_by_its_mean(load):
    scores = [[0, 4], [3, 3], [1, 1]]
    group = load([{"prompt": "A?", "completions": FOUR[:3], "scores": scores}]).train[0]
    assert beaten(group) == [(0, 2), (1, 0), (1, 2)]
    assert make_batch([group]).chosen_scores.tolist() == [[0, 4], [3, 3], [3, 3]]


SCORES = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=6)


@given(SCORES, st.booleans())
def test_comparisons_are_all_strictly_ordered_pairs_of_every_list(scores, by_prompt):
    rows, places = len(scores), max(map(len, scores))
    filled = np.full((rows, places), np.nan)
    for number, row in enumerate(scores):
        filled[number, : len(row)] = row
    completions = np.arange(rows * places).reshape(rows, places)
    known = TokenRows(
        used=np.ones(rows, dtype=bool),
        prompt_lengths=np.ones(rows, dtype=np.int64),
        prompt_hashes=np.arange(rows) % 2,
        has=~np.isnan(filled),
        lengths=completions + 1,
        hashes=completions,
        scores=filled[:, :, None],
        list_scores=filled,
        probabilities=np.full(rows, np.nan),
        values=np.arange(rows) + 0.5,
        source_rows=np.arange(1, rows + 1),
    )
    layout = group_rows(known, np.arange(rows), by_prompt=by_prompt)
    start = np.repeat(layout.completion_offsets[:-1], np.diff(layout.comparison_offsets))
    found = {
        (int(row) - 1, int(a) % places, int(b) % places)
        for row, a, b in zip(
            layout.source_rows, layout.completion_hashes[start + layout.chosen],
            layout.completion_hashes[start + layout.rejected], strict=True,
        )
    }  # fmt: skip
    expected = {
        (number, i, j)
        for number, row in enumerate(scores)
        for i in range(len(row))
        for j in range(len(row))
        if row[i] > row[j]
    }
    assert found == expected
    assert len(layout.chosen) == len(expected)
    assert (layout.values == layout.source_rows - 0.5).all()


# Formats


@pytest.mark.parametrize(
    "completions",
    [
        list(FRUITS),
        [{"role": "assistant", "content": text} for text in FRUITS],
        [[{"role": "assistant", "content": text}] for text in FRUITS],
        [[USER, {"role": "assistant", "content": text}] for text in FRUITS],
    ],
)
def test_conversations_may_be_listed_in_every_spelling(load, chat, shown, completions):
    prompt, found = shown(load([{"prompt": [USER], "completions": completions}], chat).train[0], chat)
    assert prompt == "<|user|>\nName a fruit.<|end|>\n<|assistant|>\n"
    assert found == [f"{text}<|end|>\n" for text in FRUITS]


def test_listed_conversations_may_hold_their_prompt(load, chat, shown):
    whole = [[USER, {"role": "assistant", "content": text}] for text in FRUITS]
    explicit = load([{"prompt": [USER], "completions": list(FRUITS)}], chat).train
    assert load([{"completions": whole}], chat).train.fingerprint == explicit.fingerprint


def test_pairs_and_labels_come_before_lists():
    assert kind_of({"prompt": 1, "chosen": 1, "rejected": 1, "completions": 1}) == "paired"
    assert kind_of({"prompt": 1, "completion": 1, "label": 1, "completions": 1}) == "unpaired"
    assert kind_of({"prompt": 1, "completions": 1}) == "ranked"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["a"]}, Dropped.LIST_SHORT),
        ({"completions": []}, Dropped.LIST_SHORT),
        ({"completions": ["a", "a", "a"]}, Dropped.LIST_IDENTICAL),
        ({"completions": ["a", "a"]}, Dropped.LIST_IDENTICAL),
        ({"completions": ["a", None]}, Dropped.LISTED_NULL),
        ({"completions": ["a", " "]}, Dropped.LISTED_EMPTY),
        ({"completions": ["a", "b"], "scores": [1, 1]}, Dropped.LIST_TIED),
        ({"completions": ["a", "b"], "ranks": [2, 2]}, Dropped.LIST_TIED),
        ({"completions": ["a", "b"], "scores": [1, None]}, Dropped.SCORE_NULL),
        ({"completions": ["a", "b"], "scores": None}, Dropped.SCORE_NULL),
        ({"completions": ["a", "b"], "ranks": [1, float("nan")]}, Dropped.SCORE_NULL),
    ],
)
def test_a_list_that_teaches_nothing_is_dropped_with_its_reason(row, reason):
    assert dropped(prompt="Q", **row) == reason


def test_what_is_dropped_and_kept_once_is_counted(load):
    lists = [
        FOUR,
        [" one"],
        [" one", " one</s>"],  # what EOS makes of the first
        [" one", " two", " one"],
        [" yes" * 300 + " one", " yes" * 300 + " two"],
    ]
    report = load([{"prompt": "Q?", "completions": row} for row in lists]).report
    assert report.dropped == {
        "a list with fewer than two completions": 1,
        "the completions of the list differ as text and have the same token ids": 1,
        "the completions of the list are identical after the cut to data.max_length": 1,
    }
    assert report.cut == {"completions that their list holds several times, kept once": 1}
    assert (report.train.lists, report.train.comparisons, report.train.completions) == (2, 7, 6)
    assert any("7 comparisons of 2 lists" in line for line in report.lines())


def test_a_completion_that_stands_twice_keeps_its_first_score(load):
    row = {"prompt": "Q?", "completions": [" one", " two", " one"], "scores": [3, 2, 1]}
    group = load([row]).train[0]
    assert beaten(group) == [(0, 1)]
    assert group.comparisons[0].list_scores == (3, 2)
    tied = load([row, {**row, "scores": [2, 2, 1]}]).report
    assert tied.dropped == {"all completions of the list have the same score or rank": 1}
    assert tied.cut == {"completions that their list holds several times, kept once": 1}


def test_wrong_lists_are_named_all_at_once(load):
    wrong = [
        ({"completions": " one"}, "completions: a list with one entry per completion"),
        ({"completions": FOUR, "scores": [1, 2]}, "scores: one for each of the 4 completions"),
        ({"completions": FOUR, "scores": 4}, "scores: a list with one entry per completion"),
        ({"completions": FOUR, "scores": [1, 2, 3, float("inf")]}, "scores: a finite number"),
        ({"completions": FOUR, "scores": [1, 2, 3, "best"]}, "scores: a number"),
        ({"completions": FOUR, "scores": [1, 2, 3, [4, 5]]}, "scores: the scores of the same reward models"),
        ({"completions": [" one", 5], "scores": [2, 1]}, "a completion of the list: text or a list of"),
    ]
    rows = [{"completions": FOUR, "scores": [4, 3, 2, 1]}, *({"scores": [1], **row} for row, _ in wrong)]
    with pytest.raises(DataError) as caught:
        load([{"prompt": "Q?", **row} for row in rows])
    assert len(caught.value.problems) == len(wrong)
    for number, (problem, (_, expected)) in enumerate(zip(caught.value.problems, wrong, strict=True)):
        assert str(problem).startswith(f"{problem.where}: {expected}")
        assert problem.where.endswith(f"line {number + 2}")


def test_a_source_orders_its_lists_in_one_way(load, write):
    scored, bare = {"prompt": "Q?", "completions": FOUR, "scores": [1, 2, 3, 4]}, {"prompt": "Q?", "completions": FOUR}
    with pytest.raises(DataError, match="line 2: scores, as in the rows before"):
        load([scored, bare])
    with pytest.raises(DataError, match="lists of all sources ordered in one way"):
        load([write([scored], "a.jsonl"), write([bare], "b.jsonl")])


def test_lists_and_pairs_are_not_mixed(load, write, pair):
    row = {"prompt": "Q?", "completions": FOUR}
    with pytest.raises(DataError, match="line 2: completions, as in the rows before"):
        load([row, pair])
    with pytest.raises(DataError, match="sources of one kind: pairs, completions with labels, or lists"):
        load([write([row], "a.jsonl"), write([pair], "b.jsonl")])


def test_columns_name_the_lists(load):
    row = {"instruction": "Q?", "answers": FOUR, "ratings": [1, 2, 3, 4]}
    names = {"prompt": "instruction", "completions": "answers", "scores": "ratings"}
    assert load([row], columns=names).train.without_scores == 0


# Groups and batches


def test_a_list_of_two_is_a_pair(load, pairs):
    rows = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in pairs(3)]
    listed, paired = load(rows).train, load(pairs(3)).train
    for one, other in zip(listed, paired, strict=True):
        assert [side.tolist() for side in one.completions] == [side.tolist() for side in other.completions]
        assert beaten(one) == beaten(other)
    scored = load([{**row, "scores": [1, 0]} for row in rows]).train
    batches = [make_batch(list(data), lists=True) for data in (scored, paired)]
    for name in ("input_ids", "targets", "chosen", "rejected", "list_members", "list_index", "list_scores"):
        assert (getattr(batches[0], name) == getattr(batches[1], name)).all(), name
    assert batches[0].lists == batches[1].lists == 3


def test_lists_of_one_prompt_share_its_group_and_stay_lists(load):
    rows = [
        {"prompt": "A?", "completions": [" one", " two", " three"], "scores": [1, 2, 3]},
        {"prompt": "B?", "completions": [" one", " two"], "scores": [4, 5]},
        {"prompt": "A?", "completions": [" two", " four"], "scores": [8, 7]},
    ]
    train = load(rows, group_by_prompt=True).train
    assert train.lists_per_group.tolist() == [2, 1]
    assert train.select([1, 0]).lists_per_group.tolist() == [1, 2]
    assert [(c.list_number, c.row) for c in train[0].comparisons] == [(0, 1), (0, 1), (0, 1), (1, 3)]
    batch = make_batch(list(train), lists=True)
    assert len(batch.completion_lengths) == 4 + 2
    assert batch.lists == 3
    assert batch.list_index.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert batch.list_members.tolist() == [2, 1, 0, 1, 3, 5, 4]  # the best first; " two" in two lists
    assert batch.list_scores.tolist() == [3, 2, 1, 8, 7, 5, 4]


def test_a_batch_of_ranked_groups_is_this_layout(load, plain):
    rows = [
        {"prompt": "A?", "completions": [" one", " two", " three"], "ranks": [3, 1, 2]},
        {"prompt": "B?", "completions": [" six", " ten"], "ranks": [1, 2]},
    ]
    batch = make_batch(list(load(rows).train), lists=True)
    ids = {text: plain(text, add_special_tokens=False)["input_ids"] for text in ("A?", "B?")}
    ends = {text: [*plain(text, add_special_tokens=False)["input_ids"], 2]
            for row in rows for text in row["completions"]}  # fmt: skip
    row, positions, predict, targets = [], [], [], []
    for prompt, completions in (("A?", [" one", " two", " three"]), ("B?", [" six", " ten"])):
        start, length = len(row), len(ids[prompt])
        row += ids[prompt]
        positions += range(length)
        for text in completions:
            predict += [start + length - 1, *range(len(row), len(row) + len(ends[text]) - 1)]
            row += ends[text][:-1]
            positions += range(length, length + len(ends[text]) - 1)
            targets += ends[text]
    assert batch.input_ids.tolist() == row
    assert batch.position_ids.tolist() == positions
    assert batch.predict_index.tolist() == predict
    assert batch.targets.tolist() == targets
    assert list(zip(batch.chosen.tolist(), batch.rejected.tolist())) == [(1, 0), (1, 2), (2, 0), (3, 4)]
    assert batch.list_members.tolist() == [1, 2, 0, 3, 4]
    assert batch.list_scores.tolist() == [-1, -2, -3, -1, -2]
    assert batch.chosen_scores is None
    assert batch.rows == (1, 1, 1, 2)
    assert batch.two_sided
    assert not batch.unpaired


def test_weights_repeat_whole_lists(load, write, one_source):
    rows = [{"prompt": f"Q{i}?", "completions": FOUR} for i in range(8)]
    half = load([one_source(write(rows), weight=0.5)]).train
    assert half.comparisons_per_group.tolist() == [6] * 4
    twice = load([one_source(write(rows), weight=2)], group_by_prompt=True).train
    assert twice.lists_per_group.tolist() == [2] * 8
    assert len(twice.layout.completion_lengths) == 4 * 8


def test_pairs_are_worth_their_scores_only_where_all_have_some(load, pairs):
    scored = [{**row, "chosen_score": 0.5, "rejected_score": 2} for row in pairs(2)]
    worth = make_batch(list(load(scored).train), lists=True)
    assert worth.list_scores.tolist() == [2, 0.5] * 2
    assert worth.list_members.tolist() == [1, 0, 3, 2]
    some = make_batch(list(load([scored[0], pairs(2)[1]]).train), lists=True)
    assert some.list_scores.tolist() == [1, 0] * 2


@pytest.mark.parametrize(
    "change",
    [{"scores": [4, 3, 2, 0]}, {"scores": [1, 3, 2, 4]}, {"completions": FOUR[:3], "scores": [4, 3, 2]}],
)
def test_the_fingerprint_follows_order_and_scores(load, change):
    row = {"prompt": "Q?", "completions": FOUR, "scores": [4, 3, 2, 1]}
    ranked = {"prompt": "Q?", "completions": FOUR}
    spaced = {**ranked, "ranks": [1, 2, 3, 9]}
    assert len({load([one]).train.fingerprint for one in (row, {**row, **change}, ranked, spaced)}) == 4
