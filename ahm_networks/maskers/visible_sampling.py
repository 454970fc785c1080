# SPDX-License-Identifier: Apache-2.0
"""Learn what to show: the opposite of hard masks, as a peer to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from ahm_networks.maskers.base import Decision, Masker, Step
from ahm_networks.nets.policy import CellScorer, feature_network
from ahm_networks.rl.functional import EPS, categorical_entropy, gumbel, inclusion_probability, masked_mean
from ahm_networks.rl.running import RunningMoments
from ahm_transforms.masking.functional import choose_cells

__all__ = ["VisibleSamplingDecision", "VisibleSamplingMasker"]

HEADS = 4


@dataclass(frozen=True, kw_only=True)
class VisibleSamplingDecision(Decision):
    """Adds the logits of being shown, ``[B, N]`` with their gradient, ``-inf`` where a cell is not to be hidden."""

    logits: Tensor


class VisibleSamplingMasker(Masker):
    r"""Draw the visible cells from learned probabilities and hide the others (AdaMAE, Bandara et al., CVPR 2023).

    .. math:: L = -\frac{1}{k} \sum_{i \text{ hidden}} \log p_i \, \frac{e_i}{\bar e}

    with ``p`` the softmax over the allowed cells and ``e`` the error, which carries no gradient, over its running mean;
    rewards below zero, as of learning progress, count as zero.
    A cell with a large error is thereby more likely to be *shown* next time, up to a ``p`` in proportion to the error:
    the opposite curriculum to AHM's. There is no baseline, and ``p`` is that of one draw of one cell, not of the set,
    as in the released code: the loss is a weighted cross-entropy, no policy gradient.

    Cells that a curriculum hides at random were not shown either and take part. In ``eval()`` mode the least probable
    cells are hidden. The whole masker runs in float32.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: share of the allowed cells to hide.
        in_channels: image channels.
        features: ``strided`` or ``vgg16``.
        features_weights: file with VGG16's weights.
        **kwargs: ``foreground_threshold`` and ``seed`` of :class:`Masker`.

    Raises:
        ValueError: for an unknown feature network.

    Example:
        >>> masker = VisibleSamplingMasker(2, patch_size=8, mask_ratio=0.5)
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
        features: str = "strided",
        features_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, patch_size, mask_ratio, **kwargs)
        self.in_channels = in_channels
        net = feature_network(features, spatial_dims, in_channels, self.patch_size, features_weights)
        self.scorer = CellScorer(spatial_dims, _WithAttention(net), ["visible"], self.patch_size)
        self.error_moments = RunningMoments()

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        scope = self.scope(image, mask_ratio, foreground)
        logits = scope.confine(self.scorer(image)["visible"].flatten(1))
        fixed = logits.detach()
        noise = gumbel(self.uniform(*fixed.shape, device=image.device))
        scores = fixed + noise if self.training else fixed
        # The highest scores are a draw without replacement of what is shown: the lowest ones are hidden.
        cells = choose_cells(-scores.view(-1, 1, *scope.grid), scope.count, allowed=scope.allowed)
        return VisibleSamplingDecision(
            mask=self.expand(cells, image),
            cells=cells,
            allowed=scope.allowed,
            policy_map=_chance_to_be_hidden(fixed, scope.count).view(-1, 1, *scope.grid),
            logits=logits,
        )

    def loss(self, steps: Sequence[Step]) -> Tensor:
        """Mean sampling loss of all steps."""
        return torch.stack([self._step_loss(decision, reward) for decision, reward in steps]).mean()

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """Entropy of the probabilities as a share of its largest value."""
        logits = _own(decision).logits.detach()
        return {"policy_entropy": categorical_entropy(logits, torch.isfinite(logits)).mean()}

    def _step_loss(self, decision: Decision, reward: Tensor) -> Tensor:
        log_p = _own(decision).logits.log_softmax(1)
        hidden = decision.cells.flatten(1)
        error = self.reward_of_cells(decision, reward).clamp_min(0.0)
        self.error_moments.update(error, hidden)
        weight = torch.where(hidden, error / (self.error_moments.mean + EPS), 0.0)
        return -masked_mean(log_p * weight, hidden).mean()


class _WithAttention(nn.Module):
    """Lets the features of every cell look at those of all others, by one transformer block."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.out_channels = int(features.out_channels)  # type: ignore[arg-type]
        self.block = TransformerBlock(self.out_channels, 4 * self.out_channels, HEADS)
        self.block.norm_cross_attn = nn.Identity()  # built by MONAI, used only where there is cross-attention

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, C, *S]`` to ``[B, out_channels, *G]``."""
        features = self.features(image)
        return self.block(features.flatten(2).mT).mT.reshape(features.shape)


def _chance_to_be_hidden(logits: Tensor, count: int | Tensor) -> Tensor:
    """One minus the estimated chance to be among the shown cells, 0 for forbidden ones: ``[B, N]``."""
    allowed = torch.isfinite(logits)
    return torch.where(allowed, 1.0 - inclusion_probability(logits, allowed.sum(1) - count), 0.0)


def _own(decision: Decision) -> VisibleSamplingDecision:
    if not isinstance(decision, VisibleSamplingDecision):
        raise TypeError(f"decision: expected one of a VisibleSamplingMasker, got {type(decision).__name__}.")
    return decision
