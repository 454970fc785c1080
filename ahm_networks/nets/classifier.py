# SPDX-License-Identifier: Apache-2.0
"""Networks that tell the class of a whole image: a pretrained encoder with a head, VGG16, DenseNet121."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv, Norm, Pool
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import DenseNet121, DynUNet, SegResNet
from torch import Tensor, nn
from torch.nn import functional as F

from ahm_networks.nets.backbones import build_backbone, with_img_size
from ahm_networks.nets.checks import check_image, check_room
from ahm_networks.nets.encoders import drop_decoder, encoder_channels, encoder_features
from ahm_networks.nets.padding import pad_to_multiples
from ahm_networks.nets.policy import VGG16_BLOCKS

__all__ = ["VGG16", "EncoderClassifier", "classifier_network"]


class EncoderClassifier(nn.Module):
    """The encoder of a pretrained backbone with a classification head on its last feature map.

    The encoder's state keys are ``encoder.<MONAI's key>``; nothing of the decoder is left. Images of any size are
    padded to what the strides need. TorchScript takes every backbone but ``swinunetr``, for MONAI's own code: export
    that one by tracing, ``ckpt_export --use_trace True --input_shape "[1,1,96,96]"``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: how many classes; as many logits come out.
        backbone: ``unet``, ``basicunet``, ``dynunet``, ``segresnet``, ``swinunetr``, ``unetr`` or ``contextunet``.
        backbone_args: overrides for the backbone's arguments; the same as in pretraining. ``unetr`` needs ``img_size``.
        head: ``conv``: a 3-wide convolution to 32 channels, global average and a hidden layer of 16, after Intelligent
            Masking (Bahrami et al. 2022) but with leaky ReLUs; or ``linear``: global average and one layer. Encoders
            that end with an instance norm leave little in such an average: ``basicunet``, ``unet`` without residual
            units. ``stages``: mean and standard deviation of every channel of every encoder stage, standardised over
            the batch as in MAE's linear probe (He et al. 2022), and one layer: it reads what a pretraining left at all
            scales, instance norms or not. It wants batches of some eight images, and is exported by tracing.
        dropout: ahead of the last layer.

    Raises:
        ValueError: for an unknown backbone, backbone argument or head.

    Example:
        >>> network = EncoderClassifier(2, 1, 3, backbone_args={"channels": (8, 16), "strides": (2,)})
        >>> network(torch.rand(4, 1, 33, 40)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        *,
        backbone: str = "unet",
        backbone_args: Mapping[str, Any] | None = None,
        head: str = "conv",
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}.")
        divisor, network = build_backbone(backbone, spatial_dims, in_channels, in_channels, backbone_args or {})
        self.in_channels = in_channels
        self.divisor = list(divisor)
        self.fixed_size = backbone == "unetr"
        self.all_stages = head == "stages"
        self.head = HEADS[head](spatial_dims, encoder_channels(network), num_classes, dropout)
        self.encoder = _encoder_only(network)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to logits ``[B, num_classes]``.

        Raises:
            ValueError: when the image does not fit the network.
        """
        if not torch.jit.is_scripting():
            check_image(image, len(self.divisor), self.in_channels)
            if self.fixed_size:
                check_room(image, self.divisor)
        padded = pad_to_multiples(image, self.divisor, self.fixed_size)
        if not torch.jit.is_scripting() and self.all_stages:
            return self.head(_statistics(encoder_features(self.encoder, padded)))
        return self.head(self.encoder(padded))

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what a script could not follow; torch calls this ahead of scripting.

        Raises:
            ValueError: for the head ``stages``.
        """
        if self.all_stages:
            raise ValueError(
                "head: a classifier with the head 'stages' is exported by tracing, got a request to script it; "
                'pass --use_trace True --input_shape "[1,1,96,96]" with the images\' own channels and size.'
            )
        return self


class VGG16(nn.Module):
    """VGG16, configuration D of Simonyan & Zisserman 2015, in 2D and 3D.

    A global average stands in for the three fully connected layers, so that images of any size are taken. The
    convolutions' state keys are ``features.<n>`` as in VGG16's usual weights.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: how many classes; as many logits come out.
        batch_norm: whether batch norm follows each convolution.
        dropout: ahead of the last layer.

    Example:
        >>> VGG16(2, 1, 3)(torch.rand(2, 1, 50, 40)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, num_classes: int, *, batch_norm: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        conv, norm = Conv[Conv.CONV, spatial_dims], Norm[Norm.BATCH, spatial_dims]
        layers: list[nn.Module] = []
        channels = in_channels
        for width, depth in (*VGG16_BLOCKS, (512, 3)):
            for _ in range(depth):
                layers += [conv(channels, width, kernel_size=3, padding=1), *([norm(width)] if batch_norm else [])]
                layers += [nn.ReLU(inplace=True)]
                channels = width
            layers += [Pool[Pool.MAX, spatial_dims](kernel_size=2, ceil_mode=True)]
        self.features = nn.Sequential(*layers)
        self.head = _linear_head(spatial_dims, [channels], num_classes, dropout)
        for layer in layers:
            if isinstance(layer, conv):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to logits ``[B, num_classes]``."""
        return self.head(self.features(image))


def classifier_network(
    name: str,
    spatial_dims: int,
    in_channels: int,
    num_classes: int,
    *,
    backbone: str = "unet",
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
    **args: Any,
) -> nn.Module:
    """Build a classifier by name.

    Args:
        name: ``encoder`` (:class:`EncoderClassifier`), ``vgg16`` (:class:`VGG16`) or ``densenet121`` (MONAI's).
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: how many classes; as many logits come out.
        backbone: of ``encoder``; the others have none.
        backbone_args: overrides for the backbone's arguments; the same as in pretraining.
        image_size: of the images; a ``unetr`` takes it for ``img_size`` where that is not given.
        **args: further arguments of that network.

    Raises:
        ValueError: for an unknown name, a backbone for a network that has none, or as the network itself.

    Example:
        >>> classifier_network("encoder", 2, 1, 3, backbone="segresnet")(torch.rand(2, 1, 50, 40)).shape
        torch.Size([2, 3])
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name: expected one of {', '.join(CLASSIFIERS)}, got {name!r}.")
    given = dict(backbone_args or {})
    if name == "encoder":
        args |= {"backbone": backbone, "backbone_args": with_img_size(backbone, given, image_size)}
    elif backbone != "unet" or given:
        raise ValueError(f"backbone: {name} has none, got {backbone!r} with {given}; only 'encoder' takes one.")
    return CLASSIFIERS[name](spatial_dims, in_channels, num_classes, **args)


class _First(nn.Module):
    """Stands where the decoder was: hands on what comes from below, whatever comes from the side."""

    def forward(self, below: Tensor, side: Tensor | None = None) -> Tensor:
        return below


class _Through(SkipConnection):
    """A skip connection of UNet that nothing skips."""

    def forward(self, x: Tensor) -> Tensor:
        return self.submodule(x)


def _encoder_only(network: nn.Module) -> nn.Module:
    """Drop the decoder so that the network itself returns its last feature map, a way that TorchScript can follow."""
    drop_decoder(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, SkipConnection):
                setattr(parent, name, _Through(child.submodule))
            elif isinstance(child, nn.Identity):
                setattr(parent, name, _First())
    if isinstance(network, SegResNet):  # walks through lists of decoder blocks
        network.up_layers = network.up_samples = nn.ModuleList()
    if isinstance(network, DynUNet):  # would collect what its decoder makes
        network.deep_supervision = False
    return network


def _linear_head(dims: int, channels: list[int], classes: int, dropout: float) -> nn.Sequential:
    average = Pool[Pool.ADAPTIVEAVG, dims](1)
    return nn.Sequential(average, nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels[-1], classes))


def _conv_head(dims: int, channels: list[int], classes: int, dropout: float) -> nn.Sequential:
    conv, average = Conv[Conv.CONV, dims](channels[-1], 32, kernel_size=3, padding=1), Pool[Pool.ADAPTIVEAVG, dims](1)
    hidden = nn.Sequential(nn.Linear(32, 16), _leak(), nn.Dropout(dropout), nn.Linear(16, classes))
    return nn.Sequential(conv, _leak(), average, nn.Flatten(), *hidden)


def _stages_head(dims: int, channels: list[int], classes: int, dropout: float) -> nn.Sequential:
    statistics = 2 * sum(channels)
    return nn.Sequential(_Standardise(statistics, affine=False), nn.Dropout(dropout), nn.Linear(statistics, classes))


class _Standardise(nn.BatchNorm1d):
    """Batch norm that takes a batch of one, the rest of an epoch, with its running statistics, in their precision."""

    running_mean: Tensor

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(self.running_mean.dtype)
        if len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)


def _statistics(maps: list[Tensor]) -> Tensor:
    """Mean and standard deviation of each channel of each map, ``[B, 2 (C_1 + C_2 + ...)]`` float32."""
    numbers = []
    for voxels in (each.flatten(2).float() for each in maps):
        spread = voxels.var(2, unbiased=False) + 1e-5  # a single voxel has none, and the root no slope there
        numbers += [voxels.mean(2), spread.sqrt()]
    return torch.cat(numbers, dim=1)


def _leak() -> nn.Module:
    return nn.LeakyReLU(0.1)  # 16 plain ReLUs died at learning rates of 1e-3, all of them


HEADS: dict[str, Callable[[int, list[int], int, float], nn.Sequential]] = {
    "linear": _linear_head,
    "conv": _conv_head,
    "stages": _stages_head,
}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "encoder": EncoderClassifier,
    "vgg16": VGG16,
    "densenet121": DenseNet121,
}
