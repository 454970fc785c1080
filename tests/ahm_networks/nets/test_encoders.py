# SPDX-License-Identifier: Apache-2.0
"""The encoder of every backbone: stages, feature maps, and life without a decoder."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AttentionUnet, SwinUNETR
from torch import nn

from ahm_networks.nets.backbones import BACKBONES
from ahm_networks.nets.encoders import drop_decoder, encoder_channels, encoder_features, encoder_stages

SIZE = {2: (64, 32), 3: (64, 32, 32)}
STAGES = {"unet": 3, "basicunet": 5, "dynunet": 3, "segresnet": 2, "swinunetr": 5, "unetr": 13, "contextunet": 3}

every_backbone = pytest.mark.parametrize("name", BACKBONES)
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def image_for(name: str, dims: int, channels: int = 1) -> torch.Tensor:
    size = (32,) * dims if name == "unetr" else SIZE[dims]
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))


def tensors_of(stages: list[list[nn.Module]]) -> list[nn.Parameter]:
    return [parameter for stage in stages for module in stage for parameter in module.parameters()]


@two_and_three_d
@every_backbone
class TestEveryBackbone:
    def test_features_are_what_the_network_computes_inside(self, build, name, dims):
        network, image = build(name, dims), image_for(name, dims)
        seen: list[torch.Tensor] = []
        modules = [network.swinViT] if name == "swinunetr" else [stage[-1] for stage in encoder_stages(network)]
        hooks = [module.register_forward_hook(lambda *call: seen.append(call[-1])) for module in modules]
        with torch.no_grad():
            network(image)
            for hook in hooks:
                hook.remove()
            features = encoder_features(network, image)
        expected = seen[0] if name == "swinunetr" else seen
        if name == "unetr":
            expected = [network.proj_feat(tokens) for tokens in seen]
        assert len(features) == STAGES[name] == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
        assert [feature.shape[1] for feature in features] == encoder_channels(network)
        sizes = [feature.shape[2:].numel() for feature in features]
        assert sizes == sorted(sizes, reverse=True)

    def test_without_decoder_the_encoder_stays(self, build, name, dims):
        network, image = build(name, dims), image_for(name, dims)
        before, state = encoder_features(network, image), network.state_dict(keep_vars=True)
        encoder = tensors_of(encoder_stages(network))
        assert drop_decoder(network) is network
        kept = network.state_dict(keep_vars=True)
        assert {id(p) for p in network.parameters()} == {id(p) for p in encoder}
        assert len(kept) < len(state)
        belonging = {
            id(t) for stage in encoder_stages(network) for m in stage for t in m.state_dict(keep_vars=True).values()
        }
        assert list(kept) == [key for key, tensor in state.items() if id(tensor) in belonging]
        assert all(map(torch.equal, encoder_features(network, image), before))
        assert encoder_channels(network) == [maps.shape[1] for maps in before]


@every_backbone
def test_each_parameter_is_in_one_stage_and_every_stage_learns(build, name):
    network = build(name)
    stages = encoder_stages(network)
    parameters = tensors_of(stages)
    assert len(parameters) == len({id(p) for p in parameters}) < len(list(network.parameters()))
    encoder_features(network, image_for(name, 2))[-1].square().sum().backward()
    assert all(any(p.grad is not None for m in stage for p in m.parameters()) for stage in stages)


@every_backbone
def test_wrappers_are_looked_through(pretrained, name):
    network = pretrained(name)
    wrapped = nn.Module()
    wrapped.module = network
    assert encoder_stages(wrapped) == encoder_stages(network.backbone)
    drop_decoder(wrapped)
    assert {id(p) for p in network.parameters()} == {id(p) for p in tensors_of(encoder_stages(network))}


def test_stages_in_order_from_the_image_to_the_bottleneck(build):
    network = build("unet")
    assert encoder_stages(network) == [
        [network.model[0]],
        [network.model[1].submodule[0]],
        [network.model[1].submodule[1].submodule],
    ]
    vit = build("unetr").vit
    assert [type(stage[0]).__name__ for stage in encoder_stages(build("unetr"))][:2] == [
        "PatchEmbeddingBlock",
        "TransformerBlock",
    ]
    assert len(vit.blocks) + 1 == len(encoder_stages(build("unetr")))


def test_dropout_of_segresnet_belongs_to_the_encoder(build):
    network = build("segresnet", dropout_prob=0.5).train()
    torch.manual_seed(0)
    expected = network.encode(image_for("segresnet", 2))[0]
    torch.manual_seed(0)
    assert torch.equal(encoder_features(network, image_for("segresnet", 2))[-1], expected)


def test_second_version_of_swin_has_convolutions_in_its_stages(build):
    network = build("swinunetr", use_v2=True)
    assert {id(p) for p in tensors_of(encoder_stages(network))} == {id(p) for p in network.swinViT.parameters()}


def test_deep_supervision_heads_are_decoder(build):
    network = drop_decoder(build("dynunet", deep_supervision=True))
    assert not any("head" in key or "upsample" in key for key in network.state_dict())
    assert "skip_layers.downsample.conv1.conv.weight" in network.state_dict()


def test_tokens_lie_on_their_grid(build):
    network = build("unetr", img_size=(32, 48))
    maps = encoder_features(network, torch.rand(1, 1, 32, 48))
    tokens, _ = network.vit(torch.zeros(1, 1, 32, 48))
    assert maps[-1].shape == (1, 12, 2, 3)
    assert torch.equal(encoder_features(network, torch.zeros(1, 1, 32, 48))[-1][0, :, 1, 2], tokens[0, 5])


class TestErrors:
    @pytest.mark.parametrize("call", [encoder_stages, encoder_channels, drop_decoder])
    def test_unknown_network(self, call):
        network = AttentionUnet(2, 1, 1, channels=(4, 8), strides=(2,))
        with pytest.raises(TypeError, match=r"expected one of UNet, .* SwinUNETR, or a wrapper of one, got Attention"):
            call(network)

    def test_subclass_that_may_work_otherwise(self):
        class Other(SwinUNETR):
            pass

        with pytest.raises(TypeError, match="got Other"):
            encoder_stages(Other(1, 1, feature_size=12, spatial_dims=2))

    def test_image_of_another_size_than_unetr_was_built_for(self, build):
        with pytest.raises(ValueError, match=r"built for img_size=\[32, 32\], got \[32, 48\]"):
            encoder_features(build("unetr"), torch.rand(1, 1, 32, 48))
