# SPDX-License-Identifier: Apache-2.0
"""What the actor-critic alone has: the scale of its rewards and the schedule of its entropy."""

from __future__ import annotations

import pytest
import torch

from ahm_networks import ActorCriticMasker

HIDDEN = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize("mean", [2.0, 0.0, -2.0])
def test_logarithm_of_a_negative_reward_is_that_of_none(mean: float) -> None:
    masker = ActorCriticMasker(2, 8, reward_scale="log")
    masker.reward_moments.mean.fill_(mean)
    scaled = masker._scaled(torch.tensor([[-3.0, 0.0, 4.0]]), HIDDEN)[0]
    assert torch.isfinite(scaled).all()
    assert scaled[0] == scaled[1] < scaled[2]
    if mean > 0:
        torch.testing.assert_close(scaled, torch.tensor([0.001, 0.001, 2.001]).log())


def test_logarithm_is_of_the_ratio_to_the_mean_of_rewards_that_count() -> None:
    masker = ActorCriticMasker(2, 8, reward_scale="log")
    decision = masker(torch.rand(2, 1, 32, 32))
    reward = torch.full((2, 1, 32, 32), -6.0)
    reward[0] = 4.0
    masker.loss([(decision, reward)])
    assert float(masker.reward_moments.mean) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_weight": 0.01}, r"entropy_weight: expected two numbers in \[0, inf\], got 0.01"),
        ({"entropy_weight": (0.1, -0.1)}, r"entropy_weight: expected two numbers in \[0, inf\], got \(0.1, -0.1\)"),
        ({"entropy_floor": 80.0}, r"entropy_floor: expected a number in \[0, 1\], got 80.0"),
        ({"entropy_floor": -0.1}, r"entropy_floor: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_entropy_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActorCriticMasker(2, 8, **options)
