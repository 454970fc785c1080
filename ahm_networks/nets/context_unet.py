# SPDX-License-Identifier: Apache-2.0
"""Intelligent Masking's reconstruction network: a U-Net whose bottleneck spreads context channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from monai.networks.nets.basic_unet import UpCat
from torch import Tensor, nn

__all__ = ["ContextLevel", "ContextUNet"]


class ContextUNet(nn.Module):
    """U-Net with a depth-wise convolution at its bottleneck, after Intelligent Masking.

    Bahrami et al., "Intelligent masking: deep Q-learning for context encoding in medical image analysis", MLMI 2022.
    Every level is convolution, norm, activation, convolution, with a maximum over 2 voxels per axis ahead of all but
    the first. At the bottleneck, one wide kernel per channel carries what surrounds a hole into it.

    The paper's upsampling is not known: here MONAI's ``UpCat`` does it with transposed convolutions, and fits odd sizes
    by repeating their last voxel, where the paper interpolates the output. Used as a backbone, 300 pixels are padded to
    320, so that the bottleneck has 10 x 10 places instead of 9 x 9.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: channels that come out.
        features: channels of every level, the bottleneck last.
        norm: MONAI's name or arguments of the norm.
        act: MONAI's name or arguments of the activation.
        context_kernel: odd width of the depth-wise kernel; the paper's is ``2 * (1 + side // 128) - 1``, 5 for 300.
        dropout: ahead of the activations.

    Raises:
        ValueError: for fewer than two levels or an even kernel.

    Example:
        >>> import torch
        >>> ContextUNet(2, features=(4, 8, 8))(torch.rand(1, 1, 33, 20)).shape
        torch.Size([1, 1, 33, 20])
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        features: Sequence[int] = (16, 32, 64, 64, 128, 128),
        norm: str | tuple[Any, ...] = "batch",
        act: str | tuple[Any, ...] = "relu",
        context_kernel: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"features: expected the channels of two levels or more, got {tuple(features)}.")
        if context_kernel < 1 or context_kernel % 2 == 0:
            raise ValueError(f"context_kernel: expected an odd width, got {context_kernel}.")
        self.features = tuple(features)
        options: dict[str, Any] = {"norm": norm, "act": act, "dropout": dropout}
        steps = list(pairwise(features))
        first = _block(spatial_dims, in_channels, features[0], **options)
        blocks = [first, *(_down(spatial_dims, *widths, **options) for widths in steps)]
        body: nn.Module = nn.Sequential(blocks.pop(), _context(spatial_dims, features[-1], context_kernel))
        for width, below in reversed(steps):
            body = ContextLevel(blocks.pop(), body, _up(spatial_dims, below, width, **options))
        self.body = body
        self.head = Conv[Conv.CONV, spatial_dims](features[0], out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, in_channels, *S]`` to ``[B, out_channels, *S]``; a side is at least ``2 ** (levels - 1)`` long."""
        return self.head(self.body(image))


class ContextLevel(nn.Module):
    """One level of :class:`ContextUNet` with all that lies below it.

    Args:
        block: the level's part of the encoder.
        below: the next level, or the bottleneck.
        up: the level's part of the decoder; takes what comes from below and what ``block`` gave.
    """

    def __init__(self, block: nn.Module, below: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.below = below
        self.up = up

    def forward(self, image: Tensor) -> Tensor:
        """Map this level's input to its output, of the size of what ``block`` gives."""
        side = self.block(image)
        return self.up(self.below(side), side)


def _block(dims: int, channels: int, width: int, **options: Any) -> nn.Sequential:
    """MONAI's ``TwoConv`` without norm and activation at its end, which the paper's block does not have."""
    return nn.Sequential(Convolution(dims, channels, width, **options), Convolution(dims, width, width, conv_only=True))


def _down(dims: int, channels: int, width: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(Pool[Pool.MAX, dims](kernel_size=2), *_block(dims, channels, width, **options))


def _context(dims: int, width: int, kernel: int) -> nn.Module:
    return Convolution(dims, width, width, kernel_size=kernel, groups=width, conv_only=True)


def _up(dims: int, below: int, width: int, **options: Any) -> nn.Module:
    up = UpCat(dims, below, width, width, bias=True, **options)
    up.convs = _block(dims, below // 2 + width, width, **options)
    return up
