# SPDX-License-Identifier: Apache-2.0
"""Random masks, the baseline that every learned mask has to beat."""

from __future__ import annotations

from torch import Tensor

from ahm_networks.maskers.base import Decision, Masker
from ahm_transforms.masking.functional import choose_cells

__all__ = ["UniformMasker"]


class UniformMasker(Masker):
    """Hide exactly the asked share of cells, each set of that size equally likely (MAE, He et al. 2022; SimMIM).

    Example:
        >>> import torch
        >>> masker = UniformMasker(2, patch_size=8, mask_ratio=0.75)
        >>> decision = masker(torch.zeros(2, 1, 32, 32))
        >>> decision.mask.shape, int(decision.cells[0].sum())
        (torch.Size([2, 1, 32, 32]), 12)
    """

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        scope = self.scope(image, mask_ratio, foreground)
        draws = self.uniform(image.shape[0], 1, *scope.grid, device=image.device)
        cells = choose_cells(draws, scope.count, allowed=scope.allowed)
        return Decision(mask=self.expand(cells, image), cells=cells, allowed=scope.allowed)
