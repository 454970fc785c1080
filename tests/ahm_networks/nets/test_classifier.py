# SPDX-License-Identifier: Apache-2.0
"""Classifiers: a pretrained encoder with a head, VGG16, DenseNet121."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet121
from monai.networks.utils import convert_to_onnx, convert_to_torchscript
from torch import Tensor, nn

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import (
    VGG16,
    EncoderClassifier,
    backbone_network,
    classifier_network,
    encoder_features,
    encoder_stages,
    freeze_encoder,
    layerwise_parameters,
    transfer_weights,
    unfreeze_encoder,
)

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 2},
    "basicunet": {"features": (4, 4, 4, 8, 8, 4)},
    "dynunet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "filters": [4, 8, 8]},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    "swinunetr": {"feature_size": 12},
    "unetr": {"img_size": 48, "feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
    "contextunet": {"features": (4, 8, 8), "context_kernel": 3},
}
ODD = {2: (35, 30), 3: (33, 20, 9)}
VGG16_CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
MONAI_LEAVES_OUT = "norm_cross_attn"  # ViT blocks hold this norm and never use it

every_backbone = pytest.mark.parametrize("backbone", SMALL)
every_head = pytest.mark.parametrize("head", ["linear", "conv", "stages"])
both_heads = pytest.mark.parametrize("head", ["linear", "conv"])
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def build(backbone: str = "unet", dims: int = 2, channels: int = 1, **options: Any) -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(dims, channels, 3, backbone=backbone, backbone_args=SMALL[backbone], **options)


def images(dims: int, channels: int = 1, size: tuple[int, ...] | None = None) -> Tensor:
    return torch.rand(2, channels, *(size or ODD[dims]), generator=torch.Generator().manual_seed(0))


def weights_without_gradient(network: nn.Module) -> list[str]:
    named = network.named_parameters()
    return [name for name, weight in named if weight.grad is None or not weight.grad.abs().max() > 0]


@two_and_three_d
@every_backbone
class TestEncoder:
    @pytest.mark.parametrize("head", ["linear", "stages"])
    def test_images_of_any_size_reach_every_weight(self, backbone: str, dims: int, head: str) -> None:
        network = build(backbone, dims, channels=2, head=head)
        logits = network(images(dims, channels=2))
        assert logits.shape == (2, 3)
        logits.square().sum().backward()
        assert all(MONAI_LEAVES_OUT in name for name in weights_without_gradient(network))

    def test_features_are_those_of_the_whole_network(self, backbone: str, dims: int) -> None:
        whole = backbone_network(backbone, dims, 1, 1, **SMALL[backbone]).eval()
        network = build(backbone, dims).eval()
        network.encoder.load_state_dict(whole.state_dict(), strict=False)
        image = images(dims, size=(48,) * dims if backbone == "unetr" else (64,) + (32,) * (dims - 1))
        with torch.no_grad():
            assert torch.equal(network.encoder(image), encoder_features(whole, image)[-1])

    def test_nothing_of_the_decoder_is_left(self, backbone: str, dims: int) -> None:
        whole = backbone_network(backbone, dims, 1, 1, **SMALL[backbone])
        stages = nn.ModuleList([nn.ModuleList(stage) for stage in encoder_stages(whole)])
        network = build(backbone, dims)
        assert sum(p.numel() for p in network.encoder.parameters()) == sum(p.numel() for p in stages.parameters())
        assert set(network.encoder.state_dict()) <= set(whole.state_dict())


@every_backbone
class TestWithTheOtherParts:
    def test_pretrained_encoder_transfers_whole(self, backbone: str) -> None:
        torch.manual_seed(1)
        pretrained = ReconstructionUNet(2, backbone=backbone, backbone_args=SMALL[backbone], fill="token").eval()
        network = build(backbone).eval()
        report = transfer_weights(network, pretrained.state_dict())
        assert report.share == 1.0 and not report.missing and not report.other_shape and not report.adapted
        source = pretrained.backbone.state_dict()
        assert all(torch.equal(value, source[key]) for key, value in network.encoder.state_dict().items())
        image = images(2, size=(48, 48) if backbone == "unetr" else (64, 32))
        with torch.no_grad():
            expected = encoder_features(pretrained, image)[-1]
            assert torch.equal(network.encoder(image), expected)

    def test_encoder_freezes_and_thaws(self, backbone: str) -> None:
        network = build(backbone)
        freeze_encoder(network)
        assert {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {"head"}
        network(images(2)).sum().backward()
        unfreeze_encoder(network)
        assert all(p.requires_grad for p in network.parameters())

    def test_layers_get_rates_of_their_own(self, backbone: str) -> None:
        network = build(backbone)
        groups = layerwise_parameters(network, 1e-3, decay=0.5)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(rates) == len([*network.parameters()])
        head = {rates[id(p)] for p in network.head.parameters()}
        assert head == {1e-3}
        assert max(rates[id(p)] for p in network.encoder.parameters()) < 1e-3


def test_stages_are_found_after_the_decoder_is_gone() -> None:
    assert len(encoder_stages(build())) == 3


def test_padding_adds_zeros_at_the_end() -> None:
    network = build().eval()
    image = images(2, size=(17, 30))
    assert torch.equal(network(image), network(F.pad(image, (0, 2, 0, 3))))
    assert not torch.equal(network(image), network(F.pad(image, (2, 0, 3, 0))))


def test_images_as_small_as_one_bottom_voxel_train() -> None:
    assert torch.isfinite(build()(images(2, size=(3, 4)))).all()


def test_a_network_made_for_deep_supervision_classifies_all_the_same() -> None:
    args = {**SMALL["dynunet"], "deep_supervision": True}
    network = EncoderClassifier(2, 1, 3, backbone="dynunet", backbone_args=args).train()
    assert network(images(2)).shape == (2, 3)


@two_and_three_d
def test_convolutional_head(dims: int) -> None:
    network = build(dims=dims, head="conv")
    assert [tuple(p.shape) for p in network.head.parameters() if p.ndim > 1] == [
        (32, 8, *[3] * dims),
        (16, 32),
        (3, 16),
    ]
    logits = network(images(dims))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert not weights_without_gradient(network)


@both_heads
def test_head_learns_whatever_its_hidden_units_say(head: str) -> None:
    network = build(head=head, dropout=0.0)
    for layer in network.head:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.constant_(layer.bias, -100.0)  # no unit is active
    network(images(2))[:, 0].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in network.encoder.parameters() if p.ndim > 1 and p.grad is not None)


def test_stages_head_reads_mean_and_deviation_of_every_channel() -> None:
    network, image = build(head="stages").eval(), images(2, size=(16, 12))
    with torch.no_grad():
        maps = [maps.flatten(2) for maps in encoder_features(network, image)]
        read = torch.cat([torch.cat([m.mean(2), m.std(2, unbiased=False)], dim=1) for m in maps], dim=1)
        assert read.shape == (2, 2 * (4 + 8 + 8))
        assert torch.allclose(network(image), network.head(read), atol=1e-4)


def test_stages_head_standardises_over_the_batch_and_takes_a_batch_of_one() -> None:
    network, image = build(head="stages", dropout=0.0), images(2, size=(16, 12))
    read: list[Tensor] = []
    network.head[1].register_forward_hook(lambda *call: read.append(call[-1]))
    network(image)
    assert torch.allclose(read[0].mean(0), torch.zeros(40), atol=1e-4)
    state = {name: value.clone() for name, value in network.head[0].state_dict().items()}
    network(image[:1]).sum().backward()
    assert torch.isfinite(read[1]).all() and read[1].abs().max() > 0
    assert all(torch.equal(value, state[name]) for name, value in network.head[0].state_dict().items())


def test_stages_head_reads_in_full_precision_under_autocast() -> None:
    network, image = build(head="stages", dropout=0.0), images(2, size=(16, 12))
    read: list[Tensor] = []
    network.head[0].register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(network(image)).all()
    assert read[0].dtype == torch.float32


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_in_another_precision(head: str, dtype: torch.dtype) -> None:
    network, image = build(head=head).eval(), images(2)
    wanted = network(image)
    logits = network.to(dtype)(image.to(dtype))
    assert logits.dtype == dtype
    assert torch.allclose(logits.float(), wanted, atol=0.1)


def test_a_single_voxel_at_the_bottom_has_a_finite_gradient() -> None:
    network = build(head="stages")
    network(images(2, size=(4, 4))).square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in network.parameters() if weight.grad is not None)


@every_head
def test_dropout(head: str) -> None:
    image = images(2)
    dropping, keeping = build(head=head, dropout=0.9), build(head=head, dropout=0.0)
    assert torch.equal(keeping(image), keeping(image))
    assert any(not torch.equal(dropping(image), dropping(image)) for _ in range(5))
    assert torch.equal(dropping.eval()(image), keeping.eval()(image))


class TestErrors:
    def test_unknown_head(self) -> None:
        with pytest.raises(ValueError, match="head: expected one of linear, conv, stages, got 'mlp'"):
            EncoderClassifier(2, 1, 3, head="mlp")

    def test_unknown_backbone(self) -> None:
        with pytest.raises(ValueError, match=r"backbone: expected one of unet, .* got 'resnet'"):
            EncoderClassifier(2, 1, 3, backbone="resnet")

    def test_unknown_classifier(self) -> None:
        with pytest.raises(ValueError, match="name: expected one of encoder, vgg16, densenet121, got 'alexnet'"):
            classifier_network("alexnet", 2, 1, 3)

    @pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 1, 16, 16, 16), (1, 16, 16)])
    def test_image_that_does_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"image: expected \[B, 1, \*S\] with 2 spatial axes"):
            build()(torch.rand(shape))

    def test_image_too_large_for_unetr(self) -> None:
        with pytest.raises(ValueError, match=r"image: unetr was built for img_size=\[48, 48\], got \[40, 49\]"):
            build("unetr")(images(2, size=(40, 49)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
class TestExport:
    @pytest.mark.parametrize(
        ("backbone", "dims"),
        [
            ("unet", 2),
            ("unet", 3),
            ("basicunet", 2),
            ("dynunet", 2),
            ("segresnet", 2),
            ("unetr", 2),
            ("contextunet", 2),
            ("contextunet", 3),
        ],
    )
    def test_torchscript_takes_any_size(self, backbone: str, dims: int) -> None:
        network = build(backbone, dims, head="conv").eval()
        scripted = convert_to_torchscript(network)
        for image in (images(dims), images(dims, size=(7, 48, 11)[:dims])):
            assert torch.equal(scripted(image), network(image))

    def test_swinunetr_is_traced(self) -> None:
        network = build("swinunetr").eval()
        traced = convert_to_torchscript(network, inputs=[images(2)[:1]], use_trace=True)
        assert torch.allclose(traced(images(2)), network(images(2)), atol=1e-6)

    def test_the_head_of_all_stages_is_traced(self) -> None:
        network = build(head="stages").eval()
        traced = convert_to_torchscript(network, inputs=[images(2)[:1]], use_trace=True)
        assert torch.allclose(traced(images(2)), network(images(2)), atol=1e-6)
        with pytest.raises(ValueError, match=r"head: .*'stages' is exported by tracing.*--use_trace True"):
            convert_to_torchscript(network)

    def test_vgg16_is_scripted(self) -> None:
        network = VGG16(2, 1, 3).eval()
        assert torch.allclose(convert_to_torchscript(network)(images(2)), network(images(2)), atol=1e-5)

    def test_onnx(self) -> None:
        pytest.importorskip("onnxscript", reason="torch exports ONNX through onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        network, image = build().eval(), images(2)
        model = convert_to_onnx(network, [image], input_names=["image"], use_trace=False)
        session = runtime.InferenceSession(model.SerializeToString())
        (logits,) = session.run(None, {"image": image.numpy()})
        assert torch.allclose(torch.from_numpy(logits), network(image), atol=1e-5)


class TestVGG16:
    def test_configuration_d(self) -> None:
        """13 convolutions at their usual places, with the usual 14 714 688 weights."""
        features = VGG16(2, 3, 10, batch_norm=False).features
        convolutions = [n for n, layer in enumerate(features) if isinstance(layer, nn.Conv2d)]
        assert convolutions == VGG16_CONVOLUTIONS
        assert sum(p.numel() for p in features.parameters()) == 14_714_688

    @two_and_three_d
    @pytest.mark.parametrize("batch_norm", [True, False])
    def test_images_of_any_size_reach_every_weight(self, dims: int, batch_norm: bool) -> None:
        network = VGG16(dims, 2, 3, batch_norm=batch_norm)
        logits = network(images(dims, channels=2))
        assert logits.shape == (2, 3)
        logits.square().sum().backward()
        assert not weights_without_gradient(network)

    def test_batch_norm_after_every_convolution(self) -> None:
        norms = [layer for layer in VGG16(2, 1, 3).features if isinstance(layer, nn.BatchNorm2d)]
        assert [norm.num_features for norm in norms] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6

    def test_signal_keeps_its_size_without_batch_norm(self) -> None:
        """So that thirteen plain layers train at all."""
        torch.manual_seed(0)
        image = torch.randn(2, 1, 64, 64)
        assert 0.1 < VGG16(2, 1, 3, batch_norm=False).features(image).square().mean() < 10

    def test_dropout(self) -> None:
        torch.manual_seed(0)
        network = VGG16(2, 1, 3, batch_norm=False, dropout=0.9)
        assert not torch.equal(network(images(2)), network(images(2)))


class TestByName:
    @pytest.mark.parametrize(
        ("name", "kind"), [("encoder", EncoderClassifier), ("vgg16", VGG16), ("densenet121", DenseNet121)]
    )
    def test_network(self, name: str, kind: type[nn.Module]) -> None:
        network = classifier_network(name, 2, 2, 5).eval()
        assert type(network) is kind
        assert network(images(2, channels=2, size=(64, 32))).shape == (2, 5)

    def test_arguments_are_handed_on(self) -> None:
        network = classifier_network("encoder", 2, 1, 3, backbone="segresnet", head="conv")
        assert type(network.encoder).__name__ == "SegResNet"
        assert isinstance(network.head[0], nn.Conv2d)

    def test_transformer_is_built_for_the_size_of_the_images(self) -> None:
        tiny = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
        for given, size in ((tiny, 32), ({**tiny, "img_size": 48}, 48)):
            network = classifier_network("encoder", 2, 1, 3, backbone="unetr", backbone_args=given, image_size=32)
            assert network.divisor == [size, size]
            assert network(images(1, size=(size, size))).shape == (2, 3)
        assert tiny.keys() == {"hidden_size", "mlp_dim", "num_heads"}

    def test_others_need_no_size(self) -> None:
        network = classifier_network(
            "encoder", 2, 1, 3, backbone_args={"channels": (8, 16), "strides": (2,)}, image_size=33
        )
        assert network(images(2, size=(50, 40))).shape == (2, 3)

    @pytest.mark.parametrize("given", [{"backbone": "unetr"}, {"backbone_args": {"channels": (8, 16)}}])
    def test_backbone_of_a_network_that_has_none_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"backbone: vgg16 has none, got .*only 'encoder' takes one"):
            classifier_network("vgg16", 2, 1, 3, **given)


def stripes() -> tuple[Tensor, Tensor]:
    """Noise, noise with upright stripes, noise with level ones."""
    image = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    bars = (torch.arange(32) % 4 < 2).float()
    image[4:8] += bars
    image[8:] += bars[:, None]
    return image, torch.arange(12) // 4


@pytest.mark.parametrize(
    ("name", "steps", "args"),
    [
        ("encoder", 20, {"head": "linear"}),
        ("encoder", 20, {"head": "conv"}),
        ("encoder", 20, {"head": "stages"}),
        ("vgg16", 5, {}),
    ],
    ids=["linear", "conv", "stages", "vgg16"],
)
def test_learns_to_tell_stripes_apart(name: str, steps: int, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = classifier_network(name, 2, 1, 3, **args)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    image, label = stripes()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
