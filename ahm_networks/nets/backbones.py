# SPDX-License-Identifier: Apache-2.0
"""MONAI's encoder-decoders and a U-Net of our own by name, with the defaults that every bundle shares."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from ahm_networks.nets.context_unet import ContextUNet
from ahm_transforms.masking.functional import patch_shape

__all__ = ["BACKBONES", "backbone_network", "build_backbone"]

Defaults = Callable[[int, dict[str, Any]], tuple[Sequence[int], dict[str, Any]]]
UNET_ARGS: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2}
DYNUNET_ARGS: dict[str, Any] = {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "res_block": True}
CONTEXT_ARGS: dict[str, Any] = {"features": (16, 32, 64, 64, 128, 128)}
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PADDING = ("basicunet", "contextunet")  # takes images of any size
GIVEN = ("spatial_dims", "in_channels", "out_channels")


def backbone_network(
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    crop_size: int | Sequence[int] | None = None,
    **backbone_args: Any,
) -> nn.Module:
    """Build the plain network that a pretrained ``ReconstructionUNet`` of the same name holds.

    Args:
        name: ``unet``, ``basicunet``, ``dynunet``, ``segresnet``, ``swinunetr``, ``unetr`` or ``contextunet``.
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: channels that come out.
        crop_size: of the images that it will see, to be checked; ``unetr`` takes it for ``img_size`` where that is not
            given. ``None`` checks nothing.
        **backbone_args: overrides for the network's own arguments; the same as in pretraining.

    Raises:
        ValueError: for an unknown name or argument, an ``img_size`` that is missing or does not fit, or a
            ``crop_size`` that the strides do not divide or of which they leave one voxel to instance norms.

    Example:
        >>> import torch
        >>> network = backbone_network("unet", 2, 1, 3, channels=(8, 16), strides=(2,))
        >>> network(torch.rand(1, 1, 32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    args = with_img_size(name, backbone_args, crop_size)
    divisor, network = build_backbone(name, spatial_dims, in_channels, out_channels, args)
    if crop_size is not None:
        _check_crop(name, network, patch_shape(crop_size, spatial_dims, "crop_size"), divisor)
    return network


def with_img_size(name: str, args: Mapping[str, Any] | None, image_size: int | Sequence[int] | None) -> dict[str, Any]:
    """The backbone's arguments; those of a ``unetr`` with ``image_size`` for ``img_size`` where that is not given."""
    sized = {"img_size": image_size} if name == "unetr" and image_size is not None else {}
    return sized | dict(args or {})


def _check_crop(name: str, network: nn.Module, crop_size: Sequence[int], divisor: Sequence[int]) -> None:
    if name not in PADDING and any(size % step for size, step in zip(crop_size, divisor, strict=True)):
        raise ValueError(f"crop_size: {name} needs multiples of {tuple(divisor)}, got {tuple(crop_size)}.")
    normalises = any(isinstance(module, INSTANCE_NORMS) for module in network.modules())
    if name != "unetr" and normalises and all(size < 2 * step for size, step in zip(crop_size, divisor, strict=True)):
        raise ValueError(
            f"crop_size: {name} leaves one voxel of crops of {tuple(crop_size)}, which its instance norms cannot "
            f"normalise; expected {tuple(2 * step for step in divisor)} or more along one axis, or other norms or "
            "strides in backbone_args."
        )


def build_backbone(
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    args: Mapping[str, Any],
    argument: str = "backbone_args",
) -> tuple[tuple[int, ...], nn.Module]:
    """Return the sizes that the image's axes must be multiples of, and the network.

    ``argument`` is what errors call ``args``.

    Raises:
        ValueError: as :func:`backbone_network`.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}.")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}.")
    network, with_defaults = BACKBONES[name]
    _check_names(name, network, args, argument)
    divisor, complete = with_defaults(spatial_dims, dict(args))
    built = network(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **complete)
    return tuple(divisor), built


def _check_names(name: str, network: type[nn.Module], args: Mapping[str, Any], argument: str) -> None:
    known = [parameter for parameter in inspect.signature(network).parameters if parameter not in GIVEN]
    unknown = [parameter for parameter in args if parameter not in known]
    if unknown:
        raise ValueError(f"{argument}: {name} does not take {', '.join(unknown)}; it takes {', '.join(known)}.")


def _unet(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    args = UNET_ARGS | args
    args["strides"] = args["strides"][: max(len(args["channels"]) - 1, 0)]  # UNet makes no use of the others
    return _stride_product(args["strides"], dims), args


def _basic_unet(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    return [16] * dims, args


def _dynunet(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    args = DYNUNET_ARGS | args
    args.setdefault("upsample_kernel_size", args["strides"][1:])
    return _stride_product(args["strides"], dims), args


def _segresnet(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    args = {"init_filters": 16} | args
    depth = len(args.get("blocks_down", (1, 2, 2, 4)))
    return [2 ** (depth - 1)] * dims, args


def _swin_unetr(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    return [32] * dims, {"feature_size": 24} | args


def _unetr(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    if "img_size" not in args:
        raise ValueError("backbone_args: unetr needs img_size, the size of the crops it is trained on.")
    size = args["img_size"]
    divisor = [size] * dims if isinstance(size, int) else size
    if len(divisor) != dims or any(side <= 0 or side % 16 for side in divisor):
        raise ValueError(f"backbone_args: expected an img_size of {dims} multiples of 16, got {size}.")
    return divisor, args


def _context_unet(dims: int, args: dict[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    args = CONTEXT_ARGS | args
    return [2 ** (len(args["features"]) - 1)] * dims, args


def _stride_product(strides: Sequence[int | Sequence[int]], dims: int) -> list[int]:
    steps = [[stride] * dims if isinstance(stride, int) else stride for stride in strides]
    return [math.prod(axis) for axis in zip(*steps, strict=True)]


BACKBONES: dict[str, tuple[type[nn.Module], Defaults]] = {
    "unet": (UNet, _unet),
    "basicunet": (BasicUNet, _basic_unet),
    "dynunet": (DynUNet, _dynunet),
    "segresnet": (SegResNet, _segresnet),
    "swinunetr": (SwinUNETR, _swin_unetr),
    "unetr": (UNETR, _unetr),
    "contextunet": (ContextUNet, _context_unet),
}
