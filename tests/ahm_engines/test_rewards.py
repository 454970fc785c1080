# SPDX-License-Identifier: Apache-2.0
"""What a masker is rewarded for stays with its image and with its cell."""

from __future__ import annotations

import pytest
import torch

from ahm_engines.rewards import ErrorReward
from ahm_transforms.masking.functional import image_to_cells

REWARDS = [ErrorReward(), ErrorReward(clip=1.5), ErrorReward(clip=2.0, energy=0.5)]


def case(size: tuple[int, ...] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(2, 1, *size, generator=generator)
    pred = torch.rand(2, 3, *size, generator=generator)
    mask = torch.rand(2, 1, *size, generator=generator) > 0.5
    return error, pred, mask


def test_plain_reward_is_the_error() -> None:
    error, pred, mask = case()
    assert torch.equal(ErrorReward()(error, pred, mask), error)


def test_clip_by_hand_counts_hidden_voxels_only() -> None:
    error = torch.tensor([[[[1.0, 2.0, 9.0, 500.0]]]])
    mask = torch.tensor([[[[True, True, True, False]]]])  # mean hidden error 4
    reward = ErrorReward(clip=1.5)(error, error, mask)
    assert reward.flatten().tolist()[:3] == [1.0, 2.0, 6.0]


def test_energy_by_hand_adds_the_mean_square_of_the_prediction() -> None:
    error, mask = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    pred = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert float(ErrorReward(energy=0.5)(error, pred, mask)) == 0.5 * (1.0 + 9.0) / 2


@pytest.mark.parametrize("reward", REWARDS)
def test_no_gradient_flows_back_to_the_network(reward: ErrorReward) -> None:
    error, pred, mask = case()
    result = reward(error.requires_grad_(), pred.requires_grad_(), mask)
    assert not result.requires_grad and result.shape == error.shape


@pytest.mark.parametrize("reward", REWARDS)
def test_reward_of_an_image_does_not_depend_on_the_others_of_its_batch(reward: ErrorReward) -> None:
    error, pred, mask = case()
    before = reward(error, pred, mask)
    louder = error.clone()
    louder[0] *= 100.0
    after = reward(louder, pred, mask)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (8, 4, 6)])
@pytest.mark.parametrize("reward", [ErrorReward(), ErrorReward(energy=0.5)])
def test_error_in_one_patch_changes_the_reward_of_that_cell_alone(size: tuple[int, ...], reward: ErrorReward) -> None:
    patch = 4
    error, pred, mask = case(size)
    before = image_to_cells(reward(error, pred, mask), patch)
    cell = tuple(n - 1 for n in before.shape[2:])  # the last: a partial one where sizes are odd
    error[(0, 0, *[slice(c * patch, (c + 1) * patch) for c in cell])] += 1.0
    after = image_to_cells(reward(error, pred, mask), patch)
    changed = (after - before).abs() > 1e-6
    assert changed.nonzero().tolist() == [[0, 0, *cell]]
    assert float((after - before)[(0, 0, *cell)]) == pytest.approx(1.0, abs=1e-5)


def test_nothing_hidden_gives_no_nan() -> None:
    error, pred, mask = case()
    assert torch.isfinite(ErrorReward(clip=1.0)(error, pred, torch.zeros_like(mask))).all()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_clip_must_be_positive(clip: float) -> None:
    with pytest.raises(ValueError, match="clip: expected a positive number or None"):
        ErrorReward(clip=clip)
