# SPDX-License-Identifier: Apache-2.0
"""The networks by name, as pretraining builds them."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from monai.utils import ensure_tuple_rep

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import ContextUNet, ContrastiveEncoder
from ahm_networks.nets.backbones import BACKBONES, backbone_network, build_backbone

KINDS = {
    "unet": UNet,
    "basicunet": BasicUNet,
    "dynunet": DynUNet,
    "segresnet": SegResNet,
    "swinunetr": SwinUNETR,
    "unetr": UNETR,
    "contextunet": ContextUNet,
}
DIVISORS = {
    "unet": (16, 16),
    "basicunet": (16, 16),
    "dynunet": (16, 16),
    "segresnet": (8, 8),
    "swinunetr": (32, 32),
    "unetr": (32, 48),
    "contextunet": (32, 32),
}


@pytest.mark.parametrize("name", KINDS)
def test_plain_network_with_as_many_channels_as_asked_for(build, name):
    network = build(name, inputs=2, outputs=3)
    assert type(network) is KINDS[name]
    assert network(torch.rand(1, 2, 32, 32) if name != "swinunetr" else torch.rand(1, 2, 64, 64)).shape[1] == 3


@pytest.mark.parametrize("name", KINDS)
def test_state_keys_are_those_of_pretraining(build, pretrained, name):
    shapes = {key: tuple(value.shape) for key, value in build(name, outputs=1).state_dict().items()}
    stored = pretrained(name).state_dict()
    assert {key.removeprefix("backbone."): tuple(value.shape) for key, value in stored.items()} == shapes
    assert all(key.startswith("backbone.") for key in stored)


@pytest.mark.parametrize("name", KINDS)
def test_divisor(name):
    args = {"img_size": (32, 48), "hidden_size": 12, "num_heads": 2} if name == "unetr" else {}
    assert build_backbone(name, 2, 1, 1, args)[0] == DIVISORS[name]


def test_strides_beyond_the_channels_do_not_count():
    """A U-Net of three levels strides twice, however many strides there are."""
    network = backbone_network("unet", 2, 1, 1, crop_size=36, channels=(4, 8, 16))
    assert network(torch.rand(1, 1, 36, 36)).shape == (1, 1, 36, 36)
    assert ReconstructionUNet(2, backbone_args={"channels": (4, 8, 16)}).divisor == (4, 4)


def test_defaults_reach_the_network_and_can_be_overridden():
    assert backbone_network("unet", 2, 1, 1).channels == (16, 32, 64, 128, 256)
    assert backbone_network("segresnet", 2, 1, 1).init_filters == 16
    assert backbone_network("segresnet", 2, 1, 1, init_filters=8).init_filters == 8
    assert set(BACKBONES) == set(KINDS)


@pytest.mark.parametrize(("crop_size", "grid"), [((32, 48), (2, 3)), (32, (2, 2))])
def test_unetr_takes_the_crop_size_for_its_own(crop_size, grid):
    small = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
    assert backbone_network("unetr", 2, 1, 1, crop_size=crop_size, **small).feat_size == grid
    with pytest.raises(ValueError, match="crop_size: unetr needs multiples of"):
        backbone_network("unetr", 2, 1, 1, crop_size=crop_size, img_size=64, **small)


def test_pretraining_takes_the_size_of_the_images_for_a_unetr():
    small = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
    assert ReconstructionUNet(2, backbone="unetr", backbone_args=small, image_size=32).divisor == (32, 32)
    given = ReconstructionUNet(2, backbone="unetr", backbone_args=small | {"img_size": 48}, image_size=32)
    assert given.divisor == (48, 48)
    network = ContrastiveEncoder(2, backbone="unetr", backbone_args=small, image_size=(32, 48))
    assert network(torch.rand(2, 1, 32, 48)).shape == (2, 128)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [("unet", {}, 16), ("basicunet", {}, (16, 24)), ("dynunet", {}, 16), ("swinunetr", {"feature_size": 12}, 32)],
)
def test_crops_that_leave_one_voxel_to_instance_norms_are_refused(name, args, size):
    with pytest.raises(
        ValueError, match=rf"crop_size: {name} leaves one voxel .*; expected \((32, 32|64, 64)\) or more along one axis"
    ):
        backbone_network(name, 2, 1, 1, crop_size=size, **args)
    height, width = ensure_tuple_rep(size, 2)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        backbone_network(name, 2, 1, 1, **args)(torch.rand(2, 1, height, width))
    larger = backbone_network(name, 2, 1, 1, crop_size=(2 * height, width), **args)
    assert larger(torch.rand(2, 1, 2 * height, width)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "args"), [("segresnet", {"blocks_down": [1] * 5, "blocks_up": [1] * 4}), ("unet", {"norm": "batch"})]
)
def test_other_norms_take_one_voxel(name, args):
    network = backbone_network(name, 2, 1, 1, crop_size=16, **args)
    assert network(torch.rand(2, 1, 16, 16)).isfinite().all()


class TestErrors:
    def test_unknown_name_or_number_of_axes(self):
        with pytest.raises(ValueError, match=r"backbone: expected one of unet, .* got 'resnet'"):
            backbone_network("resnet", 2, 1, 1)
        with pytest.raises(ValueError, match="spatial_dims: expected 2 or 3, got 5"):
            backbone_network("unet", 5, 1, 2)

    @pytest.mark.parametrize("argument", ["chanels", "in_channels"])
    def test_unknown_argument_is_named_with_those_that_are_known(self, argument):
        with pytest.raises(ValueError, match=rf"unet does not take {argument}; it takes channels, strides"):
            ReconstructionUNet(2, backbone="unet", backbone_args={argument: 3})

    def test_unetr_needs_its_size(self):
        with pytest.raises(ValueError, match="unetr needs img_size"):
            backbone_network("unetr", 2, 1, 1)

    @pytest.mark.parametrize("size", [40, (32, 24), (32, 32, 32), 0])
    def test_size_that_unetr_cannot_take(self, size):
        with pytest.raises(ValueError, match="expected an img_size of 2 multiples of 16"):
            backbone_network("unetr", 2, 1, 1, img_size=size)
