# SPDX-License-Identifier: Apache-2.0
"""The two peers, end to end, on images with a planted hard region: one hides it, the other learns to show it.

A tenth of the cells cannot be rebuilt; the whole mask is chosen, a quarter of the cells, so that chance hides a quarter
of the hard ones. All is checked on images that were not trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
from torch import nn

from ahm_networks import Masker
from ahm_networks.maskers import TeacherErrorMasker, VisibleSamplingMasker
from tests.fixtures_planted import Planted

Train = Callable[..., Planted]
EPOCHS = {2: 15, 3: 8}

two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def teacher(dims: int, patch: int, ratio: float, network: nn.Module) -> Masker:
    return TeacherErrorMasker(dims, patch, ratio, network=network)


def untaught(dims: int, patch: int, ratio: float, network: nn.Module) -> Masker:
    """Its teacher follows a network that nobody trains."""
    return TeacherErrorMasker(dims, patch, ratio, network=copy.deepcopy(network))


def sampling(dims: int, patch: int, ratio: float, network: nn.Module) -> Masker:
    return VisibleSamplingMasker(dims, patch, ratio)


@pytest.fixture(scope="module")
def train_sampling(train_planted: Train) -> Callable[[int], Planted]:
    """Train the sampling once for each number of axes."""
    return cache(lambda dims: train_planted(sampling, dims, epochs=12, learning_rate=1e-3))


@two_and_three_d
def test_teacher_errors_hide_the_hard_region_twice_as_often_as_chance(dims: int, train_planted: Train) -> None:
    trained = train_planted(teacher, dims, epochs=EPOCHS[dims], learning_rate=0.0)
    assert trained.times_chance(trained.drawn) >= 2.0
    assert trained.times_chance(trained.most_probable) >= 2.0
    assert trained.mean_overlap() < 0.5


@two_and_three_d
def test_a_teacher_that_is_taught_nothing_does_not(dims: int, train_planted: Train) -> None:
    trained = train_planted(untaught, dims, epochs=2, learning_rate=0.0)
    assert trained.times_chance(trained.drawn) < 1.5
    assert trained.times_chance(trained.most_probable) < 1.5


@two_and_three_d
def test_sampling_learns_to_show_the_hard_region(dims: int, train_sampling: Callable[[int], Planted]) -> None:
    trained = train_sampling(dims)
    assert trained.times_chance(trained.most_probable) <= 0.5
    assert trained.times_chance(trained.drawn) < 0.9
    assert trained.mean_overlap() < 0.5


@two_and_three_d
def test_sampling_does_not_collapse(dims: int, train_sampling: Callable[[int], Planted]) -> None:
    trained = train_sampling(dims)
    assert trained.entropy > 0.9
    assert trained.drawn.float().mean(0).max() < 0.9  # no place is hidden in every image


@two_and_three_d
def test_frozen_sampling_shows_it_no_more_than_the_rest(dims: int, train_planted: Train) -> None:
    trained = train_planted(sampling, dims, epochs=1, learning_rate=1e-3, frozen=True)
    assert trained.times_chance(trained.most_probable) > 0.7
    assert 0.9 < trained.times_chance(trained.drawn) < 1.1
