# SPDX-License-Identifier: Apache-2.0
"""MAE: the encoder sees visible tokens, the decoder predicts hidden ones, and the encoder moves to UNETR."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.networks.nets import UNETR
from torch import Tensor

from ahm_engines import MaskedLoss
from ahm_networks import UniformMasker
from ahm_networks.nets import (
    EncoderClassifier,
    MaskedAutoencoder,
    backbone_network,
    image_to_tokens,
    tokens_to_image,
    transfer_weights,
)

SIZES = {2: ((16, 24), (8, 4)), 3: ((8, 4, 12), (4, 2, 4))}  # 12 tokens each
ARGS: dict[str, Any] = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_hidden_size": 8, "decoder_num_heads": 2}

two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def build(dims: int = 2, channels: int = 2, **args: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    size, patch = SIZES[dims]
    network = MaskedAutoencoder(
        dims, channels, img_size=size, patch_size=patch, encoder_args=ARGS | {"num_layers": 2} | args, **DECODER
    )
    with torch.no_grad():  # norms are the identity and biases zero at first: nothing would tell whether they are used
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def example(dims: int = 2, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    size, patch = SIZES[dims]
    image = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(seed))
    return image, UniformMasker(dims, patch, 0.6, seed=seed)(image).mask


def plain(network: MaskedAutoencoder, image: Tensor, mask: Tensor) -> Tensor:
    """One image, every step as in the paper: take out, encode, put back with mask tokens, decode, predict all."""
    tokens, vit = image_to_tokens(image, network.token_size), network.vit
    hidden = image_to_tokens(mask, network.token_size).all(-1)[0]
    encoded = vit.patch_embedding(image)[:, ~hidden]
    for block in vit.blocks:
        encoded = block(encoded)
    decoded = network.mask_token.repeat(1, len(hidden), 1)
    decoded[:, ~hidden] = network.decoder_embed(vit.norm(encoded))
    decoded = network.decoder_norm(network.decoder(decoded + network.decoder_positions))
    rebuilt = torch.where(hidden.view(1, -1, 1), network.head(decoded), tokens)
    return tokens_to_image(rebuilt, network.token_size, network.img_size, image.shape[1])


@two_and_three_d
class TestForward:
    @pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
    def test_equals_the_plain_way_image_by_image(self, dims, proj_type):
        network = build(dims, proj_type=proj_type)
        image, mask = example(dims)
        with torch.no_grad():
            expected = torch.cat([plain(network, image[i : i + 1], mask[i : i + 1]) for i in range(3)])
            assert torch.allclose(network(image, mask), expected, atol=1e-5)

    def test_visible_voxels_are_the_image_s_own(self, dims):
        image, mask = example(dims)
        rebuilt = build(dims)(image, mask)
        seen = ~mask.expand_as(image)
        assert torch.equal(rebuilt[seen], image[seen])
        assert (rebuilt != image)[~seen].float().mean() > 0.99

    @pytest.mark.parametrize("value", [math.nan, 1e6])
    def test_hidden_voxels_cannot_leak(self, dims, value):
        network = build(dims)
        image, mask = example(dims)
        assert torch.equal(network(image.masked_fill(mask, value), mask), network(image, mask))

    def test_visible_voxels_count(self, dims):
        network = build(dims)
        image, mask = example(dims)
        changed = image.clone()
        voxel = tuple((~mask[0, 0]).nonzero()[-1])
        changed[(0, 1, *voxel)] += 1
        hidden = mask.expand_as(image)
        differs = (network(changed, mask) != network(image, mask)) & hidden
        assert differs[0].sum() > 0.9 * hidden[0].sum() and not differs[1:].any()

    def test_the_mask_is_an_input(self, dims):
        network = build(dims)
        image, mask = example(dims)
        other = example(dims, seed=1)[1]
        both = (mask & other).expand_as(image)
        assert both.any() and not torch.equal(network(image, mask)[both], network(image, other)[both])

    def test_visible_tokens_are_encoded_and_hidden_ones_predicted_no_others(self, dims):
        network, seen = build(dims), {}
        for name in ("vit.blocks.0", "decoder.0", "head"):
            layer = network.get_submodule(name)
            layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[1]}))
        network(*example(dims))
        assert seen == {"vit.blocks.0": 5, "decoder.0": 12, "head": 7}

    def test_nothing_hidden_gives_the_image(self, dims):
        network = build(dims)
        image, mask = example(dims)
        assert torch.equal(network(image, torch.zeros_like(mask)), image)
        assert torch.equal(network(image), image)


@two_and_three_d
class TestGradients:
    def test_reach_every_weight_that_is_called(self, dims):
        network = build(dims).train()
        image, mask = example(dims)
        MaskedLoss("l2")(network(image, mask), image, mask).backward()
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in network.named_parameters() if "norm_cross_attn" in name}
        for name, parameter in network.named_parameters():
            assert name in frozen or parameter.grad.abs().sum() > 0, name

    def test_no_number_of_a_hidden_voxel_gets_there(self, dims):
        network = build(dims)
        image, mask = example(dims)
        image = image.masked_fill(mask, math.nan).requires_grad_()
        torch.where(mask, network(image, mask), 0.0).sum().backward()
        assert not torch.where(mask, image.grad, 0.0).any() and image.grad.abs().sum() > 0
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@two_and_three_d
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast(dims, dtype):
    network = build(dims).train()
    image, mask = example(dims)
    with torch.no_grad():
        expected = network(image, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt = network(image.to(dtype), mask)
    assert rebuilt.dtype == dtype
    assert torch.allclose(rebuilt.float(), expected, atol=0.1)
    MaskedLoss()(rebuilt, image, mask).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("with_mask", [True, False])
def test_batches_of_metatensors(with_mask):
    network, (image, mask) = build(), example()
    items = [{"image": MetaTensor(a), "mask": MetaTensor(b)} for a, b in zip(image, mask, strict=True)]
    batch = list_data_collate(items)
    pred = network(batch["image"], batch["mask"] if with_mask else None)
    assert torch.equal(pred.as_tensor(), network(image, mask if with_mask else None))


def test_weights_come_back_from_a_state_dict():
    network, other = build(), build()
    image, mask = example()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(other(image, mask), network(image, mask))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(image, mask), network(image, mask))


def test_learns_from_its_surroundings_how_bright_an_image_is():
    torch.manual_seed(0)
    network = MaskedAutoencoder(2, img_size=16, patch_size=4, encoder_args=ARGS | {"num_layers": 1}, **DECODER)
    masker, loss_function = UniformMasker(2, 4, 0.5), MaskedLoss("l2")
    image = torch.linspace(-1, 1, 8).view(8, 1, 1, 1).expand(8, 1, 16, 16)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        mask = masker(image).mask
        loss = loss_function(network(image, mask), image, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.1 * losses[0]


class TestErrors:
    def test_unequal_counts(self):
        image, mask = example()
        mask[0] = False
        mask[0, :, :8, :4] = True
        with pytest.raises(ValueError, match=r"equally many hidden tokens .* got \[1, 7\]; take a masker"):
            build()(image, mask)

    def test_token_hidden_in_part(self):
        image, mask = example()
        mask[0, 0, 0, 0] = ~mask[0, 0, 0, 0]
        with pytest.raises(ValueError, match=r"mask: 1 tokens of \(8, 4\) voxels are hidden in part; .* patch_size"):
            build()(image, mask)

    def test_nothing_visible(self):
        image, mask = example()
        with pytest.raises(ValueError, match="all 12 tokens are hidden, none is left"):
            build()(image, torch.ones_like(mask))

    def test_nothing_hidden_in_training(self):
        image, mask = example()
        with pytest.raises(ValueError, match=r"mask: none of the 12 tokens is hidden, .* raise mask_ratio"):
            build().train()(image, torch.zeros_like(mask))

    def test_image_of_another_size(self):
        with pytest.raises(ValueError, match=r"built for img_size=\[16, 24\], got \[24, 16\]"):
            build()(torch.rand(1, 2, 24, 16), torch.zeros(1, 1, 24, 16, dtype=torch.bool))

    @pytest.mark.parametrize("shape", [(1, 1, 16, 24), (1, 2, 16, 24, 1), (2, 16, 24)])
    def test_image_that_does_not_fit(self, shape):
        with pytest.raises(ValueError, match=r"image: expected \[B, 2, \*S\] with 2 spatial axes"):
            build()(torch.rand(shape))

    def test_mask_that_is_no_mask(self):
        image, mask = example()
        with pytest.raises(ValueError, match="mask: expected bool"):
            build()(image, mask.float())

    def test_patch_that_does_not_divide(self):
        with pytest.raises(ValueError, match=r"img_size: expected multiples of the patch_size \(16, 16\), got \(40"):
            MaskedAutoencoder(2, img_size=40)

    @pytest.mark.parametrize("argument", ["hiden_size", "in_channels", "out_channels", "num_classes", "patch_size"])
    def test_unknown_argument_is_named_with_those_that_are_known(self, argument):
        with pytest.raises(ValueError, match=rf"the ViT does not take {argument}; it takes hidden_size, mlp_dim"):
            MaskedAutoencoder(2, img_size=32, encoder_args={argument: 3})

    def test_only_a_vit_can_leave_tokens_out(self):
        with pytest.raises(ValueError, match=r"backbone: .* only .* 'unetr' can, got 'swinunetr'; take SimMIM"):
            MaskedAutoencoder(2, img_size=32, backbone="swinunetr")


class TestEncoder:
    def test_defaults_are_unetr_s(self):
        with torch.device("meta"):
            ours = MaskedAutoencoder(3, img_size=96).vit
            theirs = UNETR(1, 1, 96).vit
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert str(ours) == str(theirs)
        assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads

    def test_backbone_args_of_unetr_serve(self):
        args = {"feature_size": 4, "norm_name": "batch", "conv_block": False, "res_block": False, "img_size": 64}
        network = MaskedAutoencoder(2, img_size=32, encoder_args=ARGS | args | {"qkv_bias": True, "dropout_rate": 0.1})
        assert network.vit.patch_embedding.n_patches == 4
        assert network.vit.blocks[0].attn.qkv.bias is not None and network.vit.blocks[0].attn.dropout_rate == 0.1


class TestTransfer:
    def source(self, size: int = 32) -> MaskedAutoencoder:
        torch.manual_seed(1)
        network = MaskedAutoencoder(2, img_size=size, encoder_args=ARGS, **DECODER)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.network."])
    @pytest.mark.parametrize("target", ["unetr", "classifier"])
    def test_every_key_of_the_vit_bit_for_bit(self, prefix, target):
        source, args = self.source(), ARGS | {"img_size": 32, "feature_size": 4}
        network = (
            backbone_network("unetr", 2, 1, 3, **args)
            if target == "unetr"
            else EncoderClassifier(2, 1, 3, backbone="unetr", backbone_args=args)
        )
        report = transfer_weights(network, {prefix + key: value for key, value in source.state_dict().items()})
        assert report.share == 1 and not report.adapted and not report.missing
        vit = network.vit if target == "unetr" else network.encoder.vit
        own, stored = vit.state_dict(), source.vit.state_dict()
        assert len(report.matched) == len(own) == len(stored)
        assert all(torch.equal(own[key], stored[key]) for key in stored)
        assert not any(".vit." in f".{key}" for key in report.unused)

    def test_positions_are_interpolated_to_another_size(self):
        network = backbone_network("unetr", 2, 1, 3, crop_size=32, **ARGS, feature_size=4)
        report = transfer_weights(network, self.source(64).state_dict())
        assert report.adapted == {"vit.patch_embedding.position_embeddings": "grid 4x4 -> 2x2"} and report.share == 1

    def test_patches_of_eight_leave_the_patch_embedding_of_unetr_alone(self):
        torch.manual_seed(1)
        source = MaskedAutoencoder(2, img_size=16, patch_size=8, encoder_args=ARGS, **DECODER)
        network = backbone_network("unetr", 2, 1, 3, img_size=32, **ARGS)
        report = transfer_weights(network, source.state_dict())
        assert list(report.other_shape) == ["vit.patch_embedding.patch_embeddings.weight"]
