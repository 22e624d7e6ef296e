"""Every format becomes one explicit prompt with its completions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.cells import BadRow
from prefopt.data.formats import COLUMNS, by_role, kind_of, text_row
from prefopt.data.prompts import shared_beginning
from prefopt.data.report import Dropped

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SIX = "What is six?"


def read(**values):
    """(prompt, chosen, rejected), with gold where there is one, or (prompt, *list); messages parsed."""
    row = text_row(values, kind_of(values))
    assert not row.dropped
    parse = json.loads if row.conversational else str
    return tuple(None if text is None else parse(text) for text in (row.prompt, *row.completions))


def dropped(**values):
    return text_row(values, kind_of(values)).dropped


def test_standard_explicit_prompt():
    assert read(prompt=SIX, chosen=" 6", rejected=" 7") == (SIX, " 6", " 7")


def test_standard_implicit_prompt_is_what_both_begin_with_up_to_the_end_of_a_word():
    assert read(chosen="The sky is blue.", rejected="The sky is black.") == ("The sky is", " blue.", " black.")
    assert read(chosen="Q?\nyes", rejected="Q?\nno") == ("Q?\n", "yes", "no")


def test_conversational_explicit_prompt():
    assert read(prompt=[SYSTEM, USER], chosen=[GOOD], rejected=[BAD]) == ([SYSTEM, USER], [GOOD], [BAD])


def test_conversational_implicit_prompt_is_whole_messages():
    assert read(chosen=[USER, GOOD], rejected=[USER, BAD]) == ([USER], [GOOD], [BAD])
    later = [USER, GOOD, {"role": "user", "content": "more"}]
    assert read(chosen=[*later, GOOD], rejected=[*later, BAD]) == (later, [GOOD], [BAD])


def test_a_prompt_that_the_conversations_repeat_is_taken_out_of_them():
    whole = ([USER], [GOOD], [BAD])
    assert read(prompt="Q", chosen=[USER, GOOD], rejected=[USER, BAD]) == whole
    assert read(prompt=[USER], chosen=[USER, GOOD], rejected=[USER, BAD]) == whole


def test_text_and_messages_may_be_mixed():
    whole = ([USER], [GOOD], [BAD])
    assert read(prompt="Q", chosen=[GOOD], rejected=[BAD]) == whole
    assert read(prompt=[USER], chosen="good", rejected="bad") == whole
    assert read(prompt="Q", chosen=GOOD, rejected=BAD) == whole


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_a_desirable_completion_is_chosen(label):
    assert read(prompt="Q", completion=" a", label=label) == ("Q", " a", None)


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "0"])
def test_an_undesirable_completion_is_rejected(label):
    assert read(prompt="Q", completion=" a", label=label) == ("Q", None, " a")


def test_an_unpaired_conversation_may_hold_its_prompt():
    assert read(prompt=[USER], completion=[GOOD], label=True) == ([USER], [GOOD], None)
    assert read(completion=[SYSTEM, USER, BAD], label=False) == ([SYSTEM, USER], None, [BAD])


def test_keys_that_a_columnar_file_filled_with_null_do_not_reach_the_template():
    message = {"role": "user", "content": "Q", "tool_calls": None, "name": None}
    assert read(prompt=[message], chosen=[GOOD], rejected=[BAD])[0] == [USER]


@pytest.mark.parametrize(("value", "expected"), [(0.3, 0.3), (1, 1.0), ("0.75", 0.75), (None, None), ("", None)])
def test_a_soft_label_may_be_any_probability_or_absent(value, expected):
    row = text_row({"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": value}, "paired")
    assert row.preference_probability == expected
    assert not row.dropped


def test_nan_is_an_absent_soft_label():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": float("nan")}
    assert text_row(row, "paired").preference_probability is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": " \n", "rejected": "b"}, Dropped.CHOSEN_EMPTY),
        ({"prompt": "Q", "chosen": "a", "rejected": ""}, Dropped.REJECTED_EMPTY),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, Dropped.IDENTICAL),
        ({"chosen": "Q a", "rejected": "Q a"}, Dropped.IDENTICAL),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, Dropped.IDENTICAL),
        ({"chosen": "a", "rejected": "b"}, Dropped.NO_SHARED_PROMPT),
        ({"chosen": [GOOD], "rejected": [BAD]}, Dropped.NO_SHARED_PROMPT),
        ({"chosen": "Q? yes", "rejected": "Q?"}, Dropped.REJECTED_EMPTY),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, Dropped.PROMPT_EMPTY),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}], "rejected": [BAD]},
            Dropped.CHOSEN_EMPTY,
        ),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, Dropped.CHOSEN_EMPTY),
        ({"prompt": "Q", "completion": "", "label": True}, Dropped.COMPLETION_EMPTY),
        ({"prompt": "Q", "completion": None, "label": True}, Dropped.COMPLETION_NULL),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, Dropped.PROMPT_NULL),
        ({"prompt": "Q", "chosen": None, "rejected": "b"}, Dropped.CHOSEN_NULL),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, Dropped.REJECTED_NULL),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": 1.01}, Dropped.PROBABILITY),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": -0.1}, Dropped.PROBABILITY),
    ],
)
def test_a_row_that_teaches_nothing_is_dropped_with_its_reason(row, reason):
    assert dropped(**row) == reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": 5, "rejected": "b"},
        {"prompt": {"text": "Q"}, "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": ["a"], "rejected": ["b"]},
        {"prompt": "Q", "chosen": [{"from": "gpt", "value": "a"}], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [{"role": "assistant", "content": 5}], "rejected": [BAD]},
        {"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": "likely"},
        {"prompt": "Q", "chosen": "a", "rejected": "b", "preference_probability": True},
        {"prompt": "Q", "completion": "a", "label": "perhaps"},
        {"prompt": "Q", "completion": "a", "label": None},
        {"prompt": "Q", "completion": "a", "label": 2},
        {"completion": "a", "label": True},
        {"prompt": "Q", "chosen": "half \ud800 pair", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "half \ud800 pair"}], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{not json"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "chat_template_kwargs": [1]},
    ],
)
def test_a_value_of_the_wrong_type_is_an_error(row):
    with pytest.raises(BadRow):
        text_row(row, kind_of(row))


def test_columns_give_roles_to_other_names_and_the_names_decide_the_kind():
    values = by_role(
        {"q": "Q", "best": "a", "worst": "b", "id": 3}, {"prompt": "q", "chosen": "best", "rejected": "worst"}
    )
    assert values == {"prompt": "Q", "chosen": "a", "rejected": "b"}
    assert kind_of(values) == "paired"
    assert kind_of({"completion": 1, "label": 1}) == "unpaired"
    assert kind_of({"chosen": 1, "label": 1}) is None


WORDS = st.lists(st.sampled_from(["sky", "skyline", "is", "a", "你好", "longer"]), max_size=6).map(" ".join)


@given(WORDS, WORDS, WORDS)
def test_the_shared_beginning_is_shared_and_ends_a_word(start, first, second):
    first, second = f"{start} {first}", f"{start} {second}"
    end = shared_beginning(first, second)
    assert first[:end] == second[:end]
    if end < min(len(first), len(second)):
        assert first[end] == " " or end == 0


def test_a_language_without_spaces_is_split_where_it_differs():
    first, second = "天" * 60 + "你", "天" * 60 + "我"
    assert shared_beginning(first, second) == 60


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [line for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_of_the_page_on_data_is_a_row_that_is_used(line):
    row = json.loads(line)
    assert set(row) <= set(COLUMNS)
    assert not dropped(**row)


def test_the_page_on_data_names_every_column_and_every_reason():
    assert [column for column in COLUMNS if f"`{column}`" not in PAGE and f'"{column}"' not in PAGE] == []
    assert [reason.value for reason in Dropped if f"* {reason.value}\n" not in PAGE] == []
