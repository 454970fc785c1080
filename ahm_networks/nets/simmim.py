# SPDX-License-Identifier: Apache-2.0
"""SimMIM on MONAI's ViT and Swin transformer: mask tokens in, one linear layer out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahm_networks.nets.backbones import build_backbone
from ahm_networks.nets.checks import check_size, checked_mask
from ahm_networks.nets.tokens import hidden_tokens, image_to_tokens, tokens_to_image
from ahm_networks.nets.vit import build_vit, embed, encode, learned_token
from ahm_transforms.masking.functional import patch_shape

__all__ = ["SimMIM"]

BACKBONES = ("unetr", "swinunetr")
SWIN_STAGES = ("layers1", "layers2", "layers3", "layers4")


class SimMIM(nn.Module):
    """An encoder that sees a learned token in place of each hidden one, and a linear head (Xie et al. 2022).

    A token is hidden if any of its voxels is, and images may differ in the number of hidden tokens. The head is one
    linear layer from the last tokens to their voxels, which is a 1x1 convolution with a pixel shuffle.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels; as many come out.
        img_size: of the images; a ``swinunetr`` takes any multiple of 32 later on.
        backbone: ``unetr`` (its ViT) or ``swinunetr`` (its Swin transformer).
        patch_size: voxels per token of the ViT; UNETR takes 16 only. That of ``swinunetr`` is 2.
        encoder_args: overrides for the arguments of the ViT, see :class:`~ahm_networks.nets.mae.MaskedAutoencoder`, or
            of MONAI's SwinUNETR.

    Attributes:
        token_size: voxels per token along each axis.

    Raises:
        ValueError: for an unknown backbone or encoder argument, or sizes that do not fit each other.

    Example:
        >>> network = SimMIM(2, img_size=32, encoder_args={"hidden_size": 24, "num_layers": 2})
        >>> network(torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32) < 0.001).shape
        torch.Size([1, 1, 32, 32])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        *,
        img_size: int | Sequence[int],
        backbone: str = "unetr",
        patch_size: int | Sequence[int] = 16,
        encoder_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.img_size = patch_shape(img_size, spatial_dims, "img_size")
        if backbone == "unetr":
            self.vit = build_vit(spatial_dims, in_channels, self.img_size, patch_size, encoder_args or {})
            self.token_size = self.stride = patch_shape(patch_size, spatial_dims)
            first = last = self.vit.patch_embedding.position_embeddings.shape[2]
        else:
            channels, args = (in_channels, in_channels), encoder_args or {}
            network: Any = build_backbone(backbone, spatial_dims, *channels, args, "encoder_args")[1]
            self.swinViT, self.normalize = network.swinViT, network.normalize
            self.token_size = tuple(self.swinViT.patch_size)
            self.stride = tuple(step * 2 ** len(SWIN_STAGES) for step in self.token_size)
            first, last = self.swinViT.embed_dim, 2 * self.swinViT.num_features
            self._check_swin_size(self.img_size, "img_size")
        self.backbone = backbone
        self.mask_token = learned_token(first)
        self.head = nn.Linear(last, in_channels * math.prod(self.stride))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the whole of ``image``.

        Args:
            image: ``[B, C, *S]``; of ``img_size`` for ``unetr``, of multiples of 32 for ``swinunetr``.
            mask: ``[B, 1, *S]`` bool, ``True`` = hidden; ``None`` hides nothing.

        Returns:
            ``[B, C, *S]``.

        Raises:
            ValueError: when image or mask do not fit the network or each other.
        """
        mask = checked_mask(image, mask, self.spatial_dims, self.in_channels)
        visible = image.masked_fill(mask, 0.0)  # what is not finite would reach the embedding's gradient
        last = self._run_vit(visible, mask) if self.backbone == "unetr" else self._run_swin(visible, mask)
        return tokens_to_image(self.head(last), self.stride, image.shape[2:], self.in_channels)

    def _run_vit(self, image: Tensor, mask: Tensor) -> Tensor:
        check_size(image, self.img_size)
        embedded = embed(self.vit, image_to_tokens(image, self.token_size))
        hidden = hidden_tokens(mask, self.token_size).unsqueeze(-1)
        shown = torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)
        return encode(self.vit, shown + self.vit.patch_embedding.position_embeddings)

    def _run_swin(self, image: Tensor, mask: Tensor) -> Tensor:
        """What SwinUNETR's ``swinViT`` does, with the mask token after its first layer; its last map as tokens."""
        self._check_swin_size(image.shape[2:], "image")
        swin = self.swinViT
        features = swin.patch_embed(image)
        hidden = hidden_tokens(mask, self.token_size).view(len(image), 1, *features.shape[2:])
        token = self.mask_token.to(features.dtype).view(1, -1, *[1] * self.spatial_dims)
        features = swin.pos_drop(torch.where(hidden, token, features))
        for stage in SWIN_STAGES:
            for module in (*getattr(swin, f"{stage}c", ()), *getattr(swin, stage)):  # convolutions of version 2 only
                features = module(features.contiguous())
        return swin.proj_out(features, self.normalize).flatten(2).transpose(1, 2)

    def _check_swin_size(self, size: Sequence[int], name: str) -> None:
        if any(side % step for side, step in zip(size, self.stride, strict=True)):
            raise ValueError(f"{name}: swinunetr needs multiples of {self.stride}, got {tuple(size)}.")
