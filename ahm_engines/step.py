# SPDX-License-Identifier: Apache-2.0
"""Small parts that the engines share: moving a batch, precision, updates, processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from monai.data import MetaTensor
from torch import Tensor, nn

from ahm_networks.maskers import Masker
from ahm_networks.processes import number_of_processes

__all__ = ["Precision", "average_gradients", "broadcast_weights", "check_fit", "prepare_image", "weights_of"]


def prepare_image(batch: Any, device: torch.device, non_blocking: bool) -> Tensor:
    """Take the image of a batch to the device, as a plain tensor ``[B, C, *S]``.

    Raises:
        TypeError: when the batch is neither a tensor nor a dictionary with ``image``.
    """
    image = batch.get("image") if isinstance(batch, Mapping) else batch
    if not isinstance(image, Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch: expected a tensor or a dictionary with 'image', got {found}.")
    if isinstance(image, MetaTensor):
        image = image.as_tensor()
    return image.to(device, non_blocking=non_blocking)


class Precision:
    """Autocast and the gradient scaler that goes with it.

    Args:
        device: where the network runs.
        amp: whether to autocast.
        amp_kwargs: for ``torch.autocast``; ``dtype`` is float16 on CUDA and bfloat16 on CPU unless given.
    """

    def __init__(self, device: torch.device, amp: bool, amp_kwargs: Mapping[str, Any] | None = None) -> None:
        self.device_type = device.type
        self.amp = amp
        self.amp_kwargs = dict(amp_kwargs or {})
        default = torch.float16 if device.type == "cuda" else torch.bfloat16
        half = self.amp_kwargs.setdefault("dtype", default) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp and half)

    def autocast(self) -> torch.autocast:
        """Context for the forward pass of the network."""
        return torch.autocast(self.device_type, enabled=self.amp, **self.amp_kwargs)

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Backward, clip, step; the gradients are cleared before."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights_of(optimizer), max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all that an optimizer changes."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def check_fit(network: nn.Module, masker: Masker) -> None:
    """See that a cell of the masker consists of whole tokens of the network, where that has tokens.

    Raises:
        ValueError: when it does not: tokens hidden in part are hidden altogether, and hardly anything would be left.
    """
    inner = getattr(network, "module", network)
    token = getattr(inner, "token_size", (1,) * masker.spatial_dims)
    if any(cell % side for cell, side in zip(masker.patch_size, token, strict=True)):
        raise ValueError(
            f"patch_size: expected multiples of the network's tokens of {tuple(token)} voxels, got "
            f"{masker.patch_size} for the masker; set the patch_size of one to fit the other."
        )


def broadcast_weights(module: nn.Module) -> None:
    """Give every process the weights of the first."""
    if number_of_processes() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, in one message; nothing to do in a single one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if number_of_processes() > 1 and gradients:
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        parts = (message / number_of_processes()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
