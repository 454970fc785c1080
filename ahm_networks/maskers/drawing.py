# SPDX-License-Identifier: Apache-2.0
"""Draw cells from logits, without replacement and in order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ahm_networks.rl.functional import gumbel_top_k

__all__ = ["Draw", "draw_in_order"]


class Draw(NamedTuple):
    """An ordered draw of cells.

    Attributes:
        cells: ``[B, N]`` bool, the drawn cells.
        order: ``[B, K]`` cell numbers, first draw first.
        drawn: ``[B, K]`` bool, which places of ``order`` count: images with fewer allowed cells draw fewer.
    """

    cells: Tensor
    order: Tensor
    drawn: Tensor


def draw_in_order(logits: Tensor, noise: Tensor, count: int | Tensor, most: int) -> Draw:
    """Draw ``count`` cells of each image by perturbed logits.

    Args:
        logits: ``[B, N]``, ``-inf`` where a cell may not be drawn.
        noise: ``[B, N]`` Gumbel draws, or zeros for the most probable cells.
        count: one number, or ``[B]``.
        most: upper bound of ``count``, a plain number so that shapes are known without waiting for the device.
    """
    order = gumbel_top_k(logits, noise, most)
    limit = count.unsqueeze(1) if isinstance(count, Tensor) else count
    drawn = (torch.arange(most, device=logits.device) < limit).expand_as(order)
    cells = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, drawn)
    return Draw(cells, order, drawn)
