# SPDX-License-Identifier: Apache-2.0
"""Networks that look at a whole image and score its cells: a feature network and convolutional heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from ahm_transforms.masking.functional import grid_shape

__all__ = ["CellHeads", "CellScorer", "StridedFeatures", "VGGFeatures", "feature_network", "pad_to_cells"]

VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3))


class StridedFeatures(nn.Module):
    """A small convolutional network whose strides multiply to exactly the patch size.

    A patch-wise stem brings the cost down at once; every further stage has a 3-wide kernel and group norm. One output
    place per cell, so that features and cells cannot be misaligned.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        patch_size: voxels per cell and axis.
        width: channels of the last stage; the stem has half of it.
    """

    def __init__(self, spatial_dims: int, in_channels: int, patch_size: Sequence[int], width: int = 32) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        strides = _stage_strides(patch_size)
        stem = width // 2
        layers: list[nn.Module] = [conv(in_channels, stem, kernel_size=strides[0], stride=strides[0]), nn.ReLU()]
        channels = stem
        for stride in strides[1:]:
            kernel = tuple(s + 1 - s % 2 if s > 1 else 3 for s in stride)
            padding = tuple((k - 1) // 2 for k in kernel)
            layers += [conv(channels, width, kernel, stride=stride, padding=padding, bias=False)]
            layers += [nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.out_channels = channels

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]``, ``S`` a multiple of the patch, to ``[B, width, *G]``."""
        return self.layers(image)


class VGGFeatures(nn.Module):
    """The first blocks of VGG16 (Simonyan & Zisserman 2015) as AHM's reproduction uses them, from plain layers.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        patch_size: voxels per cell; as many blocks are built as their stride fits the smallest side.
        weights: file with a ``state_dict`` that names its layers ``features.<n>``, as VGG16's usual one does; 2D only.
            The first layer's weights are averaged over their input channels where these are not ``in_channels``.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, patch_size: Sequence[int], weights: str | Path | None = None
    ) -> None:
        super().__init__()
        conv, pool = Conv[Conv.CONV, spatial_dims], Pool[Pool.MAX, spatial_dims]
        layers: list[nn.Module] = []
        channels = in_channels
        for number, (width, depth) in enumerate(VGG16_BLOCKS):
            if number and 2 ** (number + 1) > min(patch_size):
                break
            for _ in range(depth):
                layers += [conv(channels, width, kernel_size=3, padding=1), nn.ReLU()]
                channels = width
            layers += [pool(kernel_size=2, ceil_mode=True)]
        self.features = nn.Sequential(*layers)
        self.patch_size = tuple(patch_size)
        self.out_channels = channels
        if weights is not None:
            self._load(Path(weights))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to ``[B, width, *G]``."""
        grid = grid_shape(image.shape[2:], self.patch_size)
        pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
        return pool(self.features(image), grid)

    def _load(self, path: Path) -> None:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        own = self.features.state_dict()
        try:
            found = {name: stored[f"features.{name}"] for name in own}
        except KeyError as error:
            raise ValueError(f"{path}: expected the weights of VGG16, but {error} is missing.") from error
        first = found["0.weight"]
        if first.shape[1] != own["0.weight"].shape[1]:
            found["0.weight"] = first.mean(1, keepdim=True).expand(-1, own["0.weight"].shape[1], -1, -1)
        try:
            self.features.load_state_dict(found)
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit VGG16's first blocks: {error}") from error


class CellHeads(nn.Module):
    """Networks side by side that give each cell one number, from its features and those of its neighbours.

    Each head is a 3-wide convolution, ReLU and a weighted sum. They share no weight but run as one: on grids of a few
    hundred cells it is the number of calls that costs.

    Args:
        spatial_dims: 2 or 3.
        channels: of the features.
        heads: how many.
        width: hidden channels of each head.
    """

    def __init__(self, spatial_dims: int, channels: int, heads: int, width: int = 16) -> None:
        super().__init__()
        self.hidden = Conv[Conv.CONV, spatial_dims](channels, heads * width, 3, padding=1)
        # Cells start almost equal: the first policy is nearly uniform.
        self.weight = nn.Parameter(torch.randn(1, heads, width, *[1] * spatial_dims) * 0.01)
        self.bias = nn.Parameter(torch.zeros(1, heads, *[1] * spatial_dims))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, C, *G]`` to ``[B, heads, *G]``."""
        hidden = self.hidden(features).relu().unflatten(1, self.weight.shape[1:3])
        return (hidden * self.weight).sum(2) + self.bias


class CellScorer(nn.Module):
    """Feature network with one head per named map.

    Args:
        spatial_dims: 2 or 3.
        features: maps an image to ``[B, out_channels, *G]`` and has the attribute ``out_channels``.
        heads: names of the maps.
        patch_size: voxels per cell; images are padded at the end to whole cells by repeating the border.
    """

    def __init__(self, spatial_dims: int, features: nn.Module, heads: Sequence[str], patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.features = features
        channels = int(features.out_channels)  # type: ignore[arg-type]
        self.names = tuple(heads)
        self.heads = CellHeads(spatial_dims, channels, len(self.names))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map ``[B, C, *S]`` to one float32 ``[B, 1, *G]`` per head, autocast or not."""
        with torch.autocast(image.device.type, enabled=False):
            features = self.features(pad_to_cells(image.float(), self.patch_size))
            maps = self.heads(features).split(1, dim=1)
            return dict(zip(self.names, maps, strict=True))


def feature_network(
    name: str, spatial_dims: int, in_channels: int, patch_size: Sequence[int], weights: str | None = None
) -> nn.Module:
    """Build ``strided`` or ``vgg16``.

    Raises:
        ValueError: for another name, or for weights that the network cannot take.
    """
    if name == "vgg16":
        if weights is not None and spatial_dims != 2:
            raise ValueError(f"features_weights: VGG16's weights are 2D, got spatial_dims={spatial_dims}.")
        return VGGFeatures(spatial_dims, in_channels, patch_size, weights)
    if name != "strided":
        raise ValueError(f"features: expected 'strided' or 'vgg16', got {name!r}.")
    if weights is not None:
        raise ValueError("features_weights: only features='vgg16' takes a weights file.")
    return StridedFeatures(spatial_dims, in_channels, patch_size)


def pad_to_cells(image: Tensor, patch: Sequence[int]) -> Tensor:
    """Pad ``[B, C, *S]`` at the end to whole cells by repeating the border."""
    missing = [-s % p for s, p in zip(image.shape[2:], patch, strict=True)]
    return F.pad(image, [n for m in reversed(missing) for n in (0, m)], mode="replicate") if any(missing) else image


def _stage_strides(patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Split each side into a stem and prime factors, the same number of stages for every axis."""
    split = [_split_side(p) for p in patch_size]
    stages = max(2, *(len(s) for s in split))
    split = [s + [1] * (stages - len(s)) for s in split]
    return [tuple(axis[n] for axis in split) for n in range(stages)]


def _split_side(side: int) -> list[int]:
    """Take at least 4 voxels into the stem, and up to 8 while a later stage is left to look around."""
    stem, factors = 1, _prime_factors(side)
    while factors and (stem < 4 or (stem * factors[0] <= 8 and len(factors) > 1)):
        stem *= factors.pop(0)
    return [stem, *factors]


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
