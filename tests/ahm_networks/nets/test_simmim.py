# SPDX-License-Identifier: Apache-2.0
"""SimMIM: a learned token stands in for what is hidden, and the encoder moves to UNETR and SwinUNETR."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from ahm_engines import MaskedLoss
from ahm_networks import UniformMasker
from ahm_networks.nets import EncoderClassifier, SimMIM, backbone_network, tokens_to_image, transfer_weights
from ahm_transforms.masking.functional import image_to_cells

VIT: dict[str, Any] = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
SWIN: dict[str, Any] = {"feature_size": 12, "window_size": 4, "depths": (1, 1, 1, 1)}
ARGS: dict[str, dict[str, Any]] = {
    "unetr": VIT | {"num_layers": 2},
    "swinunetr": SWIN,
    "swinunetr v2": SWIN | {"use_v2": True},
}
PATCHES = {2: (16, 8), 3: (8, 16, 8)}
SIZES = {2: (32, 64), 3: (32, 32, 32)}

every_backbone = pytest.mark.parametrize("kind", ARGS)
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def build(kind: str, dims: int = 2, channels: int = 2, **args: Any) -> SimMIM:
    torch.manual_seed(0)
    network = SimMIM(
        dims,
        channels,
        img_size=SIZES[dims],
        backbone=kind.split()[0],
        patch_size=PATCHES[dims],
        encoder_args=ARGS[kind] | args,
    )
    with torch.no_grad():  # norms are the identity and biases zero at first: nothing would tell whether they are used
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        network.mask_token.normal_()
    return network.eval()


def example(dims: int = 2, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    image = torch.rand(2, channels, *SIZES[dims], generator=torch.Generator().manual_seed(seed))
    return image, UniformMasker(dims, PATCHES[dims], 0.6, seed=seed)(image).mask


def encoder_of(network: SimMIM) -> nn.Module:
    return network.vit if network.backbone == "unetr" else network.swinViT


def first_layer(network: SimMIM) -> nn.Module:
    if network.backbone == "unetr":
        return network.vit.patch_embedding.patch_embeddings
    return network.swinViT.patch_embed


def plain(network: SimMIM, image: Tensor, mask: Tensor) -> Tensor:
    """MONAI's own encoder, whose first layer is made to put out mask tokens; then the head."""

    def with_tokens(layer: nn.Module, inputs: Any, features: Tensor) -> Tensor:
        hidden = image_to_cells(mask, network.token_size, reduction="max") > 0
        return torch.where(hidden, network.mask_token.view(1, -1, *[1] * (image.ndim - 2)), features)

    hook = first_layer(network).register_forward_hook(with_tokens)
    encoded = encoder_of(network)(image)
    hook.remove()
    last = encoded[0] if network.backbone == "unetr" else encoded[-1].flatten(2).transpose(1, 2)
    return tokens_to_image(network.head(last), network.stride, image.shape[2:], image.shape[1])


@two_and_three_d
@every_backbone
class TestForward:
    def test_equals_monai_s_encoder_with_mask_tokens(self, kind, dims):
        network = build(kind, dims)
        image, mask = example(dims)
        with torch.no_grad():
            rebuilt = network(image, mask)
            assert rebuilt.shape == image.shape
            assert torch.allclose(rebuilt, plain(network, image, mask), atol=1e-5)

    @pytest.mark.parametrize("value", [math.nan, 1e6])
    def test_hidden_voxels_cannot_leak(self, kind, dims, value):
        network = build(kind, dims).train()
        image, mask = example(dims)
        rebuilt = network(image.masked_fill(mask, value), mask)
        with torch.no_grad():
            assert torch.equal(rebuilt, network(image, mask))
        rebuilt.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)

    def test_visible_voxels_and_the_mask_count(self, kind, dims):
        network = build(kind, dims)
        image, mask = example(dims)
        zeros, other = torch.zeros_like(image), example(dims, seed=1)[1]
        with torch.no_grad():
            rebuilt = network(zeros, mask)
            assert not torch.allclose(network(image.masked_fill(mask, 0.0), mask), rebuilt)
            assert not torch.allclose(network(zeros, other), rebuilt)

    def test_gradients_reach_every_weight_that_is_called(self, kind, dims):
        network = build(kind, dims).train()
        image, mask = example(dims)
        MaskedLoss("l2")(network(image, mask), image, mask).backward()
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in network.named_parameters() if "norm_cross_attn" in name}
        for name, parameter in network.named_parameters():
            assert name in frozen or parameter.grad.abs().sum() > 0, name

    def test_bfloat16_autocast(self, kind, dims):
        if (kind, dims) == ("swinunetr v2", 3):
            pytest.skip("torch's bfloat16 convolutions on CPUs read uninitialised memory for maps of 2x2x2 voxels")
        network = build(kind, dims).train()
        image, mask = example(dims)
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = network(image, mask)
        with torch.no_grad():
            assert torch.allclose(rebuilt.float(), network(image, mask), atol=0.2)
        MaskedLoss()(rebuilt, image, mask).backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@every_backbone
def test_no_value_is_read_by_the_host(kind):
    """Tensors without values: whatever asked for one would fail."""
    image, mask = example()
    network = build(kind).to("meta")
    assert network(image.to("meta"), mask.to("meta")).shape == image.shape


@pytest.mark.parametrize("kind", ["unetr", "swinunetr"])
def test_images_may_differ_in_the_number_of_hidden_tokens(kind):
    network = build(kind)
    image, mask = example()
    mask[0] = False
    with torch.no_grad():
        together = network(image, mask)
        assert torch.allclose(together[:1], network(image[:1], mask[:1]), atol=1e-5)
        assert torch.allclose(together[1:], network(image[1:], mask[1:]), atol=1e-5)


def test_token_hidden_in_part_is_hidden():
    network = build("unetr")
    image, mask = example()
    mask[:] = False
    mask[..., 3, 5] = True
    changed = image.clone()
    changed[..., 0:16, 0:8] = 7.0
    assert torch.equal(network(changed, mask), network(image, mask))
    changed[..., 0, 8] += 1.0
    assert not torch.equal(network(changed, mask), network(image, mask))


@pytest.mark.parametrize("kind", ["unetr", "swinunetr"])
def test_head_is_a_convolution_and_a_pixel_shuffle(kind):
    torch.manual_seed(0)
    network = SimMIM(2, img_size=64, backbone=kind, encoder_args=ARGS[kind])
    image = torch.rand(1, 1, 64, 64)
    step = network.stride[0]
    encoded = encoder_of(network)(image)
    last = encoded[0].transpose(1, 2).unflatten(2, (4, 4)) if kind == "unetr" else encoded[-1]
    convolved = nn.functional.conv2d(last, network.head.weight[..., None, None], network.head.bias)
    assert torch.allclose(network(image), pixelshuffle(convolved, 2, step), atol=1e-5)


@every_backbone
def test_without_a_mask_nothing_is_hidden(kind):
    network = build(kind)
    image, mask = example()
    assert torch.equal(network(image), network(image, torch.zeros_like(mask)))


def test_token_sizes():
    assert build("unetr", 3).token_size == (8, 16, 8)
    assert build("swinunetr", 3).token_size == (2, 2, 2)


def test_swin_takes_other_multiples_later_on():
    image = torch.rand(1, 2, 96, 32)
    assert build("swinunetr")(image, image[:, :1] > 0.5).shape == image.shape


class TestErrors:
    def test_unknown_backbone(self):
        with pytest.raises(ValueError, match="backbone: expected one of unetr, swinunetr, got 'unet'"):
            SimMIM(2, img_size=32, backbone="unet")

    @pytest.mark.parametrize(("kind", "known"), [("unetr", "hidden_size"), ("swinunetr", "patch_size")])
    def test_unknown_argument_is_named_with_those_that_are_known(self, kind, known):
        with pytest.raises(ValueError, match=rf"encoder_args: .* does not take wdith; it takes {known}"):
            SimMIM(2, img_size=32, backbone=kind, encoder_args={"wdith": 3})

    def test_vit_takes_one_size(self):
        with pytest.raises(ValueError, match=r"built for img_size=\[32, 64\], got \[64, 64\]"):
            build("unetr")(torch.rand(1, 2, 64, 64))

    def test_swin_takes_multiples_of_32(self):
        with pytest.raises(ValueError, match=r"image: swinunetr needs multiples of \(32, 32\), got \(48, 64\)"):
            build("swinunetr")(torch.rand(1, 2, 48, 64))
        with pytest.raises(ValueError, match=r"img_size: swinunetr needs multiples of \(32, 32\), got \(40, 40\)"):
            SimMIM(2, img_size=40, backbone="swinunetr")

    def test_mask_that_is_no_mask(self):
        image, mask = example()
        with pytest.raises(ValueError, match="mask: expected bool"):
            build("unetr")(image, mask.float())


class TestTransfer:
    def source(self, kind: str, dims: int) -> SimMIM:
        torch.manual_seed(1)
        args = VIT if kind == "unetr" else ARGS[kind]
        network = SimMIM(dims, img_size=32, backbone=kind.split()[0], encoder_args=args)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    @pytest.mark.parametrize(("kind", "dims"), [("unetr", 2), *((kind, dims) for kind in ARGS for dims in (3,))])
    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("target", ["network", "classifier"])
    def test_every_key_bit_for_bit(self, kind, dims, prefix, target):
        source, name = self.source(kind, dims), kind.split()[0]
        args = VIT | {"img_size": 32, "feature_size": 4} if name == "unetr" else ARGS[kind]
        network = (
            backbone_network(name, dims, 1, 3, **args)
            if target == "network"
            else EncoderClassifier(dims, 1, 3, backbone=name, backbone_args=args)
        )
        report = transfer_weights(network, {prefix + key: value for key, value in source.state_dict().items()})
        assert report.share == 1 and not report.adapted and not report.missing
        inner = network if target == "network" else network.encoder
        own = (inner.vit if name == "unetr" else inner.swinViT).state_dict()
        stored = encoder_of(source).state_dict()
        assert own.keys() == stored.keys() and all(torch.equal(own[key], stored[key]) for key in stored)
        assert sorted(report.unused) == [prefix + key for key in ("head.bias", "head.weight", "mask_token")]

    def test_defaults_of_swin_are_those_of_the_backbone(self):
        ours = SimMIM(2, img_size=96, backbone="swinunetr").swinViT
        theirs = backbone_network("swinunetr", 2, 1, 2)
        assert isinstance(theirs, SwinUNETR) and str(ours) == str(theirs.swinViT)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.swinViT.state_dict().items()
        }

    def test_state_dict_round_trip(self):
        network, other = build("swinunetr v2"), build("swinunetr v2", drop_rate=0.0)
        image, mask = example()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
            assert not torch.equal(other(image, mask), network(image, mask))
            other.load_state_dict(network.state_dict())
            assert torch.equal(other(image, mask), network(image, mask))
