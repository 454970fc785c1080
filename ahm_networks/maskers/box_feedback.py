# SPDX-License-Identifier: Apache-2.0
"""What comes back to an agent that hides boxes: the reward of each box and, if asked for, the error so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ahm_networks.maskers.borrowed import BorrowedNetwork
from ahm_networks.processes import share_of_batch
from ahm_networks.rl.functional import EPS, masked_mean
from ahm_networks.rl.running import RunningMoments
from ahm_transforms.masking.functional import cells_to_image, image_to_cells

__all__ = ["BoxReward", "ErrorSoFar"]


class BoxReward(nn.Module):
    r"""How much harder the newly hidden cells of each box are than an average hidden cell.

    .. math:: r_t = \frac{1}{n_{max}} \sum_{i \in b_t} \frac{e_i - \lambda \mu}{\sigma}

    Sums, because of what sizes do to the alternatives: with sums and no penalty the largest box always wins, with means
    the smallest spot of texture. With a penalty of 1 a cell adds to a box only what it has above the average.

    Args:
        area_penalty: :math:`\lambda`.
        largest: cells :math:`n_{max}` of the largest box.
    """

    def __init__(self, area_penalty: float, largest: int) -> None:
        super().__init__()
        self.area_penalty = area_penalty
        self.largest = largest
        self.moments = RunningMoments()

    @torch.no_grad()
    def forward(self, error: Tensor, hidden: Tensor, box_cells: Tensor) -> Tensor:
        """Reward of each step, ``[B, T]``; the running moments take in this batch first.

        Args:
            error: ``[B, N]``, reward of each cell.
            hidden: ``[B, N]`` bool, all hidden cells, whoever chose them.
            box_cells: ``[B, T, N]`` bool, cells that each step newly hid.
        """
        self.moments.update(error, hidden)
        gain = (error - self.area_penalty * self.moments.mean) / self.moments.std
        return torch.where(box_cells, gain.unsqueeze(1), 0.0).sum(2) / self.largest

    def cell_loss(self, predicted: Tensor, error: Tensor, hidden: Tensor) -> Tensor:
        """Squared error of the predicted standardised errors of all hidden cells, ``[B, N]`` each."""
        target = torch.where(hidden, (error - self.moments.mean) / self.moments.std, 0.0)
        return masked_mean((predicted - target).square().flatten(), hidden.flatten()) * share_of_batch(hidden)


class ErrorSoFar(nn.Module):
    """Error of a reconstruction under what an episode has hidden so far, over its running mean.

    Args:
        network: ``network(image, mask) -> image``; borrowed, so that its weights do not become the masker's.
        patch_size: voxels per cell.
    """

    def __init__(self, network: nn.Module | BorrowedNetwork, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.network = BorrowedNetwork(network) if isinstance(network, nn.Module) else network
        self.patch_size = tuple(patch_size)
        self.moments = RunningMoments()

    @torch.no_grad()
    def forward(self, image: Tensor, cells: Tensor) -> Tensor:
        """Map an image ``[B, C, *S]`` and its hidden cells ``[B, 1, *G]`` to ``[B, N]``, 0 for visible cells."""
        rebuilt = self.network(image, cells_to_image(cells, self.patch_size, image.shape[2:]))
        error = image_to_cells((rebuilt - image).abs().mean(1, keepdim=True), self.patch_size).flatten(1)
        hidden = cells.flatten(1)
        if self.training:
            self.moments.update(error, hidden)
        return torch.where(hidden, error / (self.moments.mean + EPS), 0.0)
