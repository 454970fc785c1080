# SPDX-License-Identifier: Apache-2.0
"""Memory of what was tried and what it earned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["EpisodeReplay"]


class EpisodeReplay:
    """Ring buffer of the last episodes; an episode is a dictionary of tensors of fixed shapes.

    Its memory is taken at the first :meth:`add`, on the device of those tensors: ``capacity`` times what an episode
    holds. It is no module and no part of a checkpoint: after a resume it fills again.

    Args:
        capacity: episodes to keep, at least 1.

    Raises:
        ValueError: for another capacity.

    Example:
        >>> replay = EpisodeReplay(2)
        >>> replay.add({"reward": torch.tensor([1.0, 2.0, 3.0])})
        >>> replay.sample(torch.tensor([0.1, 0.9]))["reward"].tolist()
        [3.0, 2.0]
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 episode, got {capacity}.")
        self.capacity = capacity
        self.stored: dict[str, Tensor] = {}
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, episodes: Mapping[str, Tensor]) -> None:
        """Take in episodes, ``[B, ...]`` each, in the place of the oldest.

        Raises:
            ValueError: when a tensor has another shape than those stored under its name.
        """
        number = len(next(iter(episodes.values())))
        where = torch.arange(self.added, self.added + number)[-self.capacity :] % self.capacity
        for name, tensor in episodes.items():
            stored = self._storage(name, tensor)
            stored[where.to(stored.device)] = tensor[-self.capacity :].to(stored)
        self.added += number

    def sample(self, draws: Tensor) -> dict[str, Tensor]:
        """Take out one episode for each uniform number on [0, 1)."""
        where = (draws * len(self)).long().clamp_max(len(self) - 1)
        return {name: stored[where.to(stored.device)] for name, stored in self.stored.items()}

    def _storage(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.stored:
            self.stored[name] = tensor.new_empty(self.capacity, *tensor.shape[1:])
        if self.stored[name].shape[1:] != tensor.shape[1:]:
            raise ValueError(
                f"replay: expected {name} of shape {tuple(self.stored[name].shape[1:])} like those stored, "
                f"got {tuple(tensor.shape[1:])}; crop all images to one size, or set replay=0."
            )
        return self.stored[name]
