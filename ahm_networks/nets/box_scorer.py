# SPDX-License-Identifier: Apache-2.0
"""A network that looks at an image once, and scores every box of cells at every step of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from ahm_networks.nets.policy import pad_to_cells

__all__ = ["BoxScorer", "BoxState", "box_sums"]


class BoxState(NamedTuple):
    """What an agent knows besides the image, before each of ``T`` steps.

    Attributes:
        hidden: ``[B, T, N]`` bool, cells that are hidden already.
        numbers: ``[B, T, 2]``, the step as a share of all steps, and what is left of the budget as a share of the grid.
        error: ``[B, T, N]`` error of a reconstruction under ``hidden``; ``None`` where nobody rebuilds in between.
    """

    hidden: Tensor
    numbers: Tensor
    error: Tensor | None = None

    def steps(self, first: int) -> BoxState:
        """The states from step ``first`` on."""
        error = None if self.error is None else self.error[:, first:]
        return BoxState(self.hidden[:, first:], self.numbers[:, first:], error)


def box_sums(maps: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Sum each map over boxes of its own size, at the first cell of each box.

    Args:
        maps: ``[B, S, *G]`` float32, one map for each size; ``[B, 1, *G]`` serves all of them.
        sizes: ``S`` box sizes in cells.

    Returns:
        ``[B, S, *G]``; 0 where a box does not lie in the grid.

    Example:
        >>> box_sums(torch.tensor([[[[1.0, 2.0, 4.0]]]]), [(1, 1), (1, 2)])[0].tolist()
        [[[1.0, 2.0, 4.0]], [[3.0, 6.0, 0.0]]]
    """
    maps = maps.expand(-1, len(sizes), *maps.shape[2:])
    return torch.cat([_sums_of_one_size(m, size) for m, size in zip(maps.split(1, dim=1), sizes, strict=True)], dim=1)


class BoxScorer(nn.Module):
    """Feature network, and a head that gives each box the mean of what its cells are worth.

    The worth of a cell depends on its surroundings and on the state, one map for each size. So the head sees exactly
    the cells that a box covers, whatever its size. The image passes once, also through the first layer of the head:
    only what depends on the state is computed at every step.

    Args:
        spatial_dims: 2 or 3.
        features: maps an image to ``[B, out_channels, *G]`` and has the attribute ``out_channels``.
        patch_size: voxels per cell; images are padded at the end to whole cells by repeating the border.
        sizes: box sizes in cells, one number per axis.
        steps: of an episode; with a single one there is no state to look at.
        with_error: whether states bring error maps.
        with_value: whether to score the state as a whole, too.
        with_cells: whether to predict single cells from the image, too.
        stop: whether there is one more action, after the boxes.
        width: hidden channels of the head.
    """

    cells: Tensor

    def __init__(
        self,
        spatial_dims: int,
        features: nn.Module,
        patch_size: Sequence[int],
        sizes: Sequence[Sequence[int]],
        *,
        steps: int,
        with_error: bool = False,
        with_value: bool = True,
        with_cells: bool = False,
        stop: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.patch_size = tuple(patch_size)
        self.sizes = tuple(tuple(size) for size in sizes)
        self.features = features
        self.from_image = conv(int(features.out_channels), width, 3, padding=1)  # type: ignore[arg-type]
        self.from_maps = conv(1 + with_error, width, 3, padding=1, bias=False) if steps > 1 else None
        self.from_numbers = nn.Linear(2, width, bias=False) if steps > 1 else None
        self.boxes = _small(conv(width, len(self.sizes), 1))
        cells = torch.tensor([float(torch.Size(size).numel()) for size in self.sizes])
        self.register_buffer("cells", cells.view(-1, *[1] * spatial_dims), persistent=False)
        self.single = _small(conv(width, 1, 1)) if with_cells else None
        self.value = _small(nn.Linear(width, 1)) if with_value else None
        self.stop = _small(nn.Linear(width, 1)) if stop else None

    def look(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to what the head needs to know of it, ``[B, width, *G]`` float32, autocast or not."""
        with torch.autocast(image.device.type, enabled=False):
            return cast(Tensor, self.from_image(self.features(pad_to_cells(image.float(), self.patch_size))))

    def single_cells(self, looked: Tensor) -> Tensor | None:
        """One number for each cell of the image, ``[B, N]``, if there is such a prediction."""
        with torch.autocast(looked.device.type, enabled=False):
            return None if self.single is None else self.single(looked.relu()).flatten(1)

    def forward(self, looked: Tensor, state: BoxState) -> tuple[Tensor, Tensor | None]:
        """Score all actions and the state, at each of ``T`` steps.

        Args:
            looked: of :meth:`look`.
            state: of the ``T`` steps.

        Returns:
            ``[B, T, A]``, sizes before cells, then the stop action; and ``[B, T]`` if there is a value.
        """
        with torch.autocast(looked.device.type, enabled=False):
            hidden = self._with_state(looked, state).relu()
            mean = hidden.flatten(3).mean(3)
            means = box_sums(self.boxes(hidden.flatten(0, 1)), self.sizes) / self.cells
            scores = means.flatten(1).unflatten(0, hidden.shape[:2])
            if self.stop is not None:
                scores = torch.cat([scores, self.stop(mean)], dim=2)
            return scores, None if self.value is None else self.value(mean).squeeze(2)

    def _with_state(self, looked: Tensor, state: BoxState) -> Tensor:
        """Add what depends on the state, ``[B, T, width, *G]``."""
        images, grid = looked.unsqueeze(1), looked.shape[2:]
        if self.from_maps is None or self.from_numbers is None:
            return images
        maps = [state.hidden.float()] if state.error is None else [state.hidden.float(), state.error]
        stacked = torch.stack(maps, dim=2).flatten(0, 1).unflatten(2, grid)
        from_maps = self.from_maps(stacked).unflatten(0, state.hidden.shape[:2])
        return images + from_maps + self.from_numbers(state.numbers)[(...,) + (None,) * len(grid)]


def _sums_of_one_size(cells: Tensor, size: Sequence[int]) -> Tensor:
    grid = cells.shape[2:]
    if any(s > g for s, g in zip(size, grid, strict=True)):
        return torch.zeros_like(cells)
    if set(size) == {1}:
        return cells
    pool = F.avg_pool2d if len(grid) == 2 else F.avg_pool3d
    sums = pool(cells, tuple(size), stride=1, divisor_override=1)
    return F.pad(sums, [n for s in reversed(size) for n in (0, s - 1)])


def _small(layer: nn.Module) -> nn.Module:
    """Start with almost equal actions: the first policy is nearly uniform."""
    with torch.no_grad():
        cast(Tensor, layer.weight).normal_(std=0.01)
        cast(Tensor, layer.bias).zero_()
    return layer
