# SPDX-License-Identifier: Apache-2.0
"""Agents that hide boxes find a planted hard region, in their own action space.

Hard cells are scattered, so a box hides easy ones with them: boxes are small here. The regions' exploration is longer
than the paper's: at first the error of a network that has just begun depends on brightness, and an agent that settles
for that finds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from ahm_networks.maskers import BoxMasker, QRegionMasker

Build = Callable[[int, int, float, nn.Module], Any]


def boxes(**options: Any) -> Build:
    return lambda dims, patch, ratio, network: BoxMasker(dims, patch, ratio, **options)


def q_region(**options: Any) -> Build:
    return lambda dims, patch, ratio, network: QRegionMasker(dims, patch, ratio, **options)


FLAT = {2: (1, (1, 2)), 3: (1, (1, 1, 2))}
LONG = (0.6, 0.6)
LEARNING: dict[str, tuple[Build, int, int, float]] = {  # masker, axes, epochs, learning rate
    "boxes-2d": (boxes(sizes=(1, 2)), 2, 16, 6e-4),
    "boxes-3d": (boxes(sizes=FLAT[3], n_steps=8), 3, 16, 6e-4),
    "actor_critic-2d": (boxes(sizes=FLAT[2], n_steps=8, learner="actor_critic"), 2, 24, 6e-4),
    "actor_critic-3d": (boxes(sizes=FLAT[3], n_steps=8, learner="actor_critic"), 3, 18, 5e-4),
    "q_region-2d": (q_region(region_size=(1, 2), explore=LONG), 2, 24, 5e-4),
    "q_region-3d": (q_region(region_size=(1, 1, 2), explore=LONG), 3, 30, 3e-4),
}
FROZEN = ["boxes-2d", "actor_critic-3d", "q_region-2d"]


@pytest.fixture(scope="module")
def trained(train_planted: Callable[..., Any]) -> Callable[[str], Any]:
    """Train each once."""

    @functools.cache
    def train(name: str) -> Any:
        build, dims, epochs, learning_rate = LEARNING[name]
        return train_planted(build, dims, epochs=epochs, learning_rate=learning_rate)

    return train


@pytest.mark.parametrize("name", LEARNING)
def test_the_hard_region_is_hidden_at_least_twice_as_often_as_chance(name: str, trained: Callable[[str], Any]) -> None:
    found = trained(name)
    assert found.times_chance(found.drawn) >= 2.0
    assert found.times_chance(found.most_probable) >= 2.0


@pytest.mark.parametrize("name", FROZEN)
def test_the_same_check_fails_with_frozen_weights(name: str, train_planted: Callable[..., Any]) -> None:
    build, dims, _, learning_rate = LEARNING[name]
    found = train_planted(build, dims, epochs=2, learning_rate=learning_rate, frozen=True)
    assert found.times_chance(found.drawn) < 1.3


@pytest.mark.parametrize("name", LEARNING)
def test_different_images_get_different_masks(name: str, trained: Callable[[str], Any]) -> None:
    assert trained(name).mean_overlap() < 0.5
