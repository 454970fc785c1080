# SPDX-License-Identifier: Apache-2.0
"""Intelligent Masking: one region, where a Q-map expects the largest error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ahm_networks.maskers.boxes import BoxMasker

__all__ = ["QRegionMasker"]


class QRegionMasker(BoxMasker):
    """Deep Q-learning for context encoding (Intelligent Masking, MLMI 2022): hide the region of the largest Q-value.

    The Q-map predicts, for each cell of a coarse grid, the error of the region that begins there. It is a
    :class:`BoxMasker` of one step, one size and a plain head, with an action's target the region's mean error,
    less the running mean, over the running deviation. The paper's grid of 9 x 9 cells comes from
    ``patch_size=ceil(image_size / 9)``, so 34 for its 300 pixels; in 3D, ``ceil(image_size / 6)`` gives 6 x 6 x 6.

    ``mask_ratio`` is a limit that a single region hardly reaches. What differs from the paper: regions lie in the
    grid as a whole, targets are scaled means instead of sums over all pixels, exploration goes on after its jump, and
    a region is judged by the features of just its own cells.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: largest share of the allowed cells to hide.
        in_channels: image channels.
        region_size: in cells, one number or one per axis.
        n_steps: regions per image; 1 in the paper.
        epsilon: chance to explore before and after its jump.
        explore: shares of the training at which epsilon begins and ends to change; the paper explores for 20 %.
        replay: episodes to keep and learn from again; 0 for none.
        dueling: whether to split the Q-values into a value and advantages.
        double: whether to take double Q-learning targets; for ``n_steps`` of at least 2.
        target_decay: of the target network; for ``n_steps`` of at least 2, 0 for none.
        td_loss: ``mse`` as in the paper, or ``huber``.
        area_penalty: see :class:`BoxMasker`; 1 takes the running mean off all targets, which moves no maximum.
        cell_weight: see :class:`BoxMasker`; none in the paper.
        **kwargs: further options of :class:`BoxMasker`.

    Raises:
        ValueError: for ``double`` or ``target_decay`` with a single step, which has no later value to estimate, and as
            :class:`BoxMasker` does.

    Example:
        >>> import torch
        >>> masker = QRegionMasker(2, patch_size=4, region_size=2)
        >>> masker(torch.rand(3, 1, 36, 36)).cells.flatten(1).sum(1)
        tensor([4, 4, 4])
    """

    def __init__(
        self,
        spatial_dims: int,
        patch_size: int | Sequence[int],
        mask_ratio: float = 0.6,
        *,
        in_channels: int = 1,
        region_size: int | Sequence[int] = 2,
        n_steps: int = 1,
        epsilon: tuple[float, float] = (1.0, 0.05),
        explore: tuple[float, float] = (0.2, 0.2),
        replay: int = 0,
        dueling: bool = False,
        double: bool = False,
        target_decay: float = 0.0,
        td_loss: str = "mse",
        area_penalty: float = 1.0,
        cell_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if n_steps == 1 and (double or target_decay):
            raise ValueError(
                "double, target_decay: with n_steps=1 there is no later value to estimate; leave them off, or take "
                "n_steps of at least 2."
            )
        super().__init__(
            spatial_dims,
            patch_size,
            mask_ratio,
            in_channels=in_channels,
            n_steps=n_steps,
            sizes=(region_size,),
            epsilon=epsilon,
            explore=explore,
            replay=replay,
            dueling=dueling,
            double=double,
            target_decay=target_decay,
            td_loss=td_loss,
            area_penalty=area_penalty,
            cell_weight=cell_weight,
            **kwargs,
        )
