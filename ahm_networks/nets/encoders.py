# SPDX-License-Identifier: Apache-2.0
"""The encoders inside MONAI's encoder-decoders: their stages, their feature maps, and how to keep nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

from ahm_networks.nets.context_unet import ContextLevel, ContextUNet

__all__ = [
    "drop_decoder",
    "encoder_channels",
    "encoder_features",
    "encoder_network",
    "encoder_root",
    "encoder_stages",
    "image_readers",
]

Stages = list[list[nn.Module]]
WRAPPERS = ("module", "_orig_mod", "backbone", "encoder")


def encoder_network(network: nn.Module) -> nn.Module:
    """Find the MONAI network in its wrappers (``ReconstructionUNet``, a classifier, distributed, compiled).

    Raises:
        TypeError: when there is none of the supported ones.
    """
    inner: Any = network
    while isinstance(inner, nn.Module):
        if type(inner) in ENCODERS:
            return inner
        inner = next((getattr(inner, name) for name in WRAPPERS if hasattr(inner, name)), None)
    supported = ", ".join(kind.__name__ for kind in ENCODERS)
    raise TypeError(f"network: expected one of {supported}, or a wrapper of one, got {type(network).__name__}.")


def encoder_stages(network: nn.Module) -> Stages:
    """List the encoder's modules stage by stage, from the input to the bottleneck.

    Inside a stage they stand in the order in which they are called. The encoder of UNETR is its ViT, that of SwinUNETR
    its Swin transformer; the convolutions that lead from them to the decoder belong to the decoder.

    Args:
        network: MONAI's UNet, BasicUNet, DynUNet, SegResNet, UNETR or SwinUNETR, a ContextUNet, or a wrapper of one.

    Raises:
        TypeError: for another network.

    Example:
        >>> len(encoder_stages(UNet(2, 1, 1, channels=(8, 16, 32), strides=(2, 2))))
        3
    """
    inner = encoder_network(network)
    return ENCODERS[type(inner)](inner)[0]


def image_readers(network: nn.Module) -> list[nn.Module]:
    """List the modules that may read the image itself: the encoder's first stage, and the first skip of transformers.

    Raises:
        TypeError: as :func:`encoder_stages`.
    """
    skip = getattr(encoder_network(network), "encoder1", None)
    return [*encoder_stages(network)[0], *([] if skip is None else [skip])]


def encoder_root(network: nn.Module) -> nn.Module:
    """Find the module under which all of the encoder lies: the ViT, the Swin transformer, or the whole MONAI network.

    Raises:
        TypeError: as :func:`encoder_stages`.
    """
    inner = encoder_network(network)
    if isinstance(inner, UNETR):
        return inner.vit
    return inner.swinViT if isinstance(inner, SwinUNETR) else inner


def encoder_channels(network: nn.Module) -> list[int]:
    """Count the channels of each of :func:`encoder_features`'s maps.

    Raises:
        TypeError: as :func:`encoder_stages`.

    Example:
        >>> encoder_channels(UNet(2, 1, 1, channels=(8, 16, 32), strides=(2, 2)))
        [8, 16, 32]
    """
    inner = encoder_network(network)
    return ENCODERS[type(inner)](inner)[1]


def encoder_features(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Run the encoder alone.

    Args:
        network: as for :func:`encoder_stages`.
        image: ``[B, C, *S]``, of a size that the network takes.

    Returns:
        One map ``[B, C_i, *S_i]`` per stage, the finest first and the bottleneck last; the tokens of UNETR lie on
        their grid, so that its maps are all of one size.

    Raises:
        TypeError: as :func:`encoder_stages`.
        ValueError: when UNETR was built for another image size.

    Example:
        >>> import torch
        >>> network = UNet(2, 1, 1, channels=(8, 16), strides=(2,))
        >>> [tuple(features.shape) for features in encoder_features(network, torch.rand(1, 1, 32, 32))]
        [(1, 8, 16, 16), (1, 16, 16, 16)]
    """
    inner = encoder_network(network)
    if isinstance(inner, SwinUNETR):
        return list(inner.swinViT(image, inner.normalize))
    if isinstance(inner, UNETR):
        _check_size(inner, image)
    features = []
    for stage in encoder_stages(inner):
        for module in stage:
            image = module(image)
        features.append(image)
    return [inner.proj_feat(tokens) for tokens in features] if isinstance(inner, UNETR) else features


def _check_size(network: Any, image: Tensor) -> None:
    expected = [side * patch for side, patch in zip(network.feat_size, network.patch_size, strict=True)]
    if list(image.shape[2:]) != expected:
        raise ValueError(f"image: this UNETR was built for img_size={expected}, got {list(image.shape[2:])}.")


def drop_decoder(network: nn.Module) -> nn.Module:
    """Replace, in place, all that has weights and is not encoder by ``nn.Identity``; the encoder keeps its state keys.

    Only :func:`encoder_features` can run the network from then on.

    Returns:
        The same network.

    Raises:
        TypeError: as :func:`encoder_stages`.
    """
    inner = encoder_network(network)
    _keep(inner, {module for stage in encoder_stages(inner) for module in stage})
    return network


def _keep(parent: nn.Module, kept: set[nn.Module]) -> None:
    for name, child in parent.named_children():
        if child in kept or not child.state_dict():
            continue
        if kept.isdisjoint(child.modules()):
            setattr(parent, name, nn.Identity())
        else:
            _keep(child, kept)


def _unet(network: Any) -> tuple[Stages, list[int]]:
    stages, block = [], network.model
    while isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection):
        stages.append([block[0]])
        block = block[1].submodule
    return [*stages, [block]], [*network.channels]


def _basic_unet(network: Any) -> tuple[Stages, list[int]]:
    downs = [network.down_1, network.down_2, network.down_3, network.down_4]
    convolutions = [network.conv_0, *(down.convs for down in downs)]
    channels = [double.conv_1.conv.out_channels for double in convolutions]
    return [[network.conv_0], *([down] for down in downs)], channels


def _context_unet(network: Any) -> tuple[Stages, list[int]]:
    stages, block = [], network.body
    while isinstance(block, ContextLevel):
        stages.append([block.block])
        block = block.below
    return [*stages, [block]], [*network.features]


def _dynunet(network: Any) -> tuple[Stages, list[int]]:
    blocks = [network.input_block, *network.downsamples, network.bottleneck]
    return [[block] for block in blocks], [*network.filters]


def _segresnet(network: Any) -> tuple[Stages, list[int]]:
    first = [network.convInit] if network.dropout_prob is None else [network.convInit, network.dropout]
    downs = list(network.down_layers)
    channels = [network.init_filters * 2**stage for stage in range(len(downs))]
    return [[*first, downs[0]], *[[down] for down in downs[1:]]], channels


def _unetr(network: Any) -> tuple[Stages, list[int]]:
    vit = network.vit
    blocks = list(vit.blocks)
    stages = [[vit.patch_embedding], *[[block] for block in blocks[:-1]], [blocks[-1], vit.norm]]
    return stages, [network.hidden_size] * len(stages)


def _swin_unetr(network: Any) -> tuple[Stages, list[int]]:
    swin = network.swinViT
    stages = [[swin.patch_embed, swin.pos_drop]]
    for name in ("layers1", "layers2", "layers3", "layers4"):
        convolutions = getattr(swin, f"{name}c", [])  # of version 2 only
        stages.append([*convolutions, *getattr(swin, name)])
    return stages, [swin.embed_dim * 2**stage for stage in range(len(stages))]


ENCODERS: dict[type[nn.Module], Callable[[Any], tuple[Stages, list[int]]]] = {
    UNet: _unet,
    BasicUNet: _basic_unet,
    ContextUNet: _context_unet,
    DynUNet: _dynunet,
    SegResNet: _segresnet,
    UNETR: _unetr,
    SwinUNETR: _swin_unetr,
}
