# SPDX-License-Identifier: Apache-2.0
"""The network is trained on hidden voxels and nothing else; deeply supervised ones at all their heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from ahm_engines.losses import DeepSupervision, MaskedLoss, hidden_mean
from ahm_transforms.masking.functional import image_to_cells

LOSSES = [
    pytest.param(MaskedLoss("l1"), id="l1"),
    pytest.param(MaskedLoss("l2"), id="l2"),
    pytest.param(MaskedLoss("l2", patch_size=4), id="l2 per patch"),
]


def case(channels: int = 1, size: tuple[int, ...] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, channels, *size, generator=generator)
    pred = torch.rand(2, channels, *size, generator=generator)
    mask = torch.rand(2, 1, *size, generator=generator) > 0.5
    return pred, image, mask


@pytest.mark.parametrize(("norm", "expected"), [("l1", (0.5 + 1.0 + 2.0) / 3), ("l2", (0.25 + 1.0 + 4.0) / 3)])
def test_loss_is_the_mean_error_over_the_hidden_voxels_of_the_batch(norm: str, expected: float) -> None:
    image = torch.zeros(2, 1, 1, 2)
    pred = torch.tensor([[[[0.5, -1.0]]], [[[2.0, 100.0]]]])
    mask = torch.tensor([[[[True, True]]], [[[True, False]]]])
    assert float(MaskedLoss(norm)(pred, image, mask)) == pytest.approx(expected)


def test_error_is_averaged_over_the_channels() -> None:
    pred = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert torch.equal(MaskedLoss("l1").error(pred, torch.zeros(1, 2, 2, 2)), torch.full((1, 1, 2, 2), 2.0))


def test_error_of_half_precision_predictions_is_float32() -> None:
    pred, image, _ = case()
    assert MaskedLoss().error(pred.bfloat16(), image).dtype == torch.float32


def test_predictions_of_another_shape_are_refused() -> None:
    pred, image, mask = case()
    with pytest.raises(ValueError, match=r"pred: expected the image's shape \(2, 1, 8, 8\), got \(2, 2, 1, 8, 8\)"):
        MaskedLoss()(torch.stack([pred, pred], dim=1), image, mask)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_hidden_gives_zero_and_finite_gradients(loss: MaskedLoss) -> None:
    pred, image, mask = case()
    pred.requires_grad_()
    value = loss(pred, image, torch.zeros_like(mask))
    value.backward()
    assert float(value.detach()) == 0.0
    assert pred.grad is not None and torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize("loss", LOSSES)
def test_visible_voxels_never_count_not_even_when_they_are_not_finite(loss: MaskedLoss) -> None:
    pred, image, mask = case()
    spoilt = pred.masked_fill(~mask, float("nan"))
    assert torch.equal(loss(spoilt, image, mask), loss(pred, image, mask))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_zero_on_visible_voxels_and_only_there(loss: MaskedLoss) -> None:
    pred, image, mask = case(channels=3)
    pred.requires_grad_()
    loss(pred, image, mask).backward()
    assert pred.grad is not None
    moved = pred.grad != 0
    assert torch.equal(moved, mask.expand_as(moved))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (8, 6, 5)])
def test_per_patch_targets_have_mean_0_and_deviation_1_and_can_be_undone(size: tuple[int, ...]) -> None:
    _, image, _ = case(size=size)
    loss = MaskedLoss("l1", patch_size=4)
    target = loss.error(torch.full_like(image, -10.0), image) - 10.0  # |p - t| = t - p, as no target is below -10
    assert torch.allclose(image_to_cells(target, 4), torch.zeros(()), atol=1e-4)
    assert torch.allclose(image_to_cells(target.square(), 4), torch.ones(()), atol=1e-3)
    assert torch.allclose(loss.to_intensity(target, image), image, atol=1e-5)


def test_per_patch_targets_by_hand() -> None:
    image = torch.tensor([[[[0.0, 2.0, 5.0, 7.0]]]])  # two patches, means 1 and 6, deviations 1
    loss = MaskedLoss("l2", patch_size=(1, 2))
    assert torch.allclose(loss.error(torch.zeros_like(image), image), torch.ones_like(image))
    right = torch.tensor([[[[-1.0, 1.0, -1.0, 1.0]]]])
    assert torch.allclose(loss.error(right, image), torch.zeros_like(image), atol=1e-6)
    assert torch.allclose(loss.to_intensity(right, image), image, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patch_statistics_of_half_precision_images(dtype: torch.dtype) -> None:
    image = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 300).to(dtype)
    loss, pred = MaskedLoss("l2", patch_size=4), torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(loss.to_intensity(pred, image), loss.to_intensity(pred, image.float()))


def test_noise_in_flat_patches_is_not_blown_up() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    image[0, 0, 0, 0] = 1e-4  # in a patch of air
    error = MaskedLoss("l1", patch_size=4).error(torch.zeros_like(image), image)
    assert float(error[..., :4].max()) < 0.01


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images_give_finite_losses(value: float) -> None:
    image = torch.full((1, 1, 8, 8), value)
    loss = MaskedLoss("l2", patch_size=4)(torch.zeros_like(image), image, torch.ones_like(image, dtype=torch.bool))
    assert torch.isfinite(loss) and float(loss) < 1.0


def test_without_patches_predictions_are_intensities_already() -> None:
    pred, image, _ = case()
    assert MaskedLoss().to_intensity(pred, image) is pred


def test_hidden_mean_ignores_what_is_not_hidden() -> None:
    error = torch.tensor([[[[1.0, float("inf"), 3.0]]]])
    assert float(hidden_mean(error, torch.tensor([[[[True, False, True]]]]))) == 2.0


def test_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="norm: expected 'l1' or 'l2', got 'huber'"):
        MaskedLoss("huber")


def squared(pred: Tensor, label: Tensor) -> Tensor:
    """Mean squared error, which insists on equal grids."""
    return nn.functional.mse_loss(pred, label.float())


def test_heads_count_half_as_much_with_every_level() -> None:
    heads = torch.stack([torch.full((2, 1, 4, 4), value) for value in (0.0, 1.0, 2.0)], dim=1)
    value = DeepSupervision(squared)(heads, torch.zeros(2, 1, 4, 4))
    assert float(value) == pytest.approx((4 * 0 + 2 * 1 + 1 * 4) / 7)


def test_heads_that_agree_have_the_loss_of_one() -> None:
    pred, label = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    loss = DeepSupervision(squared)
    assert float(loss(torch.stack([pred] * 4, dim=1), label)) == pytest.approx(float(squared(pred, label)))
    assert torch.equal(loss(pred, label), squared(pred, label))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_coarser_heads_meet_integer_labels(dtype: torch.dtype) -> None:
    label = torch.arange(4).repeat_interleave(4).view(1, 1, 4, 4).to(dtype)
    seen: list[Tensor] = []
    DeepSupervision(lambda pred, label: seen.append(label) or pred.sum())([torch.zeros(1, 1, 4, 4)] * 2, label)
    DeepSupervision(lambda pred, label: seen.append(label) or pred.sum())([torch.zeros(1, 1, 2, 2)], label)
    assert [each.dtype for each in seen] == [dtype] * 3
    assert seen[-1].flatten().tolist() == [1, 1, 3, 3]


def test_coarser_heads_meet_a_label_of_their_size() -> None:
    label = torch.zeros(1, 1, 4, 4)
    label[..., 2:] = 1
    value = DeepSupervision(squared)([label, torch.zeros(1, 1, 2, 2)], label)
    assert float(value) == pytest.approx((2 * 0 + 1 * 0.5) / 3)


def test_a_deeply_supervised_network_trains_all_its_heads_and_validates_plainly() -> None:
    arguments: dict[str, Any] = {"kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "filters": [4, 4, 4, 4]}
    network = DynUNet(2, 1, 2, upsample_kernel_size=[2, 2, 2], deep_supervision=True, deep_supr_num=2, **arguments)
    loss = DeepSupervision(DiceCELoss(to_onehot_y=True, softmax=True))
    image, label = MetaTensor(torch.rand(1, 1, 16, 16)), MetaTensor(torch.ones(1, 1, 16, 16, dtype=torch.uint8))
    loss(network(image), label).backward()
    for head in (network.output_block, *network.deep_supervision_heads):
        assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    network.eval()
    assert loss(network(image), label).shape == ()
