"""`data.filter` keeps rows by column."""

from __future__ import annotations

import pytest

from prefopt.data.filters import keeps, parse_filter
from prefopt.errors import DataError


@pytest.mark.parametrize(
    ("wanted", "kept", "left"),
    [
        ("en", ["en"], ["de", "", None, 1]),
        (3, [3, 3.0, "3", "3.0"], [4, "x", None, True]),
        (True, [True, "true", "True"], [False, 1, None, "yes"]),
        (None, [None], ["", 0, False]),
        (["en", "fr"], ["en", "fr"], ["de", None]),
        ([1, 2], [1, "2"], [3]),
        (">= 0.6", [0.6, 1, "0.75"], [0.59, None, "text", True]),
        ("<0.6", [0.5, -1], [0.6, None]),
        ("> 1e2", [101], [100]),
        ("<= -1", [-1, -2], [0]),
        ("!= en", ["de", None], ["en"]),
        ("== 0.5", [0.5, "0.50"], [0.6, None]),
        ("!= null", [0.5, "", "null"], [None]),
    ],
)
def test_a_condition_keeps_these_values_and_leaves_those(wanted, kept, left):
    conditions = parse_filter({"column": wanted})
    assert [value for value in kept if not keeps(conditions, {"column": value})] == []
    assert [value for value in left if keeps(conditions, {"column": value})] == []


def test_all_conditions_must_hold_and_an_absent_column_is_null():
    conditions = parse_filter({"a": 1, "b": [2, None]})
    assert keeps(conditions, {"a": 1, "b": 2})
    assert keeps(conditions, {"a": 1})
    assert not keeps(conditions, {"b": 2})


def test_what_cannot_be_a_condition_is_named_all_at_once():
    with pytest.raises(DataError) as caught:
        parse_filter({"score": ">= high", "tags": {"a": 1}, "fine": 3})
    assert [problem.where for problem in caught.value.problems] == ["data.filter.score", "data.filter.tags"]


def test_a_condition_is_never_executed():
    conditions = parse_filter({"column": "__import__('os').abort()"})
    assert not keeps(conditions, {"column": "x"})
