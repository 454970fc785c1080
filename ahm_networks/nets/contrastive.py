# SPDX-License-Identifier: Apache-2.0
"""An encoder with a projection head, to be pretrained by telling crops apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from ahm_networks.nets.backbones import build_backbone, with_img_size
from ahm_networks.nets.checks import check_image
from ahm_networks.nets.encoders import drop_decoder, encoder_channels, encoder_features
from ahm_networks.nets.padding import pad_to_multiples
from ahm_networks.nets.vit import freeze_unused

__all__ = ["ContrastiveEncoder"]


class ContrastiveEncoder(nn.Module):
    """The encoder of a backbone with SimCLR's projection head on its last feature map (Chen et al., ICML 2020).

    The encoder's state keys are ``backbone.<MONAI's key>``, those of ``ReconstructionUNet``; nothing of the decoder is
    left. Images of any size are padded to what the strides need.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        backbone: ``unet``, ``basicunet``, ``dynunet``, ``segresnet``, ``swinunetr``, ``unetr`` or ``contextunet``.
        backbone_args: overrides for the backbone's arguments.
        projection_size: length of the vector that comes out.
        hidden_size: width of the head; ``None`` takes the channels of the last feature map.
        image_size: of the largest images; a ``unetr``, which needs it, takes it for ``img_size`` where
            ``backbone_args`` have none.

    Raises:
        ValueError: for an unknown backbone or backbone argument, or a size below 1.

    Example:
        >>> import torch
        >>> network = ContrastiveEncoder(2, backbone_args={"channels": (8, 16), "strides": (2,)})
        >>> network(torch.rand(4, 1, 33, 40)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        *,
        backbone: str = "unet",
        backbone_args: Mapping[str, Any] | None = None,
        projection_size: int = 128,
        hidden_size: int | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        args = with_img_size(backbone, backbone_args, image_size)
        divisor, network = build_backbone(backbone, spatial_dims, in_channels, in_channels, args)
        channels = encoder_channels(network)[-1]
        hidden_size = channels if hidden_size is None else hidden_size
        if min(projection_size, hidden_size) < 1:
            raise ValueError(
                f"projection_size, hidden_size: expected at least 1, got {projection_size} and {hidden_size}."
            )
        self.in_channels = in_channels
        self.divisor = list(divisor)
        self.fixed_size = backbone == "unetr"
        self.backbone = drop_decoder(network)
        freeze_unused(network)
        self.head = _projection(spatial_dims, channels, hidden_size, projection_size)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to ``[B, projection_size]`` float32, of any length: the loss looks at directions only.

        Raises:
            ValueError: when the image does not fit the network.
        """
        check_image(image, len(self.divisor), self.in_channels)
        image = pad_to_multiples(image, self.divisor, self.fixed_size)
        return self.head(encoder_features(self.backbone, image)[-1]).float()


def _projection(dims: int, channels: int, hidden: int, size: int) -> nn.Sequential:
    """SimCLR's head behind a convolution: after an instance norm, the average of a channel by itself says little."""
    mix, average = Conv[Conv.CONV, dims](channels, hidden, kernel_size=3, padding=1), Pool[Pool.ADAPTIVEAVG, dims](1)
    mlp = nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, size)
    return nn.Sequential(mix, nn.ReLU(), average, nn.Flatten(), *mlp)
