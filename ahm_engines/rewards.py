# SPDX-License-Identifier: Apache-2.0
"""What a masker is rewarded for: voxel maps made of the reconstruction's error, never with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ErrorReward", "ProgressReward"]

Again = Callable[[], Tensor]


class ErrorReward:
    """The error itself, with guards against what can never be rebuilt.

    Args:
        clip: errors above ``clip`` times the image's mean hidden error count as that much, so that speckle, metal and
            text overlays do not draw every mask; ``None`` leaves them.
        energy: weight of the squared prediction, AHM's bonus for bright over empty regions (0.5 in its release).

    Example:
        >>> error = torch.tensor([[[[1.0, 9.0]]]])
        >>> mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        >>> ErrorReward(clip=1.0)(error, error, mask).flatten().tolist()
        [1.0, 5.0]
    """

    def __init__(self, *, clip: float | None = None, energy: float = 0.0) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {clip!r}.")
        self.clip = clip
        self.energy = energy

    @torch.no_grad()
    def __call__(self, error: Tensor, pred: Tensor, mask: Tensor, again: Again | None = None) -> Tensor:
        """Reward of each voxel.

        Args:
            error: ``[B, 1, *S]``.
            pred: ``[B, C, *S]``.
            mask: ``[B, 1, *S]`` bool.
            again: not used.

        Returns:
            ``[B, 1, *S]`` without gradient; only hidden voxels mean anything.
        """
        reward = error.detach()
        if self.clip is not None:
            axes = tuple(range(1, mask.ndim))
            mean = torch.where(mask, reward, 0.0).sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp_min(1)
            reward = torch.minimum(reward, self.clip * mean)
        if self.energy:
            reward = reward + self.energy * pred.detach().float().square().mean(1, keepdim=True)
        return reward


class ProgressReward:
    """How much the error fell by the network's own step: masks from which it learns, rather than hard ones.

    Noise that nothing can rebuild stays as hard as it was, and earns nothing (methods: learning progress). The price is
    one more forward pass without gradient, and a noisier reward, often negative.

    Raises:
        ValueError: on calling, for a mask that the network has not just learned from: a masker with ``num_samples``
            above 1 has such.

    Example:
        >>> before, after = torch.tensor([[[[1.0, 9.0]]]]), torch.tensor([[[[0.5, 9.0]]]])
        >>> mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        >>> ProgressReward()(before, before, mask, lambda: after).flatten().tolist()
        [0.5, 0.0]
    """

    @torch.no_grad()
    def __call__(self, error: Tensor, pred: Tensor, mask: Tensor, again: Again | None = None) -> Tensor:
        """Reward of each voxel.

        Args:
            error: ``[B, 1, *S]``, of before the step.
            pred: not used.
            mask: not used.
            again: gives the error of the same image under the same mask after the step.

        Returns:
            ``[B, 1, *S]`` without gradient; only hidden voxels mean anything.
        """
        if again is None:
            raise ValueError(
                "reward: learning progress needs a mask that the network has just learned from; take num_samples=1, "
                "and train network and masker at the same time."
            )
        return error.detach() - again().detach()
