# SPDX-License-Identifier: Apache-2.0
"""Networks that score cells: each score must belong to its own cell."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ahm_networks.nets.policy import CellScorer, StridedFeatures, VGGFeatures, feature_network
from ahm_transforms.masking.functional import cells_to_image, grid_shape

CASES = [  # image size, patch size
    ((32, 32), (8, 8)),
    ((30, 21), (6, 3)),
    ((37, 45), (7, 9)),
    ((10, 12), (1, 2)),
    ((17, 12, 10), (4, 6, 5)),
    ((24, 24, 16), (8, 8, 4)),
]


def one_image_per_cell(size: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """As many images as the grid has cells, each with noise in one cell: ``[N, 1, *S]``."""
    grid = grid_shape(size, patch)
    cells = torch.eye(math.prod(grid)).view(-1, 1, *grid)
    noise = torch.rand(math.prod(grid), 1, *size, generator=torch.Generator().manual_seed(0)) + 0.5
    return cells_to_image(cells, patch, size) * noise


def averaging(network: nn.Module) -> nn.Module:
    """Make every convolution a plain mean and take the norms out: what is left is where the network looks."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.constant_(module.weight, 1.0 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    for name in norms:
        network.set_submodule(name, nn.Identity())
    return network


@pytest.mark.parametrize(("size", "patch"), CASES)
@pytest.mark.parametrize("name", ["strided", "vgg16"])
def test_one_score_per_cell(name: str, size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    network = feature_network(name, len(size), 1, patch)
    scores = CellScorer(len(size), network, ["policy", "value"], patch)(torch.rand(2, 1, *size))
    assert set(scores) == {"policy", "value"}
    assert all(s.shape == (2, 1, *grid_shape(size, patch)) and s.dtype == torch.float32 for s in scores.values())


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        *(("strided", patch) for patch in [(8, 8), (6, 3), (7, 9), (1, 2), (16, 10), (32, 16), (4, 6, 5), (8, 8, 4)]),
        *(("vgg16", patch) for patch in [(2, 2), (8, 8), (16, 8), (4, 4, 4)]),
    ],
)
def test_features_look_at_their_own_cell(name: str, patch: tuple[int, ...]) -> None:
    """A bright cell in the middle of seven answers there, and evenly around it to within half a cell."""
    network = averaging(feature_network(name, len(patch), 1, patch))
    cells = torch.zeros(1, 1, *[7] * len(patch))
    cells[(0, 0, *[3] * len(patch))] = 1.0
    with torch.no_grad():
        answer = network(cells_to_image(cells, patch, [7 * p for p in patch])).sum((0, 1))
    assert answer[(3,) * len(patch)] >= answer.max() * (1 - 1e-5)
    for axis in range(len(patch)):
        along = answer.movedim(axis, 0).flatten(1).sum(1)
        centre = float((along * torch.arange(7)).sum() / along.sum())
        assert abs(centre - 3) < 0.5


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [("strided", (40, 37), (8, 8)), ("strided", (20, 16, 13), (4, 4, 4)), ("vgg16", (40, 37), (8, 8))],
    ids=["2d", "3d", "vgg16"],
)
def test_scores_can_single_out_each_cell(name: str, size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Fitted to tell bright from dark cells, the highest score is that of the bright one, at every place."""
    torch.manual_seed(0)
    planted = one_image_per_cell(size, patch)
    target = torch.eye(len(planted))
    scorer = CellScorer(len(size), feature_network(name, len(size), 1, patch), ["value"], patch)
    optimizer = torch.optim.Adam(scorer.parameters(), 3e-3 if name == "strided" else 1e-3)
    for _ in range(60):
        scores = scorer(planted)["value"].flatten(1)
        if torch.equal(scores.argmax(1), target.argmax(1)):
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, target).backward()
        optimizer.step()
    pytest.fail(f"{(scores.argmax(1) == target.argmax(1)).float().mean():.0%} of the cells were found")


@pytest.mark.parametrize("name", ["strided", "vgg16"])
def test_padding_continues_the_image(name: str) -> None:
    """Cells that the image covers in part look like the image, not like an edge to zero."""
    scorer = CellScorer(2, feature_network(name, 2, 1, (8, 8)), ["policy"], (8, 8))
    cut, whole = (scorer(torch.full((1, 1, *size), 0.7))["policy"] for size in ((37, 30), (40, 32)))
    torch.testing.assert_close(cut, whole)


def test_cells_start_almost_equal() -> None:
    torch.manual_seed(0)
    scorer = CellScorer(2, StridedFeatures(2, 1, (8, 8)), ["policy"], (8, 8))
    probability = scorer(torch.rand(4, 1, 64, 64))["policy"].flatten(1).softmax(1) * 64
    assert (probability - 1).abs().max() < 0.3


def test_scores_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    scorer, image = CellScorer(2, StridedFeatures(2, 1, (8, 8)), ["policy"], (8, 8)), torch.rand(1, 1, 32, 32)
    expected = scorer(image)["policy"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(image)["policy"], expected)
    assert scorer(image.bfloat16())["policy"].dtype == torch.float32


@pytest.mark.parametrize("side", range(1, 40))
def test_strides_multiply_to_any_patch(side: int) -> None:
    network = StridedFeatures(2, 1, (side, 8), width=8)
    assert network(torch.rand(1, 1, 2 * side, 24)).shape[2:] == (2, 3)


class TestVGGFeatures:
    @pytest.mark.parametrize(("patch", "blocks"), [(2, 1), (4, 2), (8, 3), (16, 4), (32, 4), (12, 3)])
    def test_its_stride_never_exceeds_the_patch(self, patch: int, blocks: int) -> None:
        """Else neighbouring cells would share one feature and could not be told apart."""
        network = VGGFeatures(2, 1, (patch, patch))
        assert network.out_channels == (64, 128, 256, 512)[blocks - 1]
        assert network.features(torch.rand(1, 1, 64, 64)).shape[2:] == (64 // 2**blocks,) * 2

    def weights(self, folder: Path, channels: int = 3) -> tuple[Path, dict[str, Tensor]]:
        torch.manual_seed(1)
        state = VGGFeatures(2, channels, (16, 16)).state_dict()
        path = folder / "vgg16.pth"
        torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
        return path, state

    def test_weights_are_loaded(self, tmp_path: Path) -> None:
        path, state = self.weights(tmp_path)
        network = feature_network("vgg16", 2, 3, (16, 16), str(path))
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[name]), name

    @pytest.mark.parametrize("channels", [1, 4])
    def test_first_layer_is_averaged_over_its_input_channels(self, tmp_path: Path, channels: int) -> None:
        path, state = self.weights(tmp_path)
        network = VGGFeatures(2, channels, (8, 8), path)
        loaded = network.state_dict()
        assert loaded["features.0.weight"].shape[1] == channels
        for channel in range(channels):
            torch.testing.assert_close(loaded["features.0.weight"][:, channel], state["features.0.weight"].mean(1))
        assert torch.equal(loaded["features.2.weight"], state["features.2.weight"])

    def test_another_network_s_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "resnet.pth"
        torch.save({"layer1.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r"resnet\.pth: expected the weights of VGG16"):
            VGGFeatures(2, 1, (8, 8), path)

    def test_weights_of_another_width(self, tmp_path: Path) -> None:
        path, state = self.weights(tmp_path)
        torch.save({name: tensor[:1] for name, tensor in state.items()}, path)
        with pytest.raises(ValueError, match=r"vgg16\.pth: the weights do not fit"):
            VGGFeatures(2, 3, (8, 8), path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            VGGFeatures(2, 1, (8, 8), tmp_path / "nowhere.pth")


class TestErrors:
    def test_unknown_feature_network(self) -> None:
        with pytest.raises(ValueError, match="features: expected 'strided' or 'vgg16', got 'resnet'"):
            feature_network("resnet", 2, 1, (8, 8))

    @pytest.mark.parametrize("dims", [2, 3])
    def test_weights_for_a_network_without(self, dims: int) -> None:
        with pytest.raises(ValueError, match="only features='vgg16' takes a weights file"):
            feature_network("strided", dims, 1, (8,) * dims, "weights.pth")

    def test_three_dimensional_vgg_weights(self) -> None:
        with pytest.raises(ValueError, match="VGG16's weights are 2D"):
            feature_network("vgg16", 3, 1, (8, 8, 8), "weights.pth")
