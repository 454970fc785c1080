# SPDX-License-Identifier: Apache-2.0
"""Maskers learn, end to end: trained with a network on images with a planted hard region, they hide it.

A tenth of the cells cannot be rebuilt; the whole mask comes from the policy, a quarter of the cells. By chance a mask
hides a quarter of the hard cells. All is checked on images that were not trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ahm_networks import ActorCriticMasker, LossPredictionMasker, Masker
from tests.fixtures_planted import Planted

MASKERS: dict[str, Callable[..., Masker]] = {"actor_critic": ActorCriticMasker, "loss_prediction": LossPredictionMasker}
NO_GUARD = {"credit": "patch", "entropy_floor": 0.0, "entropy_weight": (0.0, 0.0)}


@dataclass(frozen=True)
class Setup:
    """What to train, and for how long."""

    dims: int
    masker: str
    epochs: int
    learning_rate: float
    options: tuple[tuple[str, Any], ...] = ()
    frozen: bool = False


SETS_2D = Setup(2, "actor_critic", epochs=40, learning_rate=1e-3)  # long: it must not collapse either
SETS_3D = Setup(3, "actor_critic", epochs=40, learning_rate=5e-4)
LEARNING = {
    "sets-2d": SETS_2D,
    "sets-3d": SETS_3D,
    "bernoulli-2d": Setup(2, "actor_critic", 12, 1e-3, (("mode", "bernoulli"),)),
    "bernoulli-3d": Setup(3, "actor_critic", 16, 5e-4, (("mode", "bernoulli"),)),
    "loss_prediction-2d": Setup(2, "loss_prediction", 20, 1e-3),
    "loss_prediction-3d": Setup(3, "loss_prediction", 8, 5e-4),
}
FROZEN = {  # its masks do not depend on how long the network trains
    "sets-2d": Setup(2, "actor_critic", 3, 1e-3, frozen=True),
    "sets-3d": Setup(3, "actor_critic", 3, 1e-3, frozen=True),
}
UNGUARDED = Setup(2, "actor_critic", 20, 1e-3, tuple(NO_GUARD.items()))


@pytest.fixture(scope="module")
def train(train_planted: Callable[..., Planted]) -> Callable[[Setup], Planted]:
    """Train once for each setup."""

    @cache
    def run(setup: Setup) -> Planted:
        def build(dims: int, patch: int, ratio: float, network: nn.Module) -> Masker:
            return MASKERS[setup.masker](dims, patch, ratio, **dict(setup.options))

        return train_planted(
            build, setup.dims, epochs=setup.epochs, learning_rate=setup.learning_rate, frozen=setup.frozen
        )

    return run


@pytest.mark.parametrize("name", LEARNING)
def test_the_hard_region_is_hidden_at_least_twice_as_often_as_chance(
    name: str, train: Callable[[Setup], Planted]
) -> None:
    trained = train(LEARNING[name])
    assert trained.times_chance(trained.drawn) >= 2.0
    assert trained.times_chance(trained.most_probable) >= 2.0


@pytest.mark.parametrize("name", FROZEN)
def test_the_same_check_fails_with_a_frozen_policy(name: str, train: Callable[[Setup], Planted]) -> None:
    trained = train(FROZEN[name])
    assert trained.times_chance(trained.drawn) < 1.3


@pytest.mark.parametrize("name", LEARNING)
def test_different_images_get_different_masks(name: str, train: Callable[[Setup], Planted]) -> None:
    trained = train(LEARNING[name])
    assert trained.mean_overlap() < 0.5
    masks = trained.most_probable.flatten(1)
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(masks))


def test_a_longer_run_does_not_collapse(train: Callable[[Setup], Planted]) -> None:
    trained = train(SETS_2D)
    assert trained.entropy > 0.6
    assert trained.mean_overlap() < 0.9
    assert trained.drawn.float().mean(0).max() < 0.9  # no place is hidden in every image


def test_without_the_guards_the_entropy_falls(train: Callable[[Setup], Planted]) -> None:
    """So the entropy floor is what holds it in the run above."""
    assert train(UNGUARDED).entropy < 0.5 < 0.6 < train(SETS_2D).entropy
