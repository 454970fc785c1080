# SPDX-License-Identifier: Apache-2.0
"""The actions of a masker that hides boxes: a size and a place, in whole cells."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import Tensor

from ahm_networks.nets.box_scorer import box_sums
from ahm_transforms.masking.functional import boxes_to_mask

__all__ = ["BoxActions", "box_actions", "box_sizes"]


class BoxActions(NamedTuple):
    """All boxes on a grid; box number ``a`` has size ``a // N`` and its first cell at ``a % N``.

    Boxes that would reach beyond the grid keep their number, but are never valid: nothing is shrunk or shifted.

    Number ``S * N`` is no box: it hides nothing.

    Attributes:
        grid: ``G``, with ``N`` cells.
        sizes: ``S`` box sizes in cells.
        first: ``[S * N + 1, D]`` first cell of each box.
        size: ``[S * N + 1, D]`` its size.
    """

    grid: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    first: Tensor
    size: Tensor

    @property
    def number(self) -> int:
        """Boxes of all sizes, ``S * N``."""
        return len(self.first) - 1

    def valid(self, free: Tensor, left: Tensor) -> Tensor:
        """Boxes that lie in the grid, and hide at least one of the free cells but not more of them than are left.

        Args:
            free: ``[B, N]`` bool, cells that may still be hidden.
            left: ``[B]`` number of cells.

        Returns:
            ``[B, S * N]`` bool.
        """
        new = box_sums(free.float().unflatten(1, (1, *self.grid)), self.sizes).flatten(1)
        return (new > 0) & (new <= left.unsqueeze(1))

    def cells(self, boxes: Tensor) -> Tensor:
        """Cells of one box per image: ``[B]`` box numbers to ``[B, N]`` bool."""
        return boxes_to_mask(self.first[boxes].unsqueeze(1), self.size[boxes].unsqueeze(1), self.grid).flatten(1)

    def policy_map(self, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        """How much each cell is wanted, ``[B, N]``; where the budget admits no box, as if there were no budget.

        Args:
            scores: ``[B, A]`` of the first step; a stop action does not matter.
            valid: ``[B, A]`` bool.
            allowed: ``[B, N]`` bool.
        """
        scores, valid = scores[:, : self.number], valid[:, : self.number]
        eligible = torch.where(valid.any(1, keepdim=True), valid, self.valid(allowed, allowed.sum(1)))
        return self.cell_map(scores, eligible, allowed)

    def cell_map(self, scores: Tensor, eligible: Tensor, allowed: Tensor) -> Tensor:
        """Best score of any eligible box that covers a cell, stretched to [0, 1] over the allowed cells of each image.

        Args:
            scores: ``[B, S * N]``.
            eligible: ``[B, S * N]`` bool, boxes that count.
            allowed: ``[B, N]`` bool.

        Returns:
            ``[B, N]``: 0 where no box counts, one half where all scores are the same.
        """
        maps = scores.masked_fill(~eligible, float("-inf")).unflatten(1, (len(self.sizes), *self.grid)).split(1, dim=1)
        spread = [_best_of_one_size(m, size) for m, size in zip(maps, self.sizes, strict=True)]
        best = torch.cat(spread, dim=1).amax(1).flatten(1)
        known = torch.isfinite(best) & allowed
        low = best.masked_fill(~known, float("inf")).amin(1, keepdim=True)
        high = best.masked_fill(~known, float("-inf")).amax(1, keepdim=True)
        stretched = torch.where(high > low, (best - low) / (high - low), 0.5)
        return torch.where(known, stretched, 0.0)


def box_actions(sizes: tuple[tuple[int, ...], ...], grid: tuple[int, ...], device: torch.device) -> BoxActions:
    """List all boxes; the list is kept for the next call, but not that of a program being made: it holds stand-ins.

    Raises:
        ValueError: when no size fits into the grid.
    """
    program = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return (_list_boxes if program else _kept_boxes)(sizes, grid, device)


def box_sizes(sizes: Sequence[int | Sequence[int]], spatial_dims: int) -> tuple[tuple[int, ...], ...]:
    """Spell out box sizes, in cells, for each axis.

    Raises:
        ValueError: when there is none, one is below 1 or not whole, or the number of axes does not fit.
    """
    try:
        given = tuple(ensure_tuple_rep(size, spatial_dims) for size in sizes)
        spelt = tuple(tuple(int(s) for s in size) for size in given)
    except ValueError as error:
        raise ValueError(f"sizes: expected each to be 1 or {spatial_dims} numbers, got {sizes!r}.") from error
    if not spelt or min(min(size) for size in spelt) < 1 or spelt != given:
        raise ValueError(f"sizes: expected boxes of at least 1 cell along each axis, in whole cells, got {sizes!r}.")
    return spelt


def _best_of_one_size(scores: Tensor, size: Sequence[int]) -> Tensor:
    """A box covers a cell when it begins at most ``size - 1`` cells ahead of it."""
    pool = F.max_pool2d if len(size) == 2 else F.max_pool3d
    padded = F.pad(scores, [n for s in reversed(size) for n in (s - 1, 0)], value=float("-inf"))
    return pool(padded, tuple(size), stride=1)


def _list_boxes(sizes: tuple[tuple[int, ...], ...], grid: tuple[int, ...], device: torch.device) -> BoxActions:
    if not any(all(s <= g for s, g in zip(size, grid, strict=True)) for size in sizes):
        raise ValueError(
            f"sizes: expected a box that fits into the grid of {grid} cells, got {sizes}; "
            "take smaller boxes or smaller patches."
        )
    first = torch.cartesian_prod(*[torch.arange(n, device=device) for n in grid]).view(-1, len(grid))
    size = torch.tensor(sizes, device=device).repeat_interleave(len(first), dim=0)
    return BoxActions(grid, sizes, F.pad(first.repeat(len(sizes), 1), (0, 0, 0, 1)), F.pad(size, (0, 0, 0, 1)))


_kept_boxes = functools.lru_cache(maxsize=32)(_list_boxes)
