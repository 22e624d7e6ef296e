"""What gives way in a long row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.report import Dropped
from prefopt.data.truncation import plan_cut

LENGTHS = st.integers(1, 40)
ROWS = st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=3), st.integers(2, 50), st.integers(0, 1))


@given(ROWS, st.sampled_from(["completion", "prompt", "drop"]))
def test_a_row_that_is_kept_fits_and_every_side_keeps_a_token(row, truncation):
    prompt, completions, max_length, bos = row
    plan = plan_cut(prompt, completions, max_length=max_length, truncation=truncation, bos=bos)
    if isinstance(plan, Dropped):
        return
    kept = plan.head + plan.tail
    assert kept >= 1
    assert all(1 <= after <= before for after, before in zip(plan.completions, completions, strict=True))
    assert kept + max(plan.completions) <= max_length


@given(ROWS, st.sampled_from(["completion", "prompt", "drop"]))
def test_a_row_that_fits_is_not_touched(row, truncation):
    prompt, completions, _, bos = row
    plan = plan_cut(prompt, completions, max_length=prompt + max(completions), truncation=truncation, bos=bos)
    assert (plan.head + plan.tail, plan.completions) == (prompt, tuple(completions))


@given(ROWS)
def test_completion_keeps_the_whole_prompt_and_drops_only_where_no_room_is_left(row):
    prompt, completions, max_length, bos = row
    plan = plan_cut(prompt, completions, max_length=max_length, truncation="completion", bos=bos)
    if prompt >= max_length:
        assert plan is Dropped.PROMPT_TOO_LONG
    else:
        assert plan.tail == prompt
        assert plan.completions == tuple(min(length, max_length - prompt) for length in completions)


@given(ROWS)
def test_prompt_cuts_no_more_of_the_prompt_than_the_longest_completion_needs(row):
    prompt, completions, max_length, bos = row
    plan = plan_cut(prompt, completions, max_length=max_length, truncation="prompt", bos=bos)
    if isinstance(plan, Dropped):
        assert max_length <= bos + 1
        return
    kept = plan.head + plan.tail
    if kept < prompt:
        assert plan.head == bos
        assert kept == max(max_length - max(completions), bos + 1)
    if plan.completions != tuple(completions):
        assert kept == min(prompt, bos + 1)


@given(ROWS)
def test_drop_cuts_nothing(row):
    prompt, completions, max_length, bos = row
    plan = plan_cut(prompt, completions, max_length=max_length, truncation="drop", bos=bos)
    if prompt + max(completions) > max_length:
        assert plan in (Dropped.TOO_LONG, Dropped.PROMPT_TOO_LONG)
        assert (plan is Dropped.PROMPT_TOO_LONG) == (prompt >= max_length)
