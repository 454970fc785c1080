# SPDX-License-Identifier: Apache-2.0
"""Whether a masker looks at the image: do its masks differ between images, places and epochs?"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor

from ahm_engines.events import MaskedKeys
from ahm_engines.metrics import mask_overlap
from ahm_networks.maskers import Decision
from ahm_networks.processes import number_of_processes

__all__ = ["MaskOverlap"]

Grid = tuple[int, ...]


class MaskOverlap:
    """Add how alike masks are to the metrics of a validation; a number that cannot be known is left out.

    - ``overlap_epochs``: mean intersection over union (IoU) of an image's hidden cells now and at the validation
      before. The evaluator repeats its random numbers, so 1 means that the masker has not changed its mind.
    - ``overlap_images``: mean IoU of the hidden cells of two different images. Near 1, the masker ignores the image.
    - ``overlap_chance``: what ``overlap_images`` would be if each mask were drawn uniformly from its allowed cells,
      with expected intersection and union in the place of random ones.
    - ``position_entropy``: entropy of the places hidden over all images, as a share of the largest, log N. Far below
      1, the masker always hides the same places.

    Attach it to the evaluator ahead of the handlers that log; its loader must keep the order of the images. The images
    of all processes count, those of the first process first.

    Args:
        max_images: images that are compared with each other, the first of a validation.
    """

    def __init__(self, *, max_images: int = 64) -> None:
        if max_images < 2:
            raise ValueError(f"max_images: expected at least 2, got {max_images}.")
        self.max_images = max_images
        self._previous: list[Tensor] = []
        self._cells: list[Tensor] = []
        self._allowed: list[Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self) -> None:
        self._cells, self._allowed = [], []

    def _collect(self, engine: Engine) -> None:
        decision: Decision = engine.state.output[MaskedKeys.DECISION]
        allowed = torch.ones_like(decision.cells) if decision.allowed is None else decision.allowed
        self._cells.append(decision.cells)
        self._allowed.append(allowed)

    def _finish(self, engine: Engine) -> None:
        cells, free = _gathered(self._cells), _gathered(self._allowed)
        groups, shown = _by_grid(cells), _by_grid(cells, self.max_images)
        allowed = _by_grid(free, self.max_images)
        numbers = {
            "overlap_epochs": _epoch_overlap(self._previous, cells),
            "overlap_images": torch.cat([_pair_overlap(cells) for cells in shown.values()]),
            "overlap_chance": torch.cat([_chance_overlap(shown[grid], allowed[grid]) for grid in shown]),
            "position_entropy": torch.cat([_position_entropy(cells) for cells in groups.values()]),
        }
        engine.state.metrics |= {name: float(values.mean()) for name, values in numbers.items() if values.numel()}
        self._previous = cells


def _gathered(batches: list[Tensor]) -> list[Tensor]:
    """Batches of all processes, whatever their sizes."""
    if number_of_processes() == 1:
        return batches
    parts: list[list[Tensor]] = [[] for _ in range(number_of_processes())]
    dist.all_gather_object(parts, [batch.cpu() for batch in batches])
    return [batch for part in parts for batch in part]


def _by_grid(batches: list[Tensor], limit: int | None = None) -> dict[Grid, Tensor]:
    """Gather up to ``limit`` images and stack those with the same grid: ``[M, N]`` float."""
    images = [cells for batch in batches for cells in batch][:limit]
    groups: defaultdict[Grid, list[Tensor]] = defaultdict(list)
    for cells in images:
        groups[tuple(cells.shape)].append(cells.flatten())
    return {grid: torch.stack(group).float() for grid, group in groups.items()}


def _epoch_overlap(before: list[Tensor], now: list[Tensor]) -> Tensor:
    """IoU of each image's mask with its last one, ``[M]``."""
    pairs = [(a, b) for a, b in zip(before, now, strict=False) if a.shape == b.shape]
    return torch.cat([mask_overlap(a, b).float() for a, b in pairs]) if pairs else torch.empty(0)


def _pair_overlap(cells: Tensor) -> Tensor:
    """IoU of all pairs of different images of ``[M, N]``."""
    return _ratio_of_pairs(cells @ cells.T, cells.sum(1))


def _chance_overlap(cells: Tensor, allowed: Tensor) -> Tensor:
    """The same for uniform draws: two images share ``k_i k_j |A_i & A_j| / (|A_i| |A_j|)`` cells on average."""
    share = cells.sum(1) / allowed.sum(1).clamp_min(1)
    return _ratio_of_pairs((allowed @ allowed.T) * share.unsqueeze(1) * share, cells.sum(1))


def _ratio_of_pairs(both: Tensor, count: Tensor) -> Tensor:
    """Intersections ``[M, M]`` and counts ``[M]`` to the IoU of every pair."""
    either = count.unsqueeze(1) + count - both
    first, second = torch.triu_indices(len(both), len(both), offset=1, device=both.device)
    return (both / either.clamp_min(1e-6))[first, second]


def _position_entropy(cells: Tensor) -> Tensor:
    """Entropy of the places hidden in ``[M, N]`` over log N, once per image: ``[M]``."""
    share = cells.sum(0) / cells.sum().clamp_min(1.0)
    entropy = -torch.special.xlogy(share, share).sum() / max(math.log(cells.shape[1]), 1e-6)
    return entropy.expand(cells.shape[0])
