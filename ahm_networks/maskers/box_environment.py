# SPDX-License-Identifier: Apache-2.0
"""A grid of cells in which an agent places boxes until its budget is spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ahm_networks.maskers.box_actions import BoxActions
from ahm_networks.nets.box_scorer import BoxState

__all__ = ["BoxEnvironment", "Moves"]


class BoxEnvironment:
    """State of one episode per image; rewards come from outside, once it is over.

    Args:
        boxes: the actions.
        free: ``[B, N]`` bool, cells that may be hidden.
        budget: number of cells to hide at most, one for all images or ``[B]``.
        steps: largest number of boxes.
        stop: whether there is a stop action, from the second step on.

    Attributes:
        valid: ``[B, A]`` bool, actions that the present state admits; none of them when the episode is over.
        hidden: ``[B, N]`` bool, cells hidden so far.
    """

    def __init__(
        self, boxes: BoxActions, free: Tensor, budget: int | Tensor, *, steps: int, stop: bool = False
    ) -> None:
        self.boxes = boxes
        self.free = free
        self.left = torch.zeros(len(free), device=free.device) + budget
        self.steps = steps
        self.stop = stop
        self.actions = boxes.number + stop
        self.taken = 0
        self.hidden = torch.zeros_like(free)
        self.stopped = torch.zeros_like(free[:, 0])
        self.valid = self._valid()

    def observe(self, error: Tensor | None = None) -> BoxState:
        """The present state as one step, ``[B, 1, ...]``; ``error`` is ``[B, N]``."""
        numbers = torch.stack([torch.full_like(self.left, self.taken / self.steps), self.left / self.free.shape[1]], 1)
        return BoxState(self.hidden.unsqueeze(1), numbers.unsqueeze(1), None if error is None else error.unsqueeze(1))

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take one valid action per image; what is asked of an episode that is over does nothing.

        Args:
            action: ``[B]`` action numbers.

        Returns:
            ``[B]`` bool, where a step was taken, and ``[B, N]`` bool, the cells that it newly hid.
        """
        live = self.valid.any(1)
        new = self.boxes.cells(action) & self.free & live.unsqueeze(1)
        self.hidden = self.hidden | new
        self.free = self.free & ~new
        self.left = self.left - new.sum(1)
        self.stopped = self.stopped | (action == self.boxes.number)
        self.taken += 1
        self.valid = self._valid()
        return live, new

    def _valid(self) -> Tensor:
        valid = self.boxes.valid(self.free, self.left) & ~self.stopped.unsqueeze(1)
        if not self.stop:
            return valid
        return torch.cat([valid, valid.any(1, keepdim=True) & (self.taken > 0)], dim=1)


class Moves(NamedTuple):
    """The steps of episodes, ``[B, T, ...]`` each: state, actions that it admitted, and what was done."""

    hidden: Tensor
    numbers: Tensor
    error: Tensor | None
    valid: Tensor
    actions: Tensor
    live: Tensor
    new: Tensor

    @classmethod
    def joined(cls, moves: Sequence[Moves]) -> Moves:
        """One after the other."""
        parts: list[Any] = [None if part[0] is None else torch.cat(part, dim=1) for part in zip(*moves, strict=True)]
        return cls(*parts)
