# SPDX-License-Identifier: Apache-2.0
"""Rebuild an image from what a mask leaves of it, with any of MONAI's encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahm_networks.nets.backbones import build_backbone, with_img_size
from ahm_networks.nets.checks import check_room, checked_mask
from ahm_networks.nets.padding import pad_to_multiples

__all__ = ["ReconstructionUNet"]

FILLS = ("zero", "mean", "token")


class ReconstructionUNet(nn.Module):
    """An encoder-decoder that sees an image with its hidden voxels filled, and predicts the whole image.

    Images of any size are padded to what the strides need and cut back.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels; as many come out.
        backbone: ``unet``, ``basicunet``, ``dynunet``, ``segresnet``, ``swinunetr``, ``unetr`` or ``contextunet``; or a
            network that maps ``[B, in_channels (+ 1 with mask_channel), *S]`` to ``[B, in_channels, *S]``.
        fill: what stands in for hidden voxels: ``zero``, ``mean`` of the image's visible voxels, or a learned
            ``token``, one number per channel.
        mask_channel: whether the mask is given to the network as a further channel.
        backbone_args: overrides for the named backbone's arguments. ``deep_supervision`` of a ``dynunet`` is left to
            labels and stays off here.
        image_size: of the largest images; a ``unetr``, which needs it, takes it for ``img_size`` where
            ``backbone_args`` have none.

    Raises:
        ValueError: for an unknown backbone or fill.

    Example:
        >>> network = ReconstructionUNet(2, backbone_args={"channels": (8, 16), "strides": (2,)})
        >>> network(torch.rand(1, 1, 33, 40), torch.zeros(1, 1, 33, 40, dtype=torch.bool)).shape
        torch.Size([1, 1, 33, 40])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        *,
        backbone: str | nn.Module = "unet",
        fill: str = "zero",
        mask_channel: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if fill not in FILLS:
            raise ValueError(f"fill: expected one of {', '.join(FILLS)}, got {fill!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.fill = fill
        self.mask_channel = mask_channel
        self.token = nn.Parameter(torch.zeros(in_channels)) if fill == "token" else None
        self.limited = backbone == "unetr"
        self.fixed_size = self.limited or not isinstance(backbone, str)
        self.divisor: tuple[int, ...] = (1,) * spatial_dims
        if isinstance(backbone, str):
            seen = in_channels + mask_channel
            args = with_img_size(backbone, backbone_args, image_size)
            if backbone == "dynunet":
                args["deep_supervision"] = False
            self.divisor, backbone = build_backbone(backbone, spatial_dims, seen, in_channels, args)
        self.backbone = backbone

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rebuild ``image`` from its visible voxels.

        Args:
            image: ``[B, C, *S]``.
            mask: ``[B, 1, *S]`` bool, ``True`` = hidden; ``None`` hides nothing.

        Returns:
            ``[B, C, *S]``.

        Raises:
            ValueError: when the shapes do not fit the network or each other.
        """
        mask = checked_mask(image, mask, self.spatial_dims, self.in_channels)
        if self.limited:
            check_room(image, self.divisor)
        visible = self.visible(image, mask)
        if self.mask_channel:
            visible = torch.cat([visible, mask.to(visible.dtype)], dim=1)
        rebuilt = self.backbone(pad_to_multiples(visible, list(self.divisor), self.fixed_size))
        return rebuilt[(..., *[slice(size) for size in image.shape[2:]])]

    def visible(self, image: Tensor, mask: Tensor) -> Tensor:
        """What the backbone sees of the image: hidden voxels filled, ``[B, C, *S]``."""
        if self.token is not None:
            return torch.where(mask, self.token.to(image.dtype).view(1, -1, *[1] * self.spatial_dims), image)
        kept = image.masked_fill(mask, 0.0)
        if self.fill == "zero":
            return kept
        axes = tuple(range(2, image.ndim))
        shown = (~mask).sum(axes, keepdim=True).clamp_min(1)
        mean = kept.sum(axes, keepdim=True, dtype=torch.promote_types(image.dtype, torch.float32)) / shown
        return torch.where(mask, mean.to(image.dtype), image)
