# SPDX-License-Identifier: Apache-2.0
"""Numbers of all processes of a distributed training together; in a single process everything is as it was.

Gradients are averaged over processes. With the weights of this module the average is the gradient of the whole batch,
however its images are divided among them. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "mean_over_processes", "number_of_processes", "share_of_batch"]


def number_of_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Tensor) -> Tensor:
    """Stack the tensors of all processes, of one shape ``[...]`` everywhere: ``[processes, ...]``, without gradient."""
    if number_of_processes() == 1:
        return value.detach().unsqueeze(0)
    parts = [torch.empty_like(value) for _ in range(number_of_processes())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.stack(parts)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient."""
    return gather(value).mean(0)


def share_of_batch(where: Tensor) -> Tensor | float:
    """What a process's own mean has to be multiplied with: what it has of ``where``, over the mean of all processes.

    The mean over processes of these means is then the mean over the whole batch: one that hides a few voxels does not
    weigh as much as one that hides many. All processes have to call it.

    Args:
        where: bool, what the own mean went over, or float, the weights it was taken with; any shape.

    Returns:
        1 in a single process; 0 where no process has any.
    """
    if number_of_processes() == 1:
        return 1.0
    counts = gather(where.sum().float())
    own: Tensor = where.sum().float() / counts.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return own
