# SPDX-License-Identifier: Apache-2.0
"""The networks by name, as pretraining builds them."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import ContextUNet
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


class TestErrors:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"backbone: expected one of unet, .* got 'resnet'"):
            backbone_network("resnet", 2, 1, 1)

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
