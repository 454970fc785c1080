# SPDX-License-Identifier: Apache-2.0
"""Images as sequences of tokens, in the order of MONAI's ``PatchEmbeddingBlock``.

A *token* is the voxels of one patch. Tokens follow each other row-major on their grid, as do the voxels inside a token,
each with its channels side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["hidden_tokens", "image_to_tokens", "token_grid", "tokens_to_image"]


def image_to_tokens(image: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut an image into tokens.

    Args:
        image: ``[B, C, *S]``, any dtype.
        patch: voxels per token along each axis; they divide ``S``.

    Returns:
        ``[B, N, prod(patch) * C]``.

    Raises:
        ValueError: when the patch does not divide the image.

    Example:
        >>> import torch
        >>> image_to_tokens(torch.arange(8).view(1, 1, 2, 4), (2, 2)).tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    batch, channels, *size = image.shape
    grid = token_grid(size, patch)
    dims = len(grid)
    split = image.reshape(batch, channels, *(n for pair in zip(grid, patch, strict=True) for n in pair))
    order = (0, *range(2, 2 * dims + 2, 2), *range(3, 2 * dims + 3, 2), 1)
    return split.permute(order).reshape(batch, math.prod(grid), -1)


def tokens_to_image(tokens: Tensor, patch: Sequence[int], spatial_size: Sequence[int], channels: int) -> Tensor:
    """Put tokens together to an image, the inverse of :func:`image_to_tokens`.

    Args:
        tokens: ``[B, N, prod(patch) * C]``.
        patch: voxels per token along each axis.
        spatial_size: ``S`` of the image.
        channels: ``C`` of the image.

    Returns:
        ``[B, C, *S]``.

    Raises:
        ValueError: when the patch does not divide the image.
    """
    grid = token_grid(spatial_size, patch)
    dims = len(grid)
    split = tokens.reshape(tokens.shape[0], *grid, *patch, channels)
    order = (0, 2 * dims + 1, *(axis for n in range(dims) for axis in (1 + n, 1 + dims + n)))
    return split.permute(order).reshape(tokens.shape[0], channels, *spatial_size)


def hidden_tokens(mask: Tensor, patch: Sequence[int]) -> Tensor:
    """Tell which tokens have a hidden voxel: ``[B, 1, *S]`` bool to ``[B, N]`` bool.

    Raises:
        ValueError: when the patch does not divide the mask.
    """
    return image_to_tokens(mask, patch).any(-1)


def token_grid(size: Sequence[int], patch: Sequence[int]) -> list[int]:
    """Tokens along each axis.

    Raises:
        ValueError: when the patch does not divide the size.
    """
    if len(size) != len(patch) or any(s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(f"patch: expected {len(size)} sizes that divide {tuple(size)}, got {tuple(patch)}.")
    return [s // p for s, p in zip(size, patch, strict=True)]
