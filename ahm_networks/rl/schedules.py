# SPDX-License-Identifier: Apache-2.0
"""Numbers that follow the progress of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

__all__ = ["LinearSchedule", "check_ends", "check_share"]


def check_ends(name: str, ends: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Return the values of ``name`` at the start and at the end of its schedule.

    Raises:
        ValueError: when they are not two numbers in [low, high].
    """
    pair = isinstance(ends, Sequence) and len(ends) == 2
    if not pair or not all(isinstance(end, Real) and low <= end <= high for end in ends):
        raise ValueError(f"{name}: expected two numbers in [{low:g}, {high:g}], got {ends!r}.")
    return ends[0], ends[1]


def check_share(name: str, share: float) -> float:
    """Return ``share`` if it lies in [0, 1].

    Raises:
        ValueError: for any other value (NaN included).
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {share!r}.")
    return share


@dataclass(frozen=True)
class LinearSchedule:
    """``first`` until ``start``, ``last`` from ``end`` on, a line in between; a jump where the two are equal.

    Args:
        first: value at the start of the training.
        last: value at its end.
        start: share of the training, in [0, 1], at which the change begins.
        end: share at which it is over.

    Raises:
        ValueError: when ``0 <= start <= end <= 1`` does not hold.

    Example:
        >>> LinearSchedule(1.0, 0.0, start=0.2, end=0.6)(0.5)
        0.25
    """

    first: float
    last: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"start, end: expected 0 <= start <= end <= 1, got {self.start!r} and {self.end!r}.")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``, in [0, 1]."""
        if progress < self.start:
            return self.first
        if progress >= self.end:
            return self.last
        return self.first + (self.last - self.first) * (progress - self.start) / (self.end - self.start)
