"""The learning rate and every due date are pure functions of the step."""

from __future__ import annotations

import pytest

from prefopt.schedule import is_due, learning_rate_at, steps_of


def rates(schedule: str, total: int = 20, warmup: float = 0.2) -> list[float]:
    return [learning_rate_at(step, total=total, peak=1.0, warmup=warmup, schedule=schedule) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_first_step_already_moves_and_the_peak_is_reached_at_the_end_of_the_warmup(schedule):
    found = rates(schedule)
    assert found[0] == pytest.approx(0.25)
    assert found[3] == found[4] == max(found) == 1.0


def test_cosine_and_linear_fall_and_constant_does_not():
    assert rates("cosine")[12] == pytest.approx(0.5)
    assert rates("linear")[12] == pytest.approx(0.5)
    assert rates("cosine")[8] > rates("linear")[8]
    assert set(rates("constant")[4:]) == {1.0}
    assert 0 < rates("cosine")[-1] < 0.02


def test_no_warmup():
    assert rates("linear", warmup=0)[0] == 1.0


@pytest.mark.parametrize(
    ("share", "total", "steps"), [(0.1, 30, 3), (0.1, 200, 20), (0.25, 10, 3), (0.1, 5, 1), (5, 100, 5), (0.07, 100, 7)]
)
def test_a_share_of_the_run_or_a_number_of_steps(share, total, steps):
    assert steps_of(share, total) == steps


def test_due_dates():
    assert [step for step in range(1, 11) if is_due(step, 0.25, 10)] == [3, 6, 9]
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8]
    assert not any(is_due(step, every, 10) for step in range(1, 11) for every in (None, 0))
