# SPDX-License-Identifier: Apache-2.0
"""Hide what is predicted to be hard, without reinforcement learning: the control that a policy has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ahm_networks.maskers.base import Decision, Masker, Step
from ahm_networks.maskers.drawing import draw_in_order
from ahm_networks.nets.policy import CellScorer, feature_network
from ahm_networks.rl.functional import gumbel, inclusion_probability, masked_mean, zscore_reward
from ahm_transforms.masking.functional import cell_count

__all__ = ["LossPredictionDecision", "LossPredictionMasker"]


@dataclass(frozen=True, kw_only=True)
class LossPredictionDecision(Decision):
    """Adds the predicted standardised error, ``[B, N]`` with its gradient."""

    predicted: Tensor


class LossPredictionMasker(Masker):
    """Regress each hidden cell's error and sample masks from the prediction (after HPM, Wang et al., CVPR 2023).

    Cells are drawn without replacement with logits ``predicted / temperature``; in ``eval()`` mode the highest
    predictions are hidden. The network is the actor-critic's with one head less, so the two cost the same.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: share of the allowed cells to hide.
        in_channels: image channels.
        temperature: of the draw; large values approach uniform masks.
        loss: ``mse`` on errors standardised per image, or ``rank``, the pairwise ranking loss of HPM.
        features: ``strided`` or ``vgg16``.
        features_weights: file with VGG16's weights.
        **kwargs: ``foreground_threshold`` and ``seed`` of :class:`Masker`.

    Raises:
        ValueError: for an unknown loss or feature network, or a temperature that is not positive.

    Example:
        >>> masker = LossPredictionMasker(2, patch_size=8, mask_ratio=0.5)
        >>> decision = masker(torch.rand(2, 1, 32, 32))
        >>> masker.loss([(decision, torch.rand(2, 1, 32, 32))]).requires_grad
        True
    """

    def __init__(
        self,
        spatial_dims: int,
        patch_size: int | Sequence[int],
        mask_ratio: float = 0.6,
        *,
        in_channels: int = 1,
        temperature: float = 1.0,
        loss: str = "mse",
        features: str = "strided",
        features_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, patch_size, mask_ratio, **kwargs)
        if loss not in ("mse", "rank"):
            raise ValueError(f"loss: expected 'mse' or 'rank', got {loss!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}.")
        self.in_channels = in_channels
        self.temperature = temperature
        self.loss_name = loss
        net = feature_network(features, spatial_dims, in_channels, self.patch_size, features_weights)
        self.scorer = CellScorer(spatial_dims, net, ["value"], self.patch_size)

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        scope = self.scope(image, mask_ratio, foreground)
        predicted = self.scorer(image)["value"].flatten(1)
        logits = scope.confine(predicted.detach() / self.temperature)
        uniform = self.uniform(*logits.shape, device=image.device)
        noise = gumbel(uniform) if self.training else torch.zeros_like(uniform)
        drawn = draw_in_order(logits, noise, scope.count, int(cell_count(scope.ratio, logits.shape[1])))
        cells = drawn.cells.view(-1, 1, *scope.grid)
        return LossPredictionDecision(
            mask=self.expand(cells, image),
            cells=cells,
            allowed=scope.allowed,
            policy_map=inclusion_probability(logits, scope.count).view(-1, 1, *scope.grid),
            predicted=predicted,
        )

    def loss(self, steps: Sequence[Step]) -> Tensor:
        """Mean prediction loss over the hidden cells of all steps."""
        return torch.stack([self._step_loss(decision, reward) for decision, reward in steps]).mean()

    def _step_loss(self, decision: Decision, reward: Tensor) -> Tensor:
        if not isinstance(decision, LossPredictionDecision):
            raise TypeError(f"decision: expected one of this masker's own, got {type(decision).__name__}.")
        hidden = decision.cells.flatten(1)
        error = self.reward_of_cells(decision, reward)
        if self.loss_name == "rank":
            return _ranking_loss(decision.predicted, error, hidden)
        target = zscore_reward(error, hidden)
        return masked_mean(F.mse_loss(decision.predicted, target, reduction="none"), hidden).mean()


def _ranking_loss(predicted: Tensor, error: Tensor, hidden: Tensor) -> Tensor:
    """Binary cross-entropy on which of two hidden cells has the larger error, mean over all pairs (HPM)."""
    margin = predicted.unsqueeze(2) - predicted.unsqueeze(1)
    harder = (error.unsqueeze(2) > error.unsqueeze(1)).to(margin.dtype)
    pairs = hidden.unsqueeze(2) & hidden.unsqueeze(1) & (error.unsqueeze(2) != error.unsqueeze(1))
    losses = F.binary_cross_entropy_with_logits(margin, harder, reduction="none")
    return masked_mean(losses.flatten(1), pairs.flatten(1)).mean()
