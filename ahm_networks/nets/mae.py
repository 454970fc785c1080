# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder (MAE) on MONAI's ViT, with the mask as an input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from ahm_networks.nets.checks import check_size, checked_mask
from ahm_networks.nets.tokens import image_to_tokens, token_grid, tokens_to_image
from ahm_networks.nets.vit import build_vit, embed, encode, freeze_unused, learned_token, sincos_positions
from ahm_transforms.masking.functional import patch_shape

__all__ = ["MaskedAutoencoder"]


class MaskedAutoencoder(nn.Module):
    """A ViT that sees the visible tokens alone, and a light decoder that predicts the hidden ones (He et al. 2022).

    Every image of a batch must have the same number of hidden tokens. Shapes depend on that number, so the host reads
    it once in each forward. The ViT has no class token and ends with its norm, as UNETR's: ``vit.*`` moves there.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels; as many come out.
        img_size: of the images, a multiple of ``patch_size``.
        backbone: whose encoder it is: ``unetr``, as nothing but a ViT can leave tokens out.
        patch_size: voxels per token; UNETR takes 16 only.
        encoder_args: overrides for the arguments of UNETR's ViT, and ``num_layers``; what only UNETR knows is ignored.
        decoder_hidden_size: width of the decoder; its MLPs are four times as wide.
        decoder_num_layers: blocks of the decoder.
        decoder_num_heads: heads of each of these blocks.

    Attributes:
        token_size: voxels per token along each axis; a mask must hide each of them wholly or not at all.

    Raises:
        ValueError: for another backbone, an unknown encoder argument, or sizes that do not fit each other.

    Example:
        >>> network = MaskedAutoencoder(2, img_size=32, encoder_args={"hidden_size": 24, "num_layers": 2})
        >>> mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
        >>> mask[..., 16:] = True
        >>> network(torch.rand(1, 1, 32, 32), mask).shape
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
        decoder_hidden_size: int = 512,
        decoder_num_layers: int = 1,
        decoder_num_heads: int = 8,
    ) -> None:
        super().__init__()
        if backbone != "unetr":
            raise ValueError(
                "backbone: a masked autoencoder leaves tokens out, which only the ViT of 'unetr' can, "
                f"got {backbone!r}; take SimMIM for 'swinunetr'."
            )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.img_size = patch_shape(img_size, spatial_dims, "img_size")
        self.token_size = patch_shape(patch_size, spatial_dims)
        self.vit = build_vit(spatial_dims, in_channels, self.img_size, self.token_size, encoder_args or {})
        width = decoder_hidden_size
        hidden_size = self.vit.patch_embedding.position_embeddings.shape[2]
        self.decoder_embed = nn.Linear(hidden_size, width)
        self.mask_token = learned_token(width)
        self.decoder_positions = nn.Parameter(sincos_positions(token_grid(self.img_size, self.token_size), width))
        blocks = [TransformerBlock(width, 4 * width, decoder_num_heads) for _ in range(decoder_num_layers)]
        self.decoder = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, in_channels * math.prod(self.token_size))
        freeze_unused(self.decoder)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the hidden tokens of ``image``.

        Args:
            image: ``[B, C, *S]`` of ``img_size``.
            mask: ``[B, 1, *S]`` bool, ``True`` = hidden; ``None`` hides nothing.

        Returns:
            ``[B, C, *S]`` in the image's dtype: predicted where hidden, the image itself where visible.

        Raises:
            ValueError: when image or mask do not fit, images differ in the number of hidden tokens, a token is hidden
                in part, none is visible or, in training, none is hidden.
        """
        mask = checked_mask(image, mask, self.spatial_dims, self.in_channels)
        check_size(image, self.img_size)
        hides = image_to_tokens(mask, self.token_size)
        hidden = hides.any(-1)
        count = self._count(hides, hidden)
        if count == 0 and self.training:
            raise ValueError(
                f"mask: none of the {hidden.shape[1]} tokens is hidden, there is nothing to predict; raise mask_ratio."
            )
        if count == 0:
            return image
        places = hidden.int().argsort(dim=1, stable=True)  # visible tokens first, each kind in its order
        seen, unseen = places.tensor_split([hidden.shape[1] - count], dim=1)
        voxels = image_to_tokens(image, self.token_size)
        predicted = self._decode(self._encode(voxels, seen), seen, unseen)
        rebuilt = voxels.scatter(1, _along(unseen, predicted), predicted.to(voxels.dtype))
        return tokens_to_image(rebuilt, self.token_size, self.img_size, self.in_channels)

    def _encode(self, voxels: Tensor, seen: Tensor) -> Tensor:
        """Tokens of the visible places, ``[B, V, hidden_size]``."""
        positions = F.embedding(seen, self.vit.patch_embedding.position_embeddings[0])
        return encode(self.vit, embed(self.vit, voxels.gather(1, _along(seen, voxels))) + positions)

    def _decode(self, encoded: Tensor, seen: Tensor, unseen: Tensor) -> Tensor:
        """Voxels of the hidden places, ``[B, H, prod(patch) * C]``.

        Attention does not ask for an order: the visible tokens stand ahead of the hidden ones, nothing is put back.
        """
        visible = self.decoder_embed(encoded) + F.embedding(seen, self.decoder_positions)
        hidden = self.mask_token + F.embedding(unseen, self.decoder_positions)
        tokens = self.decoder(torch.cat([visible, hidden], dim=1))
        return self.head(self.decoder_norm(tokens[:, seen.shape[1] :]))

    def _count(self, hides: Tensor, hidden: Tensor) -> int:
        """Hidden tokens of each image; the one place where the host waits for the device."""
        partial = (hidden & ~hides.all(-1)).sum()
        *counts, partly = torch.cat([hidden.sum(1), partial[None]]).tolist()
        if partly:
            raise ValueError(
                f"mask: {partly} tokens of {self.token_size} voxels are hidden in part; give the masker a patch_size "
                "that is a multiple of the network's patch_size along each axis."
            )
        if len(set(counts)) > 1:
            raise ValueError(
                f"mask: expected equally many hidden tokens in every image of a batch, got {sorted(set(counts))}; "
                "take a masker of exact counts (UniformMasker, or a CurriculumMasker around any but Bernoulli agents), "
                "no foreground_threshold, and images whose size is a multiple of its patch_size."
            )
        if counts[0] == hidden.shape[1]:
            raise ValueError(f"mask: all {counts[0]} tokens are hidden, none is left to encode; lower mask_ratio.")
        return int(counts[0])


def _along(places: Tensor, tokens: Tensor) -> Tensor:
    return places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
