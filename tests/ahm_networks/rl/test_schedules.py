# SPDX-License-Identifier: Apache-2.0
"""Numbers that follow the progress of the training."""

from __future__ import annotations

import math

import pytest

from ahm_networks.rl.schedules import LinearSchedule, check_ends


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.2, 1.0), (0.3, 0.8), (0.5, 0.4), (0.6, 0.2), (1.0, 0.2)],  # 0.8 down over 0.4: 0.2 for each tenth
)
def test_a_line_between_two_levels(progress: float, expected: float) -> None:
    assert LinearSchedule(1.0, 0.2, start=0.2, end=0.6)(progress) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.199, 1.0), (0.2, 0.05), (1.0, 0.05)])
def test_equal_ends_make_a_jump(progress: float, expected: float) -> None:
    assert LinearSchedule(1.0, 0.05, start=0.2, end=0.2)(progress) == expected


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 3.0), (0.25, 2.5), (1.0, 1.0)])
def test_the_whole_training_by_default(progress: float, expected: float) -> None:
    assert LinearSchedule(3.0, 1.0)(progress) == expected


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.5), (0.5, 0.4), (0.5, 1.1)])
def test_ends_out_of_order_or_range(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="start, end: expected 0 <= start <= end <= 1"):
        LinearSchedule(1.0, 0.0, start, end)


def test_two_ends_in_range() -> None:
    assert check_ends("epsilon", [1, 0.25], 0, 1) == (1, 0.25)
    assert check_ends("weight", (3.0, 0.0), 0, math.inf) == (3.0, 0.0)


@pytest.mark.parametrize("ends", [0.5, None, "ab", (0.5,), (0.1, 0.2, 0.3), (0.5, None), (5, -1), (0.0, math.nan)])
def test_other_ends_are_refused_by_name(ends: object) -> None:
    with pytest.raises(ValueError) as error:
        check_ends("epsilon", ends, 0, 1)
    assert str(error.value) == f"epsilon: expected two numbers in [0, 1], got {ends!r}."
