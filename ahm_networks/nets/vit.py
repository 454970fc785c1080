# SPDX-License-Identifier: Apache-2.0
"""MONAI's ViT, the one inside UNETR, built and run so that a mask can step in between its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNETR, ViT
from torch import Tensor, nn

from ahm_networks.nets.tokens import token_grid
from ahm_transforms.masking.functional import patch_shape

__all__ = ["build_vit", "embed", "encode", "freeze_unused", "learned_token", "sincos_positions"]

GIVEN = ("spatial_dims", "in_channels", "img_size", "patch_size")
NEVER = ("classification", "num_classes", "post_activation")  # of a class token, which UNETR's ViT has not


def build_vit(
    spatial_dims: int,
    in_channels: int,
    img_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    args: Mapping[str, Any],
) -> ViT:
    """Build a ViT without class token; with patches of 16 it is UNETR's, defaults included.

    Its positions are learned, as UNETR's, but start as `sincos_positions`.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        img_size: of the images it will see.
        patch_size: voxels per token; divides ``img_size``.
        args: overrides for the ViT's arguments. Those that only UNETR knows are left out, so that one set of arguments
            serves both.

    Raises:
        ValueError: for an unknown argument, or sizes that do not fit each other.
    """
    size = patch_shape(img_size, spatial_dims, "img_size")
    patch = patch_shape(patch_size, spatial_dims)
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(f"img_size: expected multiples of the patch_size {patch}, got {size}.")
    vit = ViT(in_channels, size, patch, spatial_dims=spatial_dims, **_known(args))
    positions = vit.patch_embedding.position_embeddings
    if args.get("pos_embed_type", "learnable") == "learnable":
        positions.data = sincos_positions(token_grid(size, patch), positions.shape[2])[None]
    freeze_unused(vit)
    return vit


def _known(args: Mapping[str, Any]) -> dict[str, Any]:
    known = [name for name in inspect.signature(ViT).parameters if name not in (*GIVEN, *NEVER)]
    unetr = [name for name in inspect.signature(UNETR).parameters if name not in ("spatial_dims", "in_channels")]
    unknown = [name for name in args if name not in (*known, *unetr) or name == "out_channels"]
    if unknown:
        raise ValueError(f"encoder_args: the ViT does not take {', '.join(unknown)}; it takes {', '.join(known)}.")
    return {name: value for name, value in args.items() if name in known}


def freeze_unused(network: nn.Module) -> None:
    """Freeze the norms of cross attention, which MONAI's blocks hold and never call.

    Distributed training would otherwise wait for their gradients.
    """
    for name, module in network.named_modules():
        if name.endswith("norm_cross_attn"):
            module.requires_grad_(False)


def embed(vit: ViT, tokens: Tensor) -> Tensor:
    """Embed voxels, without positions: the same as ``vit.patch_embedding.patch_embeddings`` on these tokens alone.

    Args:
        vit: with patches of any kind, ``conv`` or ``perceptron``.
        tokens: ``[B, n, prod(patch) * C]`` as :func:`~ahm_networks.nets.tokens.image_to_tokens` cuts them.

    Returns:
        ``[B, n, hidden_size]``.
    """
    layer = vit.patch_embedding.patch_embeddings
    if isinstance(layer, nn.Sequential):
        return layer[1](tokens)
    # One channel stays where it is: moved, it would give the gradient strides that slow distributed training down.
    kernel = layer.weight if layer.weight.shape[1] == 1 else layer.weight.movedim(1, -1)
    return F.linear(tokens, kernel.flatten(1), layer.bias)


def encode(vit: ViT, embedded: Tensor) -> Tensor:
    """Run dropout, blocks and last norm over tokens ``[B, n, hidden_size]`` that have their positions."""
    tokens = vit.patch_embedding.dropout(embedded)
    for block in vit.blocks:
        tokens = block(tokens)
    return vit.norm(tokens)


def sincos_positions(grid: Sequence[int], width: int) -> Tensor:
    """Sine and cosine of each token's place, ``[prod(grid), width]``, as in He et al. 2022.

    Every axis has the same number of waves, of lengths from 2 pi to 20000 pi tokens (Vaswani et al. 2017, section
    3.5); columns that are left over are 0.

    Args:
        grid: tokens along each axis.
        width: columns.
    """
    waves = width // (2 * len(grid))
    rates = 10000.0 ** -(torch.arange(waves) / max(waves, 1))
    axes = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * rates for axis in axes], dim=1)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(table, (0, width - table.shape[1]))


def learned_token(width: int) -> nn.Parameter:
    """Make the vector that stands in for a hidden token."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
