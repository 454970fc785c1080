# SPDX-License-Identifier: Apache-2.0
"""Reconstruction from the visible voxels, with every backbone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import backbone_network, transfer_weights

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "basicunet": {"features": (4, 4, 4, 8, 8, 4)},
    "dynunet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "filters": [4, 8, 8]},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    "swinunetr": {"feature_size": 12},
    "unetr": {"img_size": 48, "feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
    "contextunet": {"features": (4, 8, 8), "context_kernel": 3},
}
ODD = {2: (35, 30), 3: (33, 20, 9)}  # more than one place is left at the bottom of every backbone

every_backbone = pytest.mark.parametrize("backbone", SMALL)
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def build(dims: int = 2, channels: int = 1, backbone: str = "unet", **options: Any) -> ReconstructionUNet:
    torch.manual_seed(0)
    return ReconstructionUNet(dims, channels, backbone=backbone, backbone_args=SMALL[backbone], **options).eval()


def example(dims: int, channels: int = 1, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, channels, *ODD[dims], generator=generator)
    return image, torch.rand(batch, 1, *ODD[dims], generator=generator) < 0.5


@two_and_three_d
@every_backbone
class TestBackbones:
    def test_any_size_comes_back_as_it_was(self, backbone: str, dims: int) -> None:
        network = build(dims, channels=2, backbone=backbone, mask_channel=True)
        image, mask = example(dims, channels=2)
        with torch.no_grad():
            rebuilt = network(image, mask)
        assert rebuilt.shape == image.shape
        assert torch.isfinite(rebuilt).all()

    def test_hidden_voxels_cannot_leak(self, backbone: str, dims: int) -> None:
        network = build(dims, backbone=backbone, mask_channel=True)
        image, mask = example(dims, batch=1)
        with torch.no_grad():
            expected = network(image, mask)
            assert torch.equal(network(image.masked_fill(mask, math.nan), mask), expected)
            assert not torch.equal(network(image.masked_fill(~mask, 0.5), mask), expected)


@pytest.mark.parametrize("fill", ["zero", "mean", "token"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_no_fill_lets_hidden_voxels_leak(fill: str, value: float) -> None:
    network = build(fill=fill)
    image, mask = example(2)
    assert torch.equal(network(image.masked_fill(mask, value), mask), network(image, mask))


def test_padding_does_not_change_what_fits() -> None:
    """A size that fits takes the backbone's own way; it sees the filled image and nothing else."""
    network = build()
    image, mask = torch.rand(1, 1, 32, 24), torch.rand(1, 1, 32, 24) < 0.5
    assert torch.equal(network(image, mask), network.backbone(image.masked_fill(mask, 0.0)))


def test_strides_that_differ_from_axis_to_axis() -> None:
    args = {"channels": (4, 8, 8), "strides": ((2, 1), (2, 3)), "num_res_units": 0}
    network = ReconstructionUNet(2, backbone_args=args)
    assert network.divisor == (4, 3)
    image = torch.rand(1, 1, 18, 20)
    assert network(image, image > 0.5).shape == image.shape


class TestFill:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]])
    mask = torch.tensor([[[[True, False], [False, False]]]])

    def test_zero(self) -> None:
        visible = build(channels=2).visible(self.image, self.mask)
        assert visible.tolist() == [[[[0.0, 2.0], [3.0, 4.0]], [[0.0, 20.0], [30.0, 40.0]]]]

    def test_mean_of_the_visible_voxels_of_each_channel(self) -> None:
        visible = build(channels=2, fill="mean").visible(self.image, self.mask)
        assert visible.tolist() == [[[[3.0, 2.0], [3.0, 4.0]], [[30.0, 20.0], [30.0, 40.0]]]]

    def test_mean_is_each_image_s_own(self) -> None:
        images = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 5.0)])
        visible = build(fill="mean").visible(images, torch.rand(2, 1, 4, 4) < 0.5)
        assert torch.equal(visible, images)

    def test_mean_of_nothing_is_zero(self) -> None:
        visible = build(fill="mean").visible(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool))
        assert visible.tolist() == torch.zeros(1, 1, 4, 4).tolist()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mean_of_many_voxels_in_half_precision(self, dtype: torch.dtype) -> None:
        image, mask = torch.ones(1, 1, 300, 300, dtype=dtype), torch.zeros(1, 1, 300, 300, dtype=torch.bool)
        mask[..., :20] = True
        visible = build(fill="mean").visible(image, mask)
        assert visible.dtype == dtype
        assert torch.equal(visible, image)

    def test_token_is_one_learned_number_per_channel(self) -> None:
        network = build(channels=2, fill="token")
        with torch.no_grad():
            network.token.copy_(torch.tensor([0.25, -7.0]))
        visible = network.visible(self.image, self.mask)
        assert visible.tolist() == [[[[0.25, 2.0], [3.0, 4.0]], [[-7.0, 20.0], [30.0, 40.0]]]]
        network(*example(2, channels=2)).sum().backward()
        assert network.token.grad.abs().min() > 0

    def test_image_is_left_alone(self) -> None:
        for fill in ("zero", "mean", "token"):
            before = self.image.clone()
            build(channels=2, fill=fill).visible(self.image, self.mask)
            assert torch.equal(self.image, before)


class Recorder(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return image[:, :1]


def test_mask_channel_comes_last() -> None:
    network = ReconstructionUNet(2, backbone=Recorder(), mask_channel=True)
    image, mask = example(2)
    network(image, mask)
    assert network.backbone.seen.shape[1] == 2
    assert torch.equal(network.backbone.seen[:, 1:], mask.float())


def test_own_network_gets_the_image_as_it_is() -> None:
    network = ReconstructionUNet(2, backbone=Recorder())
    image, mask = example(2)
    assert torch.equal(network(image, mask), image.masked_fill(mask, 0.0))


def test_arguments_for_deep_supervision_build_a_plain_network() -> None:
    args = {**SMALL["dynunet"], "deep_supervision": True, "deep_supr_num": 1}
    network = ReconstructionUNet(2, backbone="dynunet", backbone_args=args)
    image, mask = example(2)
    rebuilt = network(image, mask)
    assert rebuilt.shape == image.shape
    rebuilt.sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # no head waits for one in vain
    assert network.state_dict().keys() == build(backbone="dynunet").state_dict().keys()
    target = backbone_network("dynunet", 2, 1, 2, **args)
    assert transfer_weights(target, network.state_dict()).share == 1.0


@two_and_three_d
def test_default_arguments_train(dims: int) -> None:
    network = ReconstructionUNet(dims)
    image, mask = example(dims)
    network(image, mask).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


class TestErrors:
    def test_unknown_backbone(self) -> None:
        with pytest.raises(ValueError, match=r"backbone: expected one of unet, .* got 'resnet'"):
            ReconstructionUNet(2, backbone="resnet")

    def test_unknown_fill(self) -> None:
        with pytest.raises(ValueError, match="fill: expected one of zero, mean, token, got 'noise'"):
            ReconstructionUNet(2, fill="noise")

    def test_unetr_without_its_size(self) -> None:
        with pytest.raises(ValueError, match="backbone_args: unetr needs img_size"):
            ReconstructionUNet(2, backbone="unetr")

    def test_image_too_large_for_unetr(self) -> None:
        image = torch.rand(1, 1, 40, 49)
        with pytest.raises(ValueError, match=r"image: unetr was built for img_size=\[48, 48\], got \[40, 49\]"):
            build(backbone="unetr")(image, image > 0.5)

    @pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 1, 16, 16, 16), (1, 16, 16)])
    def test_image_that_does_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"image: expected \[B, 1, \*S\] with 2 spatial axes"):
            build()(torch.rand(shape), torch.zeros(shape, dtype=torch.bool))

    @pytest.mark.parametrize(
        "mask",
        [torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 8, 16).bool(), torch.zeros(1, 2, 16, 16).bool()],
        ids=["float", "size", "channels"],
    )
    def test_mask_that_does_not_fit(self, mask: Tensor) -> None:
        with pytest.raises(ValueError, match="mask: expected bool"):
            build()(torch.rand(1, 1, 16, 16), mask)


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_images_as_small_as_one_bottom_voxel_train(backbone):
    network = ReconstructionUNet(2, backbone=backbone)
    image = torch.rand(1, 1, 8, 8)
    rebuilt = network(image, torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    assert rebuilt.shape == image.shape and torch.isfinite(rebuilt).all()
