# SPDX-License-Identifier: Apache-2.0
"""Weights from pretraining into the networks of labelled tasks; freezing and learning rates by stage."""

from __future__ import annotations

import copy
import io
import json
import logging

import pytest
import torch
from monai.networks.nets import DenseNet121, MaskedAutoEncoderViT
from torch import nn

from ahm_networks.nets import ReconstructionUNet
from ahm_networks.nets.adaptation import resize_input_channels, resize_positions
from ahm_networks.nets.backbones import BACKBONES
from ahm_networks.nets.classifier import EncoderClassifier
from ahm_networks.nets.encoders import encoder_features, encoder_stages
from ahm_networks.nets.weights import (
    freeze_encoder,
    layerwise_parameters,
    read_weights,
    transfer_weights,
    unfreeze_encoder,
)

OUTPUT = ("model.2", "final_conv", "output_block", "conv_final", "out.conv", "head")
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def copy_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}


def encoder_keys(network: nn.Module) -> set[str]:
    inside = {id(t) for s in encoder_stages(network) for m in s for t in m.state_dict(keep_vars=True).values()}
    return {key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in inside}


def image_for(name: str, channels: int = 1, dims: int = 2) -> torch.Tensor:
    return torch.rand(2, channels, *[32 if name == "unetr" else 64] * dims, generator=torch.Generator().manual_seed(0))


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("name", "dims"),
        [*((name, 2) for name in BACKBONES), ("unet", 3), ("dynunet", 3), ("unetr", 3), ("contextunet", 3)],
    )
    def test_encoder_of_our_checkpoint_goes_into_the_plain_network(self, pretrained, build, name, dims):
        source, network = pretrained(name, dims), build(name, dims, outputs=3)
        before = copy_of(network)
        report = transfer_weights(network, source.state_dict())
        image = image_for(name, dims=dims) if dims == 2 else torch.rand(1, 1, 32, 32, 32)
        expected, features = encoder_features(source, image), encoder_features(network, image)
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
        assert changed(network, before) <= encoder_keys(network)
        assert report.share == 1
        assert not report.adapted and not report.other_shape and not report.missing
        assert set(report.matched) <= encoder_keys(network)
        assert {key.removeprefix("backbone.") for key in report.unused} == set(before) - encoder_keys(network)

    @every_backbone
    def test_all_of_it_but_an_output_layer_of_other_channels(self, pretrained, build, name):
        source, network = pretrained(name), build(name, outputs=3)
        before = copy_of(network)
        report = transfer_weights(network, source.state_dict(), part="all")
        assert report.other_shape and not report.adapted and not report.missing and not report.unused
        stored = source.backbone.state_dict()
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key] if key in report.other_shape else stored[key])
        assert all(key.startswith(OUTPUT) for key in report.other_shape)
        assert all(a[:1] == (1,) or a[1] == 1 for a, _ in report.other_shape.values())

    def test_tensors_with_several_names_are_counted_once(self, pretrained, build):
        network = build("dynunet")
        report = transfer_weights(network, pretrained("dynunet").state_dict(), part="all")
        assert len(report.matched) + len(report.other_shape) == len(list(network.parameters()))
        assert not any(key.startswith("skip_layers") for key in report.matched)

    def test_in_place_and_in_the_network_s_own_dtype(self, pretrained, build):
        network = build("unet")
        places = {key: value.data_ptr() for key, value in network.state_dict().items()}
        halves = {key: value.half() for key, value in pretrained("unet").state_dict().items()}
        transfer_weights(network, halves)
        assert {key: value.data_ptr() for key, value in network.state_dict().items()} == places
        assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())

    def test_frozen_weights_can_be_filled(self, pretrained, build):
        network = build("unet").requires_grad_(False)
        assert transfer_weights(network, pretrained("unet").state_dict()).share == 1


def wrapped(network: nn.Module, name: str) -> nn.Module:
    outer = nn.Module()
    outer.add_module(name, network)
    return outer


class TestPrefixes:
    @pytest.mark.parametrize("name", ["unet", "segresnet", "unetr"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.backbone.", "student.net."])
    def test_any_prefix_of_the_source(self, pretrained, build, name, prefix):
        source = pretrained(name).backbone
        network = build(name)
        report = transfer_weights(network, {prefix + key: value for key, value in source.state_dict().items()})
        assert report.share == 1
        image = image_for(name)
        assert torch.equal(encoder_features(network, image)[-1], encoder_features(source, image)[-1])

    @every_backbone
    def test_into_classifier_and_reconstruction(self, pretrained, build, name):
        source = build(name, seed=3)
        reconstruction = pretrained(name)
        args = {"img_size": 32, "feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
        small = {"unetr": args, "swinunetr": {"feature_size": 12}, "segresnet": {"init_filters": 8}}
        assert transfer_weights(wrapped(reconstruction, "module"), source.state_dict(), part="all").other_shape
        image = image_for(name)
        assert torch.equal(encoder_features(reconstruction, image)[-1], encoder_features(source, image)[-1])
        if name in small:
            classifier = EncoderClassifier(2, 1, 3, backbone=name, backbone_args=small[name])
            stored = ReconstructionUNet(2, backbone=name, backbone_args=small[name])
            report = transfer_weights(wrapped(classifier, "module"), stored.state_dict())
            assert report.share == 1 and all(key.startswith("encoder.") for key in report.matched)
            assert torch.equal(encoder_features(classifier, image)[-1], encoder_features(stored, image)[-1])

    def test_vit_alone_and_in_other_company(self, build):
        source = build("unetr", seed=3)
        beside = {"head.weight": torch.rand(2, 12)}
        for prefix in ("", "module.", "teacher.vit.", "encoder."):
            network = build("unetr")
            weights = {prefix + key: value for key, value in source.vit.state_dict().items()} | beside
            report = transfer_weights(network, weights, part="all")
            assert sorted(report.matched) == [f"vit.{key}" for key in sorted(source.vit.state_dict())]
            assert report.unused == ["head.weight"]
            assert torch.equal(network.vit.norm.weight, source.vit.norm.weight)

    def test_published_swin_names(self, build):
        source, network = build("swinunetr", seed=3), build("swinunetr")
        weights = {}
        for key, value in source.swinViT.state_dict().items():
            weights["module.swin_vit." + key.replace("mlp.linear", "mlp.fc")] = value
        report = transfer_weights(network, weights)
        assert report.share == 1 and not report.unused
        assert not changed(network.swinViT, source.swinViT.state_dict())

    def test_of_two_networks_in_one_file_the_one_that_fits(self, build):
        source, other = build("unet", seed=3), build("unet", seed=4, channels=(6, 10, 14))
        weights = {f"a.{key}": value for key, value in other.state_dict().items()}
        weights |= {f"b.{key}": value for key, value in source.state_dict().items()}
        network = build("unet")
        report = transfer_weights(network, weights)
        assert report.share == 1 and {key[:2] for key in report.unused} == {"a.", "b."}
        assert torch.equal(network.model[0].conv.unit0.conv.weight, source.model[0].conv.unit0.conv.weight)

    def test_levels_of_a_deeper_unet_are_not_shifted(self, build):
        deeper = build("unet", seed=3, channels=(2, 4, 8, 12), strides=(2, 2, 2))
        network = build("unet", channels=(4, 8, 12), strides=(2, 2))
        before = copy_of(network)
        with pytest.raises(ValueError, match="nothing fits"):
            transfer_weights(network, deeper.state_dict())
        assert not changed(network, before)


class TestMaskedAutoencoder:
    def make(self, size: int, **args: object) -> MaskedAutoEncoderViT:
        torch.manual_seed(5)
        widths = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2, "decoder_hidden_size": 12, "decoder_num_heads": 2}
        return MaskedAutoEncoderViT(1, size, 16, **widths, decoder_num_layers=1, spatial_dims=2, **args)

    def test_every_key_of_the_vit_matches(self, build):
        source, network = self.make(32), build("unetr")
        report = transfer_weights(network, source.state_dict())
        assert sorted(report.matched) == sorted(f"vit.{key}" for key in network.vit.state_dict())
        image = image_for("unetr")
        with torch.no_grad():
            expected = source.eval().blocks(source.patch_embedding(image))
        assert torch.allclose(network.vit(image)[0], expected, atol=1e-6)
        assert all("blocks.12" not in key and not key.startswith(("blocks", "patch")) for key in report.unused)

    def test_position_embeddings_of_another_grid(self, build):
        source, network = self.make(64), build("unetr")
        report = transfer_weights(network, source.state_dict())
        assert report.adapted == {"vit.patch_embedding.position_embeddings": "grid 4x4 -> 2x2"}
        assert report.share == 1

    def test_grid_that_cannot_be_guessed_is_asked_for_before_anything_is_changed(self, build):
        source, network = self.make((32, 96)), build("unetr")
        before = copy_of(network)
        with pytest.raises(ValueError, match="source_grid: 12 position embeddings do not lie on 2 axes"):
            transfer_weights(network, source.state_dict())
        assert not changed(network, before)
        report = transfer_weights(network, source.state_dict(), source_grid=(2, 6))
        assert report.adapted == {"vit.patch_embedding.position_embeddings": "grid 2x6 -> 2x2"}


class TestPositions:
    def test_linear_interpolation_along_the_right_axis(self):
        rows = torch.arange(4.0).view(4, 1).expand(4, 2).reshape(1, 8, 1)
        resized, done = resize_positions(rows, (2, 2), (4, 2))
        assert resized.flatten().tolist() == [0.5, 0.5, 2.5, 2.5] and done == ["grid 4x2 -> 2x2"]

    def test_three_axes_and_a_class_token(self):
        positions = torch.cat([torch.full((1, 1, 3), 9.0), torch.ones(1, 27, 3)], dim=1)
        resized, done = resize_positions(positions, (2, 4, 2))
        assert torch.equal(resized, torch.ones(1, 16, 3)) and done == ["class token dropped", "grid 3x3x3 -> 2x4x2"]

    def test_same_grid_is_left_alone(self):
        positions = torch.rand(1, 8, 3)
        assert resize_positions(positions, (2, 4)) == (pytest.approx(positions), [])
        with_token = torch.cat([torch.rand(1, 1, 3), positions], dim=1)
        resized, done = resize_positions(with_token, (2, 4), (2, 4))
        assert torch.equal(resized, positions) and done == ["class token dropped"]

    @pytest.mark.parametrize("grid", [(3, 3), (8,), (2, 2, 2)])
    def test_grid_that_does_not_fit(self, grid):
        with pytest.raises(ValueError, match="source_grid: expected 2 numbers of patches for 8"):
            resize_positions(torch.rand(1, 8, 3), (4, 4), grid)


@every_backbone
class TestInputChannels:
    def test_inflated_weights_see_grey_colour_images_as_before(self, pretrained, build, name):
        source, network = pretrained(name), build(name, inputs=3)
        report = transfer_weights(network, source.state_dict())
        assert set(report.adapted.values()) == {"input channels 1 -> 3"} and report.share == 1
        grey = image_for(name)
        features = encoder_features(network, grey.expand(-1, 3, -1, -1))
        for ours, theirs in zip(features, encoder_features(source, grey), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-3)

    def test_colour_weights_take_grey_images(self, pretrained, build, name):
        source, network = pretrained(name, channels=3), build(name)
        report = transfer_weights(network, source.state_dict())
        assert set(report.adapted.values()) == {"input channels 3 -> 1"} and report.share == 1
        grey = image_for(name)
        features = encoder_features(network, grey)[-1]
        assert torch.allclose(features, encoder_features(source, grey.expand(-1, 3, -1, -1))[-1], atol=2e-4, rtol=1e-3)

    def test_mask_channel_is_dropped(self, pretrained, build, name):
        source, network = pretrained(name, mask_channel=True), build(name)
        report = transfer_weights(network, source.state_dict(), image_channels=1)
        assert set(report.adapted.values()) == {"mask channel dropped"} and report.share == 1
        image = image_for(name)
        nothing_hidden = torch.cat([image, torch.zeros_like(image)], dim=1)
        features = encoder_features(network, image)[-1]
        assert torch.allclose(features, encoder_features(source, nothing_hidden)[-1], atol=2e-4, rtol=1e-3)

    def test_mask_channel_is_dropped_before_channels_are_spread(self, pretrained, build, name):
        source, network = pretrained(name, mask_channel=True).state_dict(), build(name, inputs=2)
        report = transfer_weights(network, source, image_channels=1, part="all")
        assert set(report.adapted.values()) == {"mask channel dropped, input channels 1 -> 2"}
        key = next(iter(report.adapted))
        stored, own = source[f"backbone.{key}"], network.state_dict()[key]
        assert torch.allclose(own, (stored[:, :1] / 2).expand_as(own))

    def test_output_layer_is_no_input_layer(self, pretrained, build, name):
        """As many classes as colours: the output's weights change as the input's do, yet are left alone."""
        network = build(name, inputs=3, outputs=3)
        report = transfer_weights(network, pretrained(name).state_dict(), part="all")
        assert report.other_shape and all(key.startswith(OUTPUT) for key in report.other_shape)
        assert not any(key.startswith(OUTPUT) for key in report.adapted)


def test_spread_channels_by_hand():
    kernel = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    assert resize_input_channels(kernel, 1).flatten().tolist() == [6.0]
    assert resize_input_channels(kernel, 3).flatten().tolist() == [2.0, 2.0, 2.0]


def test_without_a_mask_channel_nothing_is_dropped(pretrained, build):
    weights = pretrained("unet", channels=2).state_dict()
    assert not transfer_weights(build("unet", inputs=2), weights, image_channels=2).adapted
    assert not transfer_weights(build("unet", inputs=2), weights).adapted


class TestOtherNetworks:
    def test_all_of_a_network_without_known_encoder(self):
        source, network = DenseNet121(2, 1, 2, block_config=(1, 1)), DenseNet121(2, 3, 5, block_config=(1, 1))
        weights = {f"net.{key}": value for key, value in source.state_dict().items()}
        report = transfer_weights(wrapped(network, "module"), weights, part="all")
        assert report.adapted == {"features.conv0.weight": "input channels 1 -> 3"}
        assert set(report.other_shape) == {"class_layers.out.weight", "class_layers.out.bias"}
        assert not report.missing and not report.unused

    def test_all_of_a_network_of_ones_own_around_the_same_network(self, pretrained, build):
        inner, source = build("unet"), pretrained("unet")
        network = nn.ModuleDict({"head": nn.Linear(2, 2), "net": inner})
        report = transfer_weights(network, source.state_dict(), part="all")
        assert report.missing == ["head.weight", "head.bias"] and not report.unused
        first = "model.0.conv.unit0.conv.weight"
        assert torch.equal(inner.state_dict()[first], source.backbone.state_dict()[first])

    def test_encoder_of_a_network_without_known_encoder(self):
        network = DenseNet121(2, 1, 2, block_config=(1, 1))
        with pytest.raises(TypeError, match="expected one of UNet"):
            transfer_weights(network, network.state_dict())


class TestRefusal:
    @pytest.mark.parametrize("other", ["basicunet", "dynunet", "segresnet", "swinunetr", "unetr", "contextunet"])
    def test_another_architecture(self, pretrained, build, other):
        network = build("unet")
        before = copy_of(network)
        with pytest.raises(ValueError, match=r"nothing fits .*'model\.0\..*the weights \['backbone\."):
            transfer_weights(network, pretrained(other).state_dict(), part="all")
        assert not changed(network, before)

    def test_same_names_but_no_shape_of_weight(self, pretrained, build):
        with pytest.raises(ValueError, match="agree in name but not in shape"):
            transfer_weights(
                build("unet", num_res_units=0), pretrained("unet", kernel_size=5, num_res_units=0).state_dict()
            )

    def test_other_widths_behind_a_prefix_are_seen_as_such(self, pretrained, build):
        with pytest.raises(ValueError, match=r"; [1-9]\d* agree in name but not in shape \['convInit.conv.weight"):
            transfer_weights(build("segresnet", init_filters=16), pretrained("segresnet").state_dict())

    @pytest.mark.parametrize("weights", [{}, {"model": {"0.weight": torch.ones(1)}, "epoch": 3}, "model.pt"])
    def test_nothing_at_all(self, build, weights):
        with pytest.raises(ValueError, match="weights: expected a state_dict, as read_weights reads it from a file"):
            transfer_weights(build("unet"), weights)

    def test_unknown_part(self, build):
        with pytest.raises(ValueError, match="part: expected one of encoder, all, got 'decoder'"):
            transfer_weights(build("unet"), {}, part="decoder")

    def test_less_than_half_is_said_aloud(self, pretrained, build, caplog):
        weights = pretrained("basicunet").state_dict()
        few = {key: value for key, value in weights.items() if "backbone.conv_0." in key}
        with caplog.at_level(logging.WARNING):
            report = transfer_weights(build("basicunet"), few)
        assert report.share < 0.5 and "fewer than half" in report.table()
        assert "another architecture" in caplog.text
        caplog.clear()
        transfer_weights(build("basicunet"), weights)
        assert not caplog.text

    def test_an_encoder_that_is_the_smaller_part_of_its_network_is_no_reason_to_warn(self, build, caplog):
        encoder = {f"swinViT.{key}": value for key, value in build("swinunetr").swinViT.state_dict().items()}
        with caplog.at_level(logging.WARNING):
            report = transfer_weights(build("swinunetr"), encoder, part="all")
        assert report.share < 0.5
        assert not caplog.text


class TestReport:
    def test_table_names_what_went_where(self, pretrained, build):
        table = transfer_weights(
            build("unet", inputs=3, outputs=4), pretrained("unet").state_dict(), part="all"
        ).table()
        lines = table.splitlines()
        assert lines[0].startswith("all: ") and "2 adapted" in lines[0]
        assert any(line.startswith("adapted            2  model.0.conv.unit0.conv.weight: input ch") for line in lines)
        assert any("model.2.0.conv.weight: (8, 1, 3, 3) instead of (8, 4, 3, 3)" in line for line in lines)
        assert any(line.strip().startswith("...") and line.endswith("more") for line in lines)
        assert "missing            0" in lines

    def test_plain_enough_for_json(self, pretrained, build):
        report = transfer_weights(build("unet", inputs=3), pretrained("unet").state_dict(), part="all")
        stored = json.loads(json.dumps(report.as_dict()))
        assert stored["matched"] == report.matched and stored["share"] == report.share
        assert stored["other_shape"]["model.2.0.conv.bias"] == [[1], [2]]


class TestReadWeights:
    @pytest.mark.parametrize("around", [None, "model", "state_dict", "model_state_dict"])
    def test_plain_or_in_a_dictionary(self, tmp_path, around):
        state = nn.Linear(2, 3).state_dict()
        torch.save(state if around is None else {around: state, "epoch": 3, "best": {"metric": 0.5}}, tmp_path / "w.pt")
        read = read_weights(tmp_path / "w.pt")
        assert list(read) == ["weight", "bias"] and torch.equal(read["weight"], state["weight"])

    def test_tensor_that_is_called_like_an_entry(self, tmp_path):
        torch.save({"model": torch.ones(2), "bias": torch.zeros(2)}, tmp_path / "w.pt")
        assert list(read_weights(tmp_path / "w.pt")) == ["model", "bias"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
            read_weights(tmp_path / "none.pt")

    @pytest.mark.parametrize(
        "content", [b"", b"text", b"\x80\x02\xff", b"PK\x03\x04", b"\x80\x02X\x01\x00\x00\x00\xff."]
    )
    def test_damaged_file(self, tmp_path, content):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pt: not a readable file of weights"):
            read_weights(tmp_path / "bad.pt")

    def test_truncated_file(self, tmp_path):
        path = tmp_path / "cut.pt"
        torch.save(nn.Linear(20, 30).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ValueError, match=r"cut\.pt: not a readable"):
            read_weights(path)

    @pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, torch.ones(3), []])
    def test_no_weights_inside(self, tmp_path, content):
        torch.save(content, tmp_path / "none.pt")
        with pytest.raises(ValueError, match=r"none\.pt: expected a state_dict, alone or under one of model"):
            read_weights(tmp_path / "none.pt")

    def test_whole_pickled_network_is_not_run(self, tmp_path):
        torch.save(nn.Linear(2, 3), tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"net\.pt: .* save a state_dict"):
            read_weights(tmp_path / "net.pt")


class TestLayerwise:
    @every_backbone
    def test_each_parameter_once_and_slower_towards_the_input(self, build, name):
        network = build(name)
        next(network.parameters()).requires_grad_(False)
        groups = layerwise_parameters(network, 0.1, decay=0.5, weight_decay=0.01)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in network.parameters())
        stages = encoder_stages(network)
        assert [group["lr"] for group in groups] == [pytest.approx(0.1 * 0.5**n) for n in range(len(stages) + 1)]
        assert all(group["weight_decay"] == 0.01 for group in groups)
        deepest, first = groups[1]["params"], groups[-1]["params"]
        assert any(p is next(stages[-1][0].parameters()) for p in deepest)
        assert any(p is next(stages[0][0].parameters()) for p in first)
        torch.optim.AdamW(groups, lr=0.1)

    def test_no_decay_is_one_group_of_any_network(self):
        network = DenseNet121(2, 1, 2, block_config=(1, 1))
        (group,) = layerwise_parameters(network, 0.1, decay=1.0)
        assert len(group["params"]) == len(list(network.parameters())) and group["lr"] == 0.1

    @pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
    def test_decay_that_is_none(self, build, decay):
        with pytest.raises(ValueError, match="decay: expected a factor"):
            layerwise_parameters(build("unet"), 0.1, decay=decay)


def train_a_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network.train()
    optimizer.zero_grad(set_to_none=False)  # as MONAI's trainers do
    network(torch.rand(2, 1, 32, 32)).square().mean().backward()
    optimizer.step()


def through_a_file(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestFreezing:
    def frozen(self, build) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = build("unet", norm="batch", dropout=0.2)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        train_a_step(network, optimizer)  # momentum and gradients are there already
        freeze_encoder(network)
        return network, optimizer

    def test_nothing_of_the_encoder_moves_while_the_decoder_learns(self, build):
        network, optimizer = self.frozen(build)
        before = copy_of(network)
        train_a_step(network, optimizer)
        moved = changed(network, before)
        assert not moved & encoder_keys(network)
        assert any("running_mean" in key for key in moved) and any(key.endswith("conv.weight") for key in moved)
        assert torch.equal(*(encoder_features(network, image_for("unet"))[-1] for _ in range(2)))

    def test_unfrozen_it_learns_again(self, build):
        network, optimizer = self.frozen(build)
        freeze_encoder(network)  # once more does not matter
        train_a_step(network, optimizer)
        unfreeze_encoder(network)
        assert all(module.training for module in network.modules())
        before = copy_of(network)
        train_a_step(network, optimizer)
        assert changed(network, before) >= {key for key in encoder_keys(network) if "weight" in key or "mean" in key}
        assert not any(module._forward_pre_hooks for module in network.modules())

    @pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "file"])
    def test_a_copy_is_unfrozen_alone(self, build, copied):
        network, _ = self.frozen(build)
        other = copied(network)
        unfreeze_encoder(other)
        assert all(p.requires_grad for p in other.parameters())
        assert not any(module._forward_pre_hooks for module in other.modules())
        assert not any(p.requires_grad for stage in encoder_stages(network) for m in stage for p in m.parameters())
        assert all(module._forward_pre_hooks for stage in encoder_stages(network) for module in stage)
        unfreeze_encoder(network)
        assert all(p.requires_grad for p in network.parameters())

    def test_what_was_frozen_before_stays_so(self, build):
        network = build("unet")
        first = next(network.parameters()).requires_grad_(False)
        freeze_encoder(network)
        unfreeze_encoder(network)
        assert [p for p in network.parameters() if not p.requires_grad] == [first]
        assert not any(module.training for module in network.modules())

    def test_unfreezing_what_is_not_frozen_changes_nothing(self, build):
        network = build("unet").requires_grad_(False)
        network.model[0].train()
        unfreeze_encoder(network)
        assert network.model[0].training and not any(p.requires_grad for p in network.parameters())

    @every_backbone
    def test_every_backbone_frozen_through_its_wrapper(self, pretrained, name):
        network = pretrained(name)
        freeze_encoder(wrapped(network, "module"))
        network.train()
        network(image_for(name))
        assert not any(module.training for stage in encoder_stages(network) for module in stage)
        assert {id(p) for p in network.parameters() if not p.requires_grad} == {
            id(p) for stage in encoder_stages(network) for module in stage for p in module.parameters()
        }
        unfreeze_encoder(network)
        assert all(p.requires_grad for p in network.parameters())
