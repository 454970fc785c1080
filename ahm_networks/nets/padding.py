# SPDX-License-Identifier: Apache-2.0
"""Fit images of any size to the strides of a network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_to_multiples"]


def pad_to_multiples(image: Tensor, divisor: list[int], fixed_size: bool = False) -> Tensor:
    """Add zeros at the end of each axis until the strides divide it, in words that TorchScript knows.

    Never down to a single voxel at the bottom, which has no instance norm: one more step is added then.

    Args:
        image: ``[B, C, *S]``.
        divisor: what each axis must be a multiple of.
        fixed_size: whether the divisor is the one size that the network takes; no step is then added.

    Example:
        >>> import torch
        >>> [tuple(pad_to_multiples(torch.rand(1, 1, size, 8), [8, 8]).shape[2:]) for size in (5, 9)]
        [(8, 16), (16, 8)]
    """
    padding = [0] * (2 * len(divisor))
    smallest = not fixed_size
    for axis, step in enumerate(divisor):
        missing = -image.shape[axis + 2] % step
        smallest = smallest and image.shape[axis + 2] + missing == step
        padding[-2 * axis - 1] = missing
    if smallest:
        padding[1] += divisor[-1]
    return F.pad(image, padding) if max(padding) > 0 else image
