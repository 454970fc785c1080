# SPDX-License-Identifier: Apache-2.0
"""What networks demand of an image and its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.utils import convert_to_tensor
from torch import Tensor

__all__ = ["check_image", "check_room", "check_size", "checked_mask"]


def check_image(image: Tensor, spatial_dims: int, in_channels: int) -> None:
    """Demand an image ``[B, C, *S]``.

    Raises:
        ValueError: for another number of axes or channels.
    """
    if image.ndim != spatial_dims + 2 or image.shape[1] != in_channels:
        raise ValueError(
            f"image: expected [B, {in_channels}, *S] with {spatial_dims} spatial axes, "
            f"got shape {tuple(image.shape)}; set in_channels and spatial_dims to fit the data."
        )


def checked_mask(image: Tensor, mask: Tensor | None, spatial_dims: int, in_channels: int) -> Tensor:
    """Return the mask of an image ``[B, C, *S]``: a plain tensor ``[B, 1, *S]`` bool; without one, nothing is hidden.

    Raises:
        ValueError: when the image does not fit the network, or the mask the image.
    """
    check_image(image, spatial_dims, in_channels)
    if mask is None:
        mask = torch.zeros_like(image[:, :1], dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"mask: expected bool [B, 1, *S] for an image of shape {tuple(image.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
    plain: Tensor = convert_to_tensor(mask)
    return plain


def check_room(image: Tensor, img_size: Sequence[int]) -> None:
    """Demand an image that can be padded to the one size for which a UNETR has position embeddings.

    Raises:
        ValueError: for a larger image.
    """
    if any(side > most for side, most in zip(image.shape[2:], img_size, strict=True)):
        raise ValueError(
            f"image: unetr was built for img_size={list(img_size)}, got {list(image.shape[2:])}; "
            "set the images' size or backbone_args to fit."
        )


def check_size(image: Tensor, img_size: Sequence[int]) -> None:
    """Demand the one size for which a network has position embeddings.

    Raises:
        ValueError: for an image of another size.
    """
    if tuple(image.shape[2:]) != tuple(img_size):
        raise ValueError(
            f"image: this network was built for img_size={list(img_size)}, got {list(image.shape[2:])}; "
            "crop or pad the images to it, or set img_size."
        )
