# SPDX-License-Identifier: Apache-2.0
"""Intervals, verdicts and steps to the target agree with what is worked out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from ahm_engines.study.statistics import (
    Interval,
    Verdict,
    detectable_effect,
    judge,
    mean_and_sd,
    paired_bootstrap,
    running_mean,
    seeds_needed,
    speed_up,
    steps_to_target,
    t_test_power,
)


def test_the_interval_of_many_normal_differences_is_the_one_of_the_textbook() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.05, size=400)
    interval = paired_bootstrap(differences.tolist())
    half = 1.96 * differences.std(ddof=1) / math.sqrt(400)
    assert interval.mean == pytest.approx(differences.mean()) and interval.count == 400
    assert interval.low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(differences.mean() + half, abs=0.05 * half)


def test_the_interval_of_three_differences_by_hand() -> None:
    # 27 equally likely samples: all-smallest has 1 / 27 = 3.7 %, more than the 2.5 % below the interval
    interval = paired_bootstrap([1.0, 2.0, 6.0])
    assert (interval.low, interval.high) == (1.0, 6.0)


def test_a_wider_level_gives_a_wider_interval_and_a_seed_the_same_one() -> None:
    differences = [0.1, 0.4, -0.2, 0.3, 0.6, 0.2]
    narrow, wide = paired_bootstrap(differences, level=0.5), paired_bootstrap(differences, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert paired_bootstrap(differences, seed=3) == paired_bootstrap(differences, seed=3)


@pytest.mark.parametrize("differences", [[], [0.3], [0.3, 0.4], [0.3] * 3, [0.0] * 4, [0.61 - 0.6, 0.71 - 0.7, 0.01]])
def test_no_interval_is_made_up_and_no_warning_given_where_there_is_no_spread(differences: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = paired_bootstrap(differences)
    assert math.isnan(interval.low) and math.isnan(interval.high) and interval.count == len(differences)
    assert judge(interval) is Verdict.NO_INTERVAL
    assert interval.mean == pytest.approx(np.mean(differences)) if differences else math.isnan(interval.mean)


def test_differences_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differences: expected finite numbers, got \[0.1, nan\]"):
        paired_bootstrap([0.1, math.nan])


@pytest.mark.parametrize(
    ("low", "high", "count", "p_value", "verdict"),
    [
        *[(0.1, 0.3, 5, 0.01, Verdict.SHOWN), (-0.3, -0.1, 5, 0.01, Verdict.SHOWN), (0.1, 0.3, 4, 0.01, Verdict.HINT)],
        *[(0.1, 0.3, 5, 0.06, Verdict.HINT), (-0.3, -0.1, 50, 0.05, Verdict.HINT)],
        *[(-0.1, 0.3, 50, 0.01, Verdict.NOT_SHOWN), (0.0, 0.3, 50, 0.01, Verdict.NOT_SHOWN)],
        (-0.3, 0.0, 5, 0.01, Verdict.NOT_SHOWN),
    ],
)
def test_shown_takes_five_seeds_an_interval_on_one_side_of_zero_and_the_t_test(
    low: float, high: float, count: int, p_value: float, verdict: Verdict
) -> None:
    assert judge(Interval((low + high) / 2, low, high, count, p_value)) is verdict


def test_the_p_value_is_the_one_of_the_textbook() -> None:
    """Mean 1.8, deviation sqrt(0.7), five differences: t = 4.81 with 4 degrees of freedom."""
    assert paired_bootstrap([1.0, 2.0, 3.0, 2.0, 1.0]).p_value == pytest.approx(0.0086, abs=5e-5)


def test_five_seeds_show_something_one_time_in_twenty_at_most_where_nothing_differs() -> None:
    differences = np.random.default_rng(0).normal(size=(400, 5))
    shown = [judge(paired_bootstrap(row.tolist(), resamples=500)) is Verdict.SHOWN for row in differences]
    assert 0.01 < np.mean(shown) < 0.08


@pytest.mark.parametrize(("effect", "count", "expected"), [(0.5, 34, 0.81), (1.0, 10, 0.80), (0.8, 15, 0.82)])
def test_power_is_that_of_the_tables(effect: float, count: int, expected: float) -> None:
    """G*Power 3.1, difference of two dependent means, two-sided 0.05."""
    assert t_test_power(effect, count) == pytest.approx(expected, abs=0.005)
    assert t_test_power(0.0, count) == pytest.approx(0.05)


@pytest.mark.parametrize("count", [5, 8, 16])
def test_what_is_called_detectable_is_shown_eight_times_in_ten(count: int) -> None:
    random = np.random.default_rng(count)
    differences = random.normal(detectable_effect(count), size=(400, count))
    shown = [judge(paired_bootstrap(row.tolist(), resamples=500)) is Verdict.SHOWN for row in differences]
    assert 0.74 < np.mean(shown) < 0.86


@pytest.mark.parametrize("count", [5, 32, 100, 1000])
def test_any_number_of_seeds_has_its_detectable_effect(count: int) -> None:
    assert t_test_power(detectable_effect(count), count) == pytest.approx(0.8)
    assert all(0.99 < t_test_power(effect, count) <= 1.0 for effect in (3.0, 10.0))


def test_the_seeds_needed_are_the_fewest() -> None:
    for effect in (0.1, 0.3, 0.7, 1.2):
        fewest = seeds_needed(effect)
        assert t_test_power(effect, fewest) >= 0.8 > t_test_power(effect, fewest - 1)
    assert seeds_needed(10.0) == 5
    assert seeds_needed(1.001 * detectable_effect(16)) == 16


def test_too_few_seeds_and_no_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="count: expected at least 5 seeds, got 4"):
        detectable_effect(4)
    with pytest.raises(ValueError, match="effect: expected a number above 0, got 0"):
        seeds_needed(0)


def test_mean_and_standard_deviation_by_hand() -> None:
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2.0)))
    assert mean_and_sd([4.0])[0] == 4.0 and math.isnan(mean_and_sd([4.0])[1])
    assert math.isnan(mean_and_sd([])[0])


def test_the_running_mean_looks_back_only() -> None:
    smoothed = running_mean([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    assert np.isnan(smoothed[:2]).all() and smoothed[2:].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert np.isnan(running_mean([1.0, 1.0])).all()


def test_one_lucky_validation_does_not_reach_the_target() -> None:
    steps = [10, 20, 30, 40, 50, 60]
    assert steps_to_target(steps, [0.0, 0.9, 0.0, 0.6, 0.6, 0.6], target=0.6) == 60.0
    assert steps_to_target(steps, [0.0, 0.9, 0.0, 0.6, 0.6, 0.6], target=0.6, smoothing=1) == 20.0


def test_what_is_never_reached_is_none_and_so_is_what_is_undefined() -> None:
    assert steps_to_target([10, 20, 30], [0.5, 0.5, 0.5], target=0.6) is None
    assert steps_to_target([10, 20, 30], [0.9, math.nan, 0.9], target=0.6) is None
    assert steps_to_target([10, 20], [0.9, 0.9], target=0.6) is None
    assert steps_to_target([], [], target=0.6) is None


def test_steps_must_fit_the_values_and_rise() -> None:
    with pytest.raises(ValueError, match="values: expected one per step, 2, got 1"):
        steps_to_target([10, 20], [0.5], target=0.6)
    with pytest.raises(ValueError, match="steps: expected rising ones"):
        steps_to_target([10, 10, 20], [0.5, 0.5, 0.5], target=0.6)


def test_the_ratio_is_a_geometric_mean_over_the_seeds_where_both_reached_the_target() -> None:
    scratch = {0: 100.0, 1: 100.0, 2: None, 3: 100.0, 4: 100.0}
    ratio = speed_up(scratch, {0: 50.0, 1: 200.0, 2: 10.0, 3: None, 9: 1.0})
    assert ratio.ratio == pytest.approx(1.0)  # 2 and 1/2
    assert (ratio.low, ratio.high, ratio.both, ratio.slower) == (0.5, 2.0, 2, 1)
    assert (ratio.reached, ratio.count) == (3, 4)  # seed 9 is not one of scratch's


def test_without_a_seed_where_both_reached_it_there_is_no_ratio() -> None:
    ratio = speed_up({0: 100.0}, {0: None})
    assert math.isnan(ratio.ratio) and (ratio.both, ratio.reached, ratio.count) == (0, 0, 1)
