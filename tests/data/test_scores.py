"""What is said of pairs beyond which one is better: scores, the value of the prompt, a gold response."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.batching import make_batch
from prefopt.errors import DataError
from prefopt.planning import every_comparison

SCORED = [
    {"prompt": "A?", "chosen": " one", "rejected": " two", "chosen_score": 3, "rejected_score": "-0.5", "value": 1},
    {"prompt": "B?", "chosen": " six", "rejected": " ten", "chosen_score": 0.25, "rejected_score": 2, "value": "2.5"},
]
USER = {"role": "user", "content": "What color is the sky?"}
GOOD, BAD, BEST = ({"role": "assistant", "content": text} for text in ("It is blue.", "It is green.", "Blue, yes."))


# Scores and values


def test_scores_and_values_reach_the_batch_comparison_by_comparison(load):
    train = load(SCORED).train
    batch = make_batch(list(train))
    assert batch.chosen_scores.tolist() == [3, 0.25]
    assert batch.rejected_scores.tolist() == [-0.5, 2]
    assert batch.values.tolist() == [1, 2.5]
    assert (train.without_scores, train.without_values) == (0, 0)


def test_scores_follow_their_comparison_through_grouping_and_selection(load):
    rows = [SCORED[0], SCORED[1], {**SCORED[0], "chosen": " three", "chosen_score": 7}]
    train = load(rows, group_by_prompt=True).train
    assert [(c.row, c.chosen_score, c.rejected_score) for c in train[0].comparisons] == [
        (1, (3.0,), (-0.5,)),
        (3, (7.0,), (-0.5,)),
    ]
    assert make_batch([train.select([1])[0]]).chosen_scores.tolist() == [0.25]


def test_an_ensemble_gives_a_score_per_model(load):
    rows = [{**SCORED[0], "chosen_score": [3, 4], "rejected_score": [1, 0]}, SCORED[1] | {"chosen_score": None}]
    train = load(rows).train
    batch = make_batch([train[0]])
    assert batch.chosen_scores.tolist() == [[3, 4]]
    assert batch.rejected_scores.tolist() == [[1, 0]]
    assert train.without_scores == 1


def test_the_score_of_a_labelled_completion_stands_on_its_side(load):
    rows = [
        {"prompt": "A?", "completion": " one", "label": True, "score": 2, "value": 0.5},
        {"prompt": "B?", "completion": " two", "label": False, "score": -1, "value": 0.25},
    ]
    train = load(rows).train
    batch = make_batch(list(train))
    np.testing.assert_array_equal(batch.chosen_scores, [2, np.nan])
    np.testing.assert_array_equal(batch.rejected_scores, [np.nan, -1])
    assert batch.values.tolist() == [0.5, 0.25]
    assert train.without_scores == 0


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_rows_without_a_score_are_kept_counted_and_leave_their_batch_without_scores(load, nothing):
    data = load([*SCORED, {**SCORED[0], "rejected_score": nothing, "value": nothing}])
    assert len(data.train) == 3
    assert (data.train.without_scores, data.train.without_values) == (1, 1)
    assert data.report.without == {"no score": 1, "no value": 1}
    assert any("1 rows: no score" in line for line in data.report.lines())
    assert make_batch([data.train[0]]).chosen_scores is not None
    mixed = make_batch(list(data.train))
    assert (mixed.chosen_scores, mixed.rejected_scores, mixed.values) == (None, None, None)


def test_the_filter_keeps_the_rows_that_have_a_score(load):
    rows = [*SCORED, {**SCORED[0], "rejected_score": None}]
    assert load(rows, filter={"rejected_score": "!= null"}).train.without_scores == 0


def test_data_without_scores_have_none(load, pairs):
    data = load(pairs(2))
    batch = make_batch(list(data.train), gold=True)
    assert (batch.chosen_scores, batch.rejected_scores, batch.values) == (None, None, None)
    assert batch.gold.tolist() == [-1, -1]
    assert (data.train.without_scores, data.train.without_values, data.train.without_gold) == (2, 2, 2)
    assert data.report.without == {}


def test_columns_map_other_names_even_those_of_other_roles(load):
    rows = [{"prompt": "A?", "chosen": " one", "rejected": " two", "score": 5, "score_rejected": 1}]
    names = {"chosen_score": "score", "rejected_score": "score_rejected"}
    assert make_batch(list(load(rows, columns=names).train)).chosen_scores.tolist() == [5]
    labelled = [{"prompt": "A?", "completion": " one", "label": 1, "score": 5}]
    train = load(labelled, columns={"value": "score"}).train
    assert (train.without_values, train.without_scores) == (0, 1)  # a column has one role


WRONG_NUMBERS = [
    "chosen_score: a number",
    "rejected_score: a finite number",
    "value: a number",
    "chosen_score: a number",
    "chosen_score and rejected_score: the scores of the same reward models",
    "chosen_score: a number of every reward model",
    "chosen_score: a number, or a number of each reward model",
]


def test_wrong_numbers_are_named_all_at_once(load):
    wrong = [{"chosen_score": "high"}, {"rejected_score": "inf"}, {"value": [1]}, {"chosen_score": True}]
    wrong += [{"chosen_score": [1, 2]}, {"chosen_score": [1, None], "rejected_score": [1, 2]}, {"chosen_score": []}]
    with pytest.raises(DataError) as caught:
        load([SCORED[0], *({**SCORED[1], **change} for change in wrong)])
    assert len(caught.value.problems) == len(wrong)
    for number, (problem, expected) in enumerate(zip(caught.value.problems, WRONG_NUMBERS, strict=True)):
        assert f"line {number + 2}: {expected}" in str(problem)


def test_every_row_has_the_scores_of_the_same_number_of_models(load, write):
    ensemble = {**SCORED[1], "chosen_score": [1, 2], "rejected_score": [0, 0]}
    with pytest.raises(DataError, match="line 2: scores of 1 reward models, as in the rows before"):
        load([SCORED[0], ensemble])
    with pytest.raises(DataError, match="the same number of reward models in every source"):
        load([write([SCORED[0]], "a.jsonl"), write([ensemble], "b.jsonl")])


# Gold


def test_gold_is_a_further_completion_that_is_computed_only_when_asked_for(load, shown, plain, pair):
    train = load([{**pair, "gold": " Blue, yes."}]).train
    assert shown(train[0], plain)[1] == [" It is blue.</s>", " It is green.</s>", " Blue, yes.</s>"]
    (part,) = parts = every_comparison(train)
    without, with_gold = make_batch(list(train), parts), make_batch(list(train), parts, gold=True)
    assert part.comparisons == (0,)
    assert without.gold is None
    assert len(without.completion_lengths) == 2
    assert with_gold.gold.tolist() == [2]
    assert with_gold.completion_lengths.tolist() == train.completion_lengths(0).tolist()
    assert with_gold.tokens == without.tokens + len(train[0].completions[2]) - 1
    assert (with_gold.chosen.tolist(), with_gold.rejected.tolist()) == ([0], [1])


@pytest.mark.parametrize("nothing", [None, "", " \n", float("nan")])
def test_a_row_may_have_no_gold(load, pair, nothing):
    data = load([{**pair, "gold": " Blue."}, {**pair, "gold": nothing}])
    assert make_batch(list(data.train), gold=True).gold.tolist() == [2, -1]
    assert data.train.without_gold == 1
    assert data.report.without == {"no gold": 1}


def test_a_gold_response_that_is_also_chosen_is_stored_once(load, pair):
    group = load([{**pair, "reference": pair["chosen"]}], columns={"gold": "reference"}).train[0]
    assert len(group.completions) == 2
    assert group.comparisons[0].gold == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "gold": [BEST]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "gold": BEST["content"]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD], "gold": [BEST]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "gold": [USER, BEST]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "gold": BEST},
    ],
)
def test_gold_may_be_written_in_every_spelling_of_a_conversation(load, chat, shown, row):
    prompt, completions = shown(load([row], chat).train[0], chat)
    assert prompt.endswith("<|assistant|>\n")
    assert completions == [f"{message['content']}<|end|>\n" for message in (GOOD, BAD, BEST)]


def test_gold_may_repeat_a_prompt_that_the_pair_only_shares(load, plain, shown):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    for gold in ("The sky is it.", " it."):
        prompt, completions = shown(load([{**row, "gold": gold}]).train[0], plain)
        assert (prompt, completions[2]) == ("The sky is", " it.</s>")


def test_gold_beside_a_label_or_a_list_is_an_error(load):
    rows = [{"prompt": "A?", "completion": " one", "label": True, "gold": " two"}]
    with pytest.raises(DataError, match="line 1: no gold: it can only stand beside chosen and rejected"):
        load(rows)
    with pytest.raises(DataError, match="no gold"):
        load([{"prompt": "A?", "completions": [" one", " two"], "gold": " two"}])
    assert len(load([{**rows[0], "gold": None}]).train) == 1


def test_gold_is_cut_with_its_pair(load, pair):
    train = load([{**pair, "gold": " yes" * 400}], max_length=64).train
    assert train.longest_row == 64
    assert train.completion_lengths(0)[2] == 64 - train.prompt_lengths[0]


# What tells data apart


@pytest.mark.parametrize(
    "change", [{"chosen_score": 4}, {"rejected_score": 0}, {"value": 2}, {"value": None}, {"gold": " two three"}]
)
def test_fingerprint_and_cache_follow_what_was_added(load, change):
    before = load(SCORED)
    after = load([{**SCORED[0], **change}, SCORED[1]])
    assert before.train.fingerprint != after.train.fingerprint
    assert not after.report.sources[0].from_cache


def test_the_fingerprint_follows_which_completion_is_gold(load, pair):
    golds = (" a", " b", None, pair["chosen"], pair["rejected"])
    assert len({load([{**pair, "gold": text}]).train.fingerprint for text in golds}) == 5
