"""What is said of errors: the textbook's figures, with intervals that hold the truth as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefopt.reference.error_statistics import error_statistics, share_of


def test_the_statistics_are_those_of_the_textbook():
    errors = np.array([1.0, -1.0, 3.0, -5.0])
    found = error_statistics(errors, np.arange(4))
    assert (found.count, found.mean, found.mean_abs, found.max_abs) == (4, -0.5, 2.5, 5.0)
    assert found.rms == pytest.approx(3.0)
    hundred = np.random.default_rng(0).permutation(np.arange(1, 101)) * np.tile([1, -1], 50)
    assert error_statistics(hundred, np.arange(100)).p95_abs == 95


def test_one_prompt_has_no_interval_and_nothing_has_no_statistics():
    alone = error_statistics(np.array([1.0, 2.0]), np.array([7, 7]))
    assert alone.mean == 1.5
    assert alone.mean_interval is alone.p95_abs_interval is None
    assert share_of(np.array([True]), np.array([7])).interval is None
    assert error_statistics(np.empty(0), np.empty(0)) is None
    assert share_of(np.empty(0, dtype=bool), np.empty(0)) is None


def test_what_shares_a_prompt_does_not_count_as_more_evidence():
    generator = np.random.default_rng(0)
    errors, prompts = generator.normal(size=40), np.arange(40)
    once = error_statistics(errors, prompts)
    repeated = error_statistics(np.tile(errors, 8), np.tile(prompts, 8))
    np.testing.assert_allclose(repeated.mean_interval, once.mean_interval)
    np.testing.assert_allclose(repeated.rms_interval, once.rms_interval)
    np.testing.assert_allclose(repeated.p95_abs_interval, once.p95_abs_interval)
    naive = error_statistics(np.tile(errors, 8), np.arange(320))
    assert np.ptp(naive.mean_interval) < 0.5 * np.ptp(once.mean_interval)


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    held = dict.fromkeys(("mean", "mean_abs", "rms"), 0)
    # Three comparisons of each of 60 prompts share half of their variance, which is 1 in all.
    truth = {"mean": 0.0, "mean_abs": math.sqrt(2 / math.pi), "rms": 1.0}
    for _ in range(200):
        shared = np.repeat(generator.normal(size=60), 3)
        found = error_statistics((shared + generator.normal(size=180)) / math.sqrt(2), np.repeat(np.arange(60), 3))
        for name, value in truth.items():
            low, high = getattr(found, f"{name}_interval")
            held[name] += low <= value <= high
    assert all(0.88 * 200 <= times <= 0.99 * 200 for times in held.values()), held


def test_a_share_of_none_is_not_certain_to_be_none():
    none = share_of(np.zeros(100, dtype=bool), np.arange(100))
    assert none.share == 0
    assert none.interval == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    every = share_of(np.ones(100, dtype=bool), np.arange(100))
    assert every.interval == (pytest.approx(0.025 ** (1 / 100)), 1.0)
    half = share_of(np.arange(100) < 50, np.arange(100))
    assert half.interval[0] == pytest.approx(0.4, abs=0.03)
    assert half.interval[1] == pytest.approx(0.6, abs=0.03)
