# SPDX-License-Identifier: Apache-2.0
"""The U-Net with a depth-wise convolution at its bottleneck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.utils import convert_to_torchscript
from torch import Tensor, nn

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import ContextUNet, encoder_features, encoder_stages


def build(dims: int = 2, **options: Any) -> ContextUNet:
    torch.manual_seed(0)
    return ContextUNet(dims, **{"features": (4, 6, 8), **options}).eval()


def context_of(network: nn.Module) -> nn.Module:
    (context,) = (module for module in network.modules() if getattr(module, "groups", 1) > 1)
    return context


def seen_at_the_bottleneck(network: nn.Module, image: Tensor) -> tuple[int, ...]:
    seen: list[Tensor] = []
    context_of(network).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(image)
    return tuple(seen[0].shape[1:])


@pytest.mark.parametrize("size", [(32, 24), (33, 19), (4, 7), (16, 12, 8), (9, 17, 5)])
def test_image_of_any_size_keeps_it(size: tuple[int, ...]) -> None:
    image = torch.rand(2, 3, *size)
    network = build(len(size), in_channels=3, out_channels=5).train()
    rebuilt = network(image)
    assert rebuilt.shape == (2, 5, *size)
    rebuilt.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_levels_of_the_paper() -> None:
    network = ContextUNet().eval()
    assert [tuple(map.shape[1:]) for map in encoder_features(network, torch.rand(1, 1, 300, 300))] == [
        (16, 300, 300),
        (32, 150, 150),
        (64, 75, 75),
        (64, 37, 37),
        (128, 18, 18),
        (128, 9, 9),
    ]
    widths = [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [
        16,
        16,
        32,
        32,
        64,
        64,
        64,
        64,
        128,
        128,
        128,
        128,
        128,
        128,
        128,
        64,
        64,
        64,
        64,
        32,
        32,
        16,
        16,
        1,
    ]


def test_as_a_backbone_it_is_padded() -> None:
    network = ReconstructionUNet(2, backbone="contextunet").eval()
    assert seen_at_the_bottleneck(network, torch.rand(1, 1, 300, 300)) == (128, 10, 10)


@pytest.mark.parametrize("dims", [2, 3])
def test_number_of_weights(dims: int) -> None:
    kernel = 3**dims
    encoder = (1 * 2 + 2 * 2 + 2 * 4 + 4 * 4) * kernel + 2 + 2 + 4 + 4  # weights and biases of four convolutions
    context = 4 * 5**dims + 4  # one kernel per channel
    decoder = 4 * 2 * 2**dims + 2 + ((2 + 2) * 2 + 2 * 2) * kernel + 2 + 2
    norms, head = 2 * (2 + 4 + 2), 2 + 1
    network = ContextUNet(dims, features=(2, 4))
    assert sum(weight.numel() for weight in network.parameters()) == encoder + context + decoder + norms + head
    assert sum(weight.numel() for weight in context_of(network).parameters()) == context


def test_context_spreads_along_space_and_not_to_other_channels() -> None:
    context, image = context_of(build(context_kernel=5)), torch.zeros(1, 8, 9, 9)
    before = context(image)
    image[0, 3, 4, 4] = 1.0
    moved = (context(image) - before)[0].abs() > 0
    assert moved.flatten(1).sum(1).tolist() == [0, 0, 0, 25, 0, 0, 0, 0]
    assert bool(moved[3, 2:7, 2:7].all())


def test_context_is_what_the_encoder_ends_with() -> None:
    network, image, seen = build(), torch.rand(1, 1, 16, 16), []
    context_of(network).register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = encoder_features(network, image)
    assert len(seen) == 1 and features[-1] is seen[0]


def test_context_is_what_the_decoder_gets() -> None:
    network, image = build(), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        before = network(image)
        context_of(network).weight.zero_()
        assert not torch.equal(network(image), before)


def test_blocks_are_convolution_norm_activation_convolution() -> None:
    for block in (encoder_stages(build())[0][0], build().body.up.convs):
        leaves = [type(module) for module in block.modules() if not list(module.children())]
        assert [kind for kind in leaves if kind is not nn.Dropout] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(module[0]) for (module,) in encoder_stages(build())[1:2]] == [nn.MaxPool2d]


def test_norm_activation_and_dropout_can_be_chosen() -> None:
    network = build(norm="instance", act="prelu", dropout=0.5)
    kinds = {type(module) for module in network.modules()}
    assert {nn.InstanceNorm2d, nn.PReLU} <= kinds and not kinds & {nn.BatchNorm2d, nn.ReLU}
    image = torch.rand(1, 1, 16, 16)
    assert torch.equal(network(image), network(image))
    network.train()
    assert not torch.equal(network(image), network(image))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_takes_any_size() -> None:
    network = build()
    scripted = convert_to_torchscript(network)
    for size in ((16, 16), (33, 19)):
        image = torch.rand(1, 1, *size)
        assert torch.equal(scripted(image), network(image))


class TestErrors:
    def test_one_level(self) -> None:
        with pytest.raises(ValueError, match=r"features: expected the channels of two levels or more, got \(4,\)"):
            ContextUNet(features=(4,))

    @pytest.mark.parametrize("width", [4, 0, -1])
    def test_kernel_without_a_middle(self, width: int) -> None:
        with pytest.raises(ValueError, match=f"context_kernel: expected an odd width, got {width}"):
            ContextUNet(context_kernel=width)
