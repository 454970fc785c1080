# SPDX-License-Identifier: Apache-2.0
"""From a pretraining checkpoint into the network of the labelled task: what fits, how it fits, and what does not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ahm_networks.nets.adaptation import Adapter
from ahm_networks.nets.encoders import encoder_network, encoder_stages
from ahm_networks.nets.matching import Target, pair_keys
from ahm_networks.nets.transfer import Transfer

__all__ = [
    "Transfer",
    "freeze_encoder",
    "layerwise_parameters",
    "read_weights",
    "transfer_weights",
    "unfreeze_encoder",
]

ENTRIES = ("model", "state_dict", "model_state_dict")
PARTS = ("encoder", "all")
_FROZEN = "_frozen_encoder"  # kept in the network, so that copies have their own: what was frozen, and by which hooks
logger = logging.getLogger(__name__)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint of ours, in a plain ``state_dict``, or in a dictionary around one.

    Args:
        path: a file of ``torch.save``; the weights may stand under ``model``, ``state_dict`` or ``model_state_dict``.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file, torch raises whatever its bytes lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not a readable file of weights, save a state_dict with torch.save: {reason}"
        ) from error
    weights = _tensors(content)
    if not weights:
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a state_dict, alone or under one of {', '.join(ENTRIES)}; got {found}.")
    return weights


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[name] for name in ENTRIES if isinstance(content.get(name), Mapping)), content)
    return {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}


def transfer_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    part: str = "encoder",
    image_channels: int | None = None,
    source_grid: Sequence[int] | None = None,
) -> Transfer:
    """Copy what fits into a network, in place, so that optimisers that hold its parameters stay valid.

    Prefixes such as ``module.``, ``backbone.`` or ``vit.`` need not agree: those are taken off both sides under which
    most of the encoder's tensors agree, see :func:`~ahm_networks.nets.matching.align_prefixes`. MONAI's
    ``MaskedAutoEncoderViT`` fits UNETR. Kernels that read the image are averaged or inflated to the network's number of
    channels, position embeddings interpolated to its grid; other tensors of another shape stay as initialised.

    Args:
        network: one that :func:`~ahm_networks.nets.encoders.encoder_stages` knows; with ``part="all"`` any other too.
        weights: the source's ``state_dict``.
        part: ``encoder``, or ``all`` that has the same name.
        image_channels: where the source's first layer has one channel more, that is the mask's and is dropped; ``None``
            keeps all.
        source_grid: patches per axis of the source's position embeddings; ``None``: equally many on each axis.

    Raises:
        TypeError: when the encoder of such a network is not known.
        ValueError: when no kernel or matrix fits, or an argument does not; nothing is then changed.

    Example:
        >>> from ahm_networks import ReconstructionUNet
        >>> from ahm_networks.nets import backbone_network
        >>> small = {"channels": (8, 16), "strides": (2,)}
        >>> pretrained = ReconstructionUNet(2, backbone_args=small).state_dict()
        >>> transfer_weights(backbone_network("unet", 2, 1, 3, **small), pretrained).share
        1.0
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}.")
    target = Target.of(network, part)
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        found = list(weights)[:5] if isinstance(weights, Mapping) else type(weights).__name__
        raise ValueError(f"weights: expected a state_dict, as read_weights reads it from a file, got {found}.")
    weights = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    pairs, used = pair_keys(target, weights)
    adapter = Adapter(target, weights, pairs, image_channels, source_grid)
    fitted = {key: adapter.fit(key) for key in pairs}
    values = {key: value for key, (value, _) in fitted.items() if value is not None}
    report = Transfer(
        part=part,
        matched=[key for key in values if not fitted[key][1]],
        adapted={key: ", ".join(fitted[key][1]) for key in values if fitted[key][1]},
        other_shape={
            key: (tuple(weights[source].shape), tuple(target.tensors[key].shape))
            for key, source in pairs.items()
            if key not in values
        },
        missing=[key for key in target.tensors if key not in pairs],
        unused=[key for key in weights if key not in used],
        share=_numbers(values.values()) / _numbers(target.tensors.values()),
    )
    if not any(value.ndim > 1 for value in values.values()):
        raise ValueError(_refusal(report, target, weights))
    _write(target, values)
    filled = _numbers(values[key] for key in target.anchors if key in values)
    if filled < 0.5 * _numbers(target.tensors[key] for key in target.anchors):  # a decoder alone may well be new
        logger.warning("Are these the weights of another architecture? %s", report.summary())
    return report


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _write(target: Target, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            target.tensors[key].copy_(value)


def _refusal(report: Transfer, target: Target, weights: Mapping[str, Tensor]) -> str:
    shapes = [f"{key} {source} instead of {own}" for key, (source, own) in report.other_shape.items()]
    return (
        f"weights: nothing fits the network's part {report.part!r}; nothing was changed. The network has keys like "
        f"{list(target.tensors)[:3]}, the weights {list(weights)[:3]}; {len(shapes)} agree in name but not in "
        f"shape {shapes[:3]}. Build the network with the architecture and arguments of the pretraining."
    )


def layerwise_parameters(
    network: nn.Module, lr: float, *, decay: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the parameters for an optimiser whose learning rate falls towards the input.

    Whatever is not encoder learns with ``lr``, stage ``i`` of ``n`` with ``lr * decay ** (n - i)`` (``i`` from 0 at the
    input), as when finetuning BEiT (Bao et al. 2022). Frozen parameters are included, so that they can be thawed.

    Args:
        network: one that :func:`~ahm_networks.nets.encoders.encoder_stages` knows; with ``decay=1`` any other too.
        lr: learning rate of all that is not encoder.
        decay: factor from one stage to the next towards the input; 1 gives a single group.
        weight_decay: of every group.

    Raises:
        TypeError: when the encoder of such a network is not known.
        ValueError: when ``decay`` is not in (0, 1].

    Example:
        >>> from ahm_networks.nets import backbone_network
        >>> network = backbone_network("unet", 2, 1, 2, channels=(8, 16), strides=(2,))
        >>> [group["lr"] for group in layerwise_parameters(network, 1.0, decay=0.5)]
        [1.0, 0.5, 0.25]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a factor in (0, 1], got {decay}.")
    stages: list[list[nn.Parameter]] = []
    if decay != 1:
        stages = [[p for module in stage for p in module.parameters()] for stage in encoder_stages(network)]
    encoder = {parameter for stage in stages for parameter in stage}
    groups = [[parameter for parameter in network.parameters() if parameter not in encoder], *reversed(stages)]
    return [
        {"params": parameters, "lr": lr * decay**depth, "weight_decay": weight_decay}
        for depth, parameters in enumerate(groups)
        if parameters
    ]


def freeze_encoder(network: nn.Module) -> None:
    """Keep the encoder as it is: no gradients, and evaluation mode even when the network is told to train.

    Batch norms then keep their statistics, and dropout inside the encoder is off. With ``DistributedDataParallel``,
    freeze ahead of wrapping; to thaw later, freeze the wrapped network and wrap with ``find_unused_parameters=True``.
    Thaw ahead of ``torch.jit.script``, which cannot follow what keeps the mode; tracing and ``torch.export`` can.

    Raises:
        TypeError: when the encoder of such a network is not known.
    """
    inner = encoder_network(network)
    if _FROZEN in vars(inner):
        return
    modules = [module for stage in encoder_stages(inner) for module in stage]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None  # a leftover gradient would keep momentum going
    hooks = [module.register_forward_pre_hook(_stay_in_eval) for module in modules]
    vars(inner)[_FROZEN] = parameters, hooks


def unfreeze_encoder(network: nn.Module) -> None:
    """Undo :func:`freeze_encoder`, and only that: what was frozen before stays frozen. Works on copies, too.

    Raises:
        TypeError: when the encoder of such a network is not known.
    """
    inner = encoder_network(network)
    parameters, hooks = vars(inner).pop(_FROZEN, ([], []))
    for parameter in parameters:
        parameter.requires_grad_(True)
    for hook in hooks:
        hook.remove()
    if hooks:
        for module in (module for stage in encoder_stages(inner) for module in stage):
            module.train(inner.training)


def _stay_in_eval(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.eval()
