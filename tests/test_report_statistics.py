"""The comparisons of a report: right under the null, as sensitive as they say, and exact where theory is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prefopt.report.statistics import (
    compare,
    compare_apart,
    detectable,
    holm,
    mean_interval,
    power,
    spread_between_seeds,
)

SIMULATED = 1000


def differences(generator, seeds, prompts, by_seed, by_prompt, rest, mean=0.0):
    """Differences of two losses: a part for the seed, one for the prompt, one for each cell."""
    return (
        mean
        + by_seed * generator.standard_normal((seeds, 1))
        + by_prompt * generator.standard_normal((1, prompts))
        + rest * generator.standard_normal((seeds, prompts))
    )


PARTS = [(0.0, 0.3), (0.1, 0.3), (0.03, 0.0), (0.1, 0.0)]


# with one seed nothing can be said of seeds, and the report says so
@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_prompt"),
    [(1, 0.0, 0.3), (1, 0.0, 0.0), *((seeds, *parts) for seeds in (2, 3, 5) for parts in PARTS)],
)
def test_the_same_loss_under_two_names_is_called_different_in_at_most_7_of_100_cases(seeds, by_seed, by_prompt):
    generator = np.random.default_rng(seeds)
    found = 0
    for _ in range(SIMULATED):
        table = differences(generator, seeds, 100, by_seed, by_prompt, 0.3)
        found += compare(table, np.zeros_like(table)).p < 0.05
    assert found <= 0.07 * SIMULATED


@pytest.mark.parametrize("prompts", [10, 30, 100])
@pytest.mark.parametrize("seeds", [2, 3])
def test_right_and_wrong_answers_that_tie_are_no_certainty(seeds, prompts):
    generator = np.random.default_rng(seeds * prompts)
    found, certain = 0, 0
    for _ in range(SIMULATED):
        hard = generator.random((1, prompts))  # of each prompt, the same for both
        one, other = ((generator.random((seeds, prompts)) < hard).astype(float) for _ in range(2))
        comparison = compare(one, other)
        found += comparison.p < 0.05
        certain += comparison.standard_error == 0.0 != comparison.difference
        certain += compare_apart(one, other).standard_error == 0.0 != comparison.difference
    assert found <= 0.07 * SIMULATED
    assert not certain


@pytest.mark.parametrize("seeds", [(2, 2), (2, 5), (4, 4)])
@pytest.mark.parametrize("by_seed", [0.0, 0.03, 0.1])
def test_runs_of_other_seeds_are_called_different_in_at_most_7_of_100_cases(seeds, by_seed):
    generator = np.random.default_rng(sum(seeds))
    found = 0
    for _ in range(SIMULATED):
        common = 0.3 * generator.standard_normal((1, 100))  # a prompt is as hard for one as for the other
        one, other = (common + differences(generator, count, 100, by_seed, 0.1, 0.3) for count in seeds)
        found += compare_apart(one, other).p < 0.05
    assert found <= 0.07 * SIMULATED


def test_with_one_prompt_other_seeds_are_welchs_test():
    one, other = np.array([[0.3], [0.5], [0.45], [0.8]]), np.array([[0.2], [0.45], [0.5]])
    expected = stats.ttest_ind(one[:, 0], other[:, 0], equal_var=False)
    comparison = compare_apart(one, other)
    assert comparison.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert not comparison.paired


def test_six_losses_together_know_better_what_a_seed_does_and_are_as_right_under_the_null():
    generator = np.random.default_rng(0)
    alone, together, found = [], [], 0
    for _ in range(150):
        runs = differences(generator, 3, 100, 0.0, 0.3, 0.0)[None] + np.stack(
            [differences(generator, 3, 100, 0.05, 0.1, 0.3) for _ in range(6)]
        )
        spread = spread_between_seeds(runs.mean(2))
        comparison = compare(runs[0], runs[1], spread=spread)
        found += comparison.p < 0.05
        together.append(comparison.detectable())
        alone.append(compare(runs[0], runs[1]).detectable())
    assert found <= 0.1 * 150
    assert np.median(together) < 0.8 * np.median(alone)


@pytest.mark.parametrize(("seeds", "by_seed"), [(3, 0.0), (5, 0.03), (10, 0.1)])
def test_a_real_difference_is_found_as_often_as_the_report_predicts(seeds, by_seed):
    generator = np.random.default_rng(seeds)
    true = 3 * (by_seed**2 / seeds + 0.3**2 / 100 + 0.3**2 / (100 * seeds)) ** 0.5
    found, predicted = [], []
    for _ in range(400):
        table = differences(generator, seeds, 100, by_seed, 0.3, 0.3, true)
        comparison = compare(table, np.zeros_like(table))
        found.append(comparison.p < 0.05)
        predicted.append(comparison.power(true))
    assert np.mean(found) == pytest.approx(np.mean(predicted), abs=0.08)


def test_with_one_prompt_for_each_seed_it_is_the_paired_t_test():
    one, other = np.array([[0.3], [0.5], [0.45], [0.8]]), np.array([[0.2], [0.45], [0.5], [0.5]])
    comparison = compare(one, other)
    expected = stats.ttest_rel(one[:, 0], other[:, 0])
    assert comparison.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval()
    assert (comparison.low, comparison.high) == pytest.approx((low, high), rel=1e-6)


def test_one_seed_permutes_the_signs_of_the_prompts_exactly_where_they_are_few():
    values = np.array([[0.5, 0.2, 0.4, 0.1]])
    assert compare(values, np.zeros_like(values)).p == pytest.approx(2 / 16)


def test_equal_results_are_not_different():
    table = np.random.default_rng(0).random((3, 30))
    comparison = compare(table, table)
    assert comparison.difference == 0.0
    assert comparison.p == 1.0


def test_swapping_the_two_turns_the_sign_and_nothing_else():
    generator = np.random.default_rng(1)
    one, other = generator.random((3, 40)), generator.random((3, 40))
    there, back = compare(one, other), compare(other, one)
    assert (there.difference, there.low, there.p) == pytest.approx((-back.difference, -back.high, back.p))


def test_a_prompt_with_two_comparisons_counts_twice():
    one = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    weights = np.array([2.0, 1.0, 1.0])
    comparison = compare(one, np.zeros_like(one), weights)
    assert comparison.difference == pytest.approx(np.average(one.mean(0), weights=weights))
    assert mean_interval(one, weights)[0] == pytest.approx(comparison.difference)


def test_tables_of_different_runs_are_refused():
    with pytest.raises(ValueError, match=r"given \(2, 3\) and \(2, 4\)"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_holm_corrects_for_the_number_of_comparisons_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_with_many_degrees_of_freedom_power_is_that_of_the_normal_test():
    expected = stats.norm.sf(1.959964 - 2.8) + stats.norm.cdf(-1.959964 - 2.8)
    assert power(2.8, 1.0, 1e5) == pytest.approx(expected, abs=2e-3)
    assert detectable(1.0, 1e5) == pytest.approx(2.8016, abs=0.01)
    assert power(detectable(0.2, 4.0), 0.2, 4.0) == pytest.approx(0.8, abs=1e-3)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        low, high = mean_interval(differences(generator, 5, 60, 0.0, 0.3, 0.3, 1.0), draws=400)[1:]
        covered += low <= 1.0 <= high
    assert covered >= 0.9 * 200
