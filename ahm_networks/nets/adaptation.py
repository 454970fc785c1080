# SPDX-License-Identifier: Apache-2.0
"""Weights changed to fit another number of input channels or another grid of patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ahm_networks.nets.matching import Target

__all__ = ["Adapter", "resize_input_channels", "resize_positions"]

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Adapter:
    """Makes a source's tensors fit a network where only input channels or patches differ.

    Args:
        target: the tensors to fill.
        weights: the source's tensors.
        pairs: the source's key by the target's.
        image_channels: where the source's first layer has one more, that is the mask's and is dropped.
        source_grid: patches per axis of the source's position embeddings.
    """

    def __init__(
        self,
        target: Target,
        weights: Mapping[str, Tensor],
        pairs: Mapping[str, str],
        image_channels: int | None = None,
        source_grid: Sequence[int] | None = None,
    ) -> None:
        self.target = target
        self.weights = weights
        self.pairs = pairs
        self.source_grid = source_grid
        self.channels = self._read_channels()
        has_mask = self.channels is not None and image_channels is not None and self.channels[0] == image_channels + 1
        self.mask_channels = int(has_mask)

    def _read_channels(self) -> tuple[int, int] | None:
        """Input channels of the source and of the network, by the first kernel."""
        for key in self.target.anchors:
            if key in self.pairs and self.target.tensors[key].ndim > 3:
                source = self.weights[self.pairs[key]]
                return (source.shape[1], self.target.tensors[key].shape[1]) if source.ndim > 3 else None
        return None

    def fit(self, key: str) -> tuple[Tensor | None, list[str]]:
        """Return what the network's tensor is to become, ``None`` where nothing fits, and in words what was changed.

        Raises:
            ValueError: when ``source_grid`` is needed or does not fit.
        """
        own, value = self.target.tensors[key], self.weights[self.pairs[key]]
        done: list[str] = []
        if value.ndim == own.ndim:
            if key in self.target.readers and own.ndim > 3 and (value.shape[1], own.shape[1]) == self.channels:
                value, done = self._fit_channels(value, own.shape[1])
            elif key.endswith("position_embeddings") and self.target.grid and value.shape[2] == own.shape[2]:
                value, done = resize_positions(value, self.target.grid, self.source_grid)
        return (value, done) if value.shape == own.shape else (None, [])

    def _fit_channels(self, kernel: Tensor, channels: int) -> tuple[Tensor, list[str]]:
        image = kernel[:, : kernel.shape[1] - self.mask_channels]
        done = ["mask channel dropped"] if self.mask_channels else []
        if image.shape[1] == channels:
            return image, done
        return resize_input_channels(image, channels), [*done, f"input channels {image.shape[1]} -> {channels}"]


def resize_input_channels(kernel: Tensor, channels: int) -> Tensor:
    """Average a kernel ``[O, I, *K]`` over its inputs and spread it over ``channels``.

    A grey image repeated in all channels gives the response that it gave before.
    """
    mean = kernel.float().mean(1, keepdim=True) * (kernel.shape[1] / channels)
    return mean.expand(-1, channels, *kernel.shape[2:])


def resize_positions(
    positions: Tensor, grid: Sequence[int], source_grid: Sequence[int] | None = None
) -> tuple[Tensor, list[str]]:
    """Interpolate position embeddings ``[1, N, D]`` linearly to another grid of patches.

    Args:
        positions: row-major, maybe behind the one of a class token, which is dropped.
        grid: patches per axis to interpolate to.
        source_grid: patches per axis that ``positions`` are for; ``None``: ``grid`` itself where the number agrees,
            otherwise as many on each axis.

    Returns:
        The embeddings, and in words what was done to them.

    Raises:
        ValueError: when ``source_grid`` is needed or does not fit.
    """
    tokens = positions.shape[1]
    if source_grid is None:
        source_grid = grid if tokens == math.prod(grid) else _equal_sides(tokens, len(grid))
    extra = tokens - math.prod(source_grid)
    if extra not in (0, 1) or len(source_grid) != len(grid):
        raise ValueError(
            f"source_grid: expected {len(grid)} numbers of patches for {tokens} position embeddings, "
            f"got {tuple(source_grid)}."
        )
    done = ["class token dropped"] if extra else []
    if tuple(source_grid) == tuple(grid):
        return positions[:, extra:], done
    spread = positions[:, extra:].float().transpose(1, 2).unflatten(2, tuple(source_grid))
    resized = F.interpolate(spread, tuple(grid), mode=MODES[len(grid)], align_corners=False)
    return resized.flatten(2).transpose(1, 2), [*done, f"grid {_by(source_grid)} -> {_by(grid)}"]


def _equal_sides(tokens: int, dims: int) -> tuple[int, ...]:
    for number in (tokens, tokens - 1):
        side = round(number ** (1 / dims))
        if side**dims == number:
            return (side,) * dims
    raise ValueError(
        f"source_grid: {tokens} position embeddings do not lie on {dims} axes of equal length; "
        "give the numbers of patches per axis that the weights were trained with."
    )


def _by(grid: Sequence[int]) -> str:
    return "x".join(str(side) for side in grid)
