# SPDX-License-Identifier: Apache-2.0
"""From random to chosen masks over the training: one wrapper around any masker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ahm_networks.maskers.base import SEED_STEP, Decision, Masker, Step
from ahm_networks.rl.schedules import LinearSchedule, check_ends
from ahm_transforms.masking.functional import check_mask_ratio, choose_cells

__all__ = ["CurriculumMasker"]


class CurriculumMasker(Masker):
    """Let a masker choose a growing share of each mask and draw the rest uniformly.

    Every hard-masking method that works keeps a large random share and ramps it (HPM, CVPR 2023; AnatoMask, 2024). In
    ``eval()`` mode the inner masker chooses everything; what it leaves of the ratio, as boxes do, goes to the cells
    that come next on its policy map.

    Args:
        masker: the masker that learns.
        policy_share: share of the hidden cells that it chooses at the end of the warm-up and at the end of training.
        warm_up: share of the training with random masks only, in [0, 1). Value maps and predicted errors are already
            learned from them; Bernoulli agents, which do not act yet, are not.
        mask_ratio: ratio at the start and at the end; ``None`` keeps the masker's own.

    Raises:
        ValueError: when a share or ratio is out of range.

    Example:
        >>> from ahm_networks.maskers import LossPredictionMasker
        >>> masker = CurriculumMasker(LossPredictionMasker(2, 8, 0.5), policy_share=(0.0, 0.5), warm_up=0.2)
        >>> masker.set_progress(1.0)
        >>> masker.share
        0.5
    """

    def __init__(
        self,
        masker: Masker,
        *,
        policy_share: tuple[float, float] = (0.0, 0.5),
        warm_up: float = 0.15,
        mask_ratio: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            masker.spatial_dims,
            masker.patch_size,
            masker.mask_ratio,
            foreground_threshold=masker.foreground_threshold,
            seed=masker._generator.initial_seed() + SEED_STEP,
        )
        if not 0.0 <= warm_up < 1.0:
            raise ValueError(f"warm_up: expected a number in [0, 1), got {warm_up!r}.")
        self.masker = masker
        self.num_samples = masker.num_samples
        self.in_channels = masker.in_channels
        self.policy_share = LinearSchedule(*check_ends("policy_share", policy_share, 0, 1), start=warm_up)
        ratios = (masker.mask_ratio, masker.mask_ratio) if mask_ratio is None else mask_ratio
        self.mask_ratios = LinearSchedule(*map(check_mask_ratio, check_ends("mask_ratio", ratios, 0, 1)))
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set share and ratio for this point of the training."""
        self.masker.set_progress(progress)
        self.share = self.policy_share(progress) if progress >= self.policy_share.start else 0.0
        self.mask_ratio = self.mask_ratios(progress)

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        share = self.share if self.training else 1.0
        decision = self.masker(image, mask_ratio=ratio * share, foreground=foreground)
        if self.training or decision.policy_map is None:
            wanted = self.uniform(*decision.cells.shape, device=image.device)
        else:
            wanted = decision.policy_map
        cells = self._fill_up(decision, wanted, ratio)
        return dataclasses.replace(decision, cells=cells, mask=self.expand(cells, image))

    def loss(self, steps: Sequence[Step]) -> Tensor | None:
        """See :meth:`Masker.loss`: the inner masker's."""
        return self.masker.loss(steps)

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """The inner masker's and, in training, the share that it chooses."""
        share = {"policy_share": torch.tensor(self.share)} if self.training else {}
        return self.masker.diagnostics(decision) | share

    def _fill_up(self, decision: Decision, wanted: Tensor, ratio: float) -> Tensor:
        """Add the most ``wanted`` cells, on [0, 1], until the ratio is met; chosen cells always stay hidden."""
        cells = decision.cells
        count = self.count(ratio, cells.shape[2:], decision.allowed)
        return choose_cells(wanted + 2.0 * cells, count, allowed=decision.allowed) | cells
