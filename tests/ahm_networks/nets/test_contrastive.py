# SPDX-License-Identifier: Apache-2.0
"""The contrastive encoder: every backbone, and the way of its weights into the networks of labelled tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahm_networks.nets import (
    ContrastiveEncoder,
    EncoderClassifier,
    ReconstructionUNet,
    encoder_features,
    encoder_stages,
    transfer_weights,
)
from ahm_networks.nets.padding import pad_to_multiples

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 2},
    "basicunet": {"features": (4, 4, 4, 8, 8, 4)},
    "dynunet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "filters": [4, 8, 8]},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    "swinunetr": {"feature_size": 12},
    "unetr": {"img_size": 32, "feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
}
MONAI_LEAVES_OUT = "norm_cross_attn"  # ViT blocks hold this norm and never use it
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
every_backbone = pytest.mark.parametrize("backbone", SMALL)


def network_of(backbone: str = "unet", dims: int = 2, channels: int = 1, **options: Any) -> ContrastiveEncoder:
    torch.manual_seed(0)
    return ContrastiveEncoder(dims, channels, backbone=backbone, backbone_args=SMALL[backbone], **options)


def images(dims: int, channels: int = 1, size: tuple[int, ...] | None = None) -> Tensor:
    return torch.rand(3, channels, *(size or (32, 27, 30)[:dims]), generator=torch.Generator().manual_seed(0))


@two_and_three_d
@every_backbone
def test_images_of_any_size_reach_every_weight(backbone: str, dims: int) -> None:
    network = network_of(backbone, dims, channels=2, projection_size=5)
    vectors = network(images(dims, channels=2))
    assert vectors.shape == (3, 5) and vectors.dtype == torch.float32
    (vectors * torch.randn(3, 5)).sum().backward()
    weights = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    assert not [name for name, weight in weights if weight.grad is None or not weight.grad.any()]
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    assert all(MONAI_LEAVES_OUT in name for name in frozen)


@two_and_three_d
def test_maps_are_told_apart_behind_an_instance_norm(dims: int) -> None:
    """Every channel of both has the average 0; averaged as they are, no image would differ from another."""
    network = network_of(dims=dims)
    maps = F.instance_norm(torch.rand(2, 8, *[4] * dims, generator=torch.Generator().manual_seed(0)))
    inner = network.head[:-1](maps)
    assert (inner[0] - inner[1]).abs().max() > 0.01


def test_vectors_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network_of()(images(2)).dtype == torch.float32


@every_backbone
def test_features_are_those_of_the_reconstruction_network(backbone: str) -> None:
    """The same keys and the same values: masked and contrastive pretraining have one encoder."""
    network, masked = network_of(backbone), ReconstructionUNet(2, backbone=backbone, backbone_args=SMALL[backbone])
    inside = {key: value for key, value in network.state_dict().items() if key.startswith("backbone.")}
    assert inside.keys() <= masked.state_dict().keys()
    masked.load_state_dict(inside, strict=False)
    image = images(2, size=(32, 32))
    with torch.no_grad():
        own, other = encoder_features(network.eval(), image), encoder_features(masked.eval(), image)
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@two_and_three_d
@every_backbone
def test_nothing_of_the_decoder_is_left(backbone: str, dims: int) -> None:
    network = network_of(backbone, dims)
    encoder = {id(p) for stage in encoder_stages(network) for module in stage for p in module.parameters()}
    assert {id(p) for p in network.backbone.parameters()} == encoder


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backbone", ["unet", "segresnet", "unetr", "swinunetr"])
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_every_weight_of_the_encoder_is_matched(
    build: Callable[..., nn.Module], backbone: str, dims: int, task: str
) -> None:
    source = network_of(backbone, dims)
    if task == "segmentation":
        network = build(backbone, dims, outputs=3, seed=1, **SMALL[backbone])
    else:
        network = EncoderClassifier(dims, 1, 3, backbone=backbone, backbone_args=SMALL[backbone])
    report = transfer_weights(network, source.state_dict(), part="encoder")
    assert report.share == 1.0
    assert not report.missing and not report.other_shape and not report.adapted
    assert len(report.matched) == len([key for key in source.state_dict() if key.startswith("backbone.")])
    assert all(key.startswith("head.") for key in report.unused)
    image = images(dims, size=(32,) * dims)
    with torch.no_grad():
        expected = encoder_features(source.eval(), image)[-1]
    if task == "segmentation":
        assert torch.equal(encoder_features(network.eval(), image)[-1], expected)


def test_smallest_images_keep_more_than_one_voxel_at_the_bottom() -> None:
    assert network_of().train()(images(2, size=(4, 3))).shape == (3, 128)


@pytest.mark.parametrize(
    ("size", "divisor", "fixed", "expected"),
    [
        ((8, 16), [8, 8], False, (8, 16)),
        ((7, 9), [8, 4], False, (8, 12)),
        ((8, 5), [8, 8], False, (8, 16)),
        ((8, 5), [8, 8], True, (8, 8)),
        ((3, 4, 5), [4, 4, 4], False, (4, 4, 8)),
    ],
)
def test_padding_is_added_at_the_end(size: Any, divisor: list[int], fixed: bool, expected: Any) -> None:
    image = torch.rand(1, 2, *size) + 1
    padded = pad_to_multiples(image, divisor, fixed)
    assert padded.shape[2:] == expected
    inside = (..., *(slice(n) for n in size))
    assert torch.equal(padded[inside], image)
    assert padded.sum() == pytest.approx(float(image.sum()))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backbone": "resnet"}, "backbone: expected one of unet"),
        ({"backbone": "unet", "backbone_args": {"depth": 3}}, "backbone_args: unet does not take depth"),
        ({"backbone": "unetr"}, "unetr needs img_size"),
        ({"projection_size": 0}, "projection_size, hidden_size: expected at least 1, got 0 and 256"),
        ({"hidden_size": 0}, "expected at least 1, got 128 and 0"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        ContrastiveEncoder(2, **options)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "shape", "told"),
    [
        ("unet", (2, 2, 32, 32), "image: expected [B, 1, *S] with 2 spatial axes, got shape (2, 2, 32, 32)"),
        ("unet", (2, 1, 32, 32, 32), "got shape (2, 1, 32, 32, 32)"),
        ("unetr", (2, 1, 40, 40), "this UNETR was built for img_size=[32, 32]"),
    ],
)
def test_images_that_do_not_fit(backbone: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError) as error:
        network_of(backbone)(torch.rand(shape))
    assert told in str(error.value)
