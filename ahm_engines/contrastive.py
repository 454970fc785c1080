# SPDX-License-Identifier: Apache-2.0
"""Contrastive pretraining with MONAI's ``SupervisedTrainer``: what stands in for image, label and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahm_engines.step import prepare_image

__all__ = ["PairedContrastiveLoss", "pair_scores", "prepare_views"]

VIEWS = ("image", "view")


def prepare_views(batch: Any, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple[Tensor, None]:
    """Take both views of every crop to the device, for ``SupervisedTrainer(prepare_batch=prepare_views)``.

    Args:
        batch: dictionary with ``image`` and ``view``, ``[B, C, *S]``.
        device: where to.
        non_blocking: as in ``Tensor.to``.
        **kwargs: further arguments of ``Tensor.to``.

    Returns:
        ``[2B, C, *S]``, all of ``image`` and then all of ``view``, and no label.

    Raises:
        TypeError: when the batch is no dictionary with both views.
    """
    if not isinstance(batch, Mapping) or any(key not in batch for key in VIEWS):
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch: expected a dictionary with {' and '.join(VIEWS)}, got {found}; add contrastive_views.")
    views = torch.cat([prepare_image(batch[key], device, non_blocking) for key in VIEWS])
    return views.to(**kwargs) if kwargs else views, None


class PairedContrastiveLoss(nn.Module):
    """SimCLR's loss (NT-Xent; Chen et al., ICML 2020) of a batch as :func:`prepare_views` lays it out.

    With ``s`` the cosine of two vectors, ``t`` the temperature and ``p(i)`` the other view of the crop of view ``i``,
    ``loss = mean_i -log(exp(s(i, p(i)) / t) / sum_{j != i} exp(s(i, j) / t))``, as in MONAI's ``ContrastiveLoss``: of
    the 2B views, the sum leaves out view ``i`` itself and nothing else, so that the positive is one of its 2B - 1
    terms. Vectors that are all alike have the loss ``log(2B - 1)``. Unlike MONAI's, no exponential leaves float32 at
    low temperatures, and ``[2B, 2B]`` numbers are held at once instead of ``[2B, 2B, D]``.

    Args:
        temperature: the lower, the more the nearest negatives count.

    Raises:
        ValueError: for a temperature that is not positive.

    Example:
        >>> loss = PairedContrastiveLoss(temperature=0.5)
        >>> round(float(loss(torch.ones(4, 2))), 4)  # log(3)
        1.0986
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}.")
        self.temperature = temperature

    def forward(self, pred: Tensor, label: Any = None) -> Tensor:
        """Return the mean loss of the views, a scalar, in float32 whatever autocast.

        Args:
            pred: ``[2B, D]``; the partner of row ``i`` is row ``i + B``.
            label: none is needed.

        Raises:
            ValueError: for fewer than two crops, or an odd number of rows.
        """
        if pred.ndim != 2 or len(pred) % 2:
            raise ValueError(f"pred: expected [2B, D], two views of each crop, got shape {tuple(pred.shape)}.")
        if len(pred) < 4:
            raise ValueError(
                f"pred: expected the views of at least 2 crops, got {len(pred) // 2}: a crop alone has no negatives. "
                "Raise cases_per_batch or samples_per_case."
            )
        with torch.autocast(pred.device.type, enabled=False):
            similarity, partner = _compared(pred)
            return F.cross_entropy(similarity / self.temperature, partner)


def pair_scores(first: Tensor, second: Tensor, temperature: float) -> dict[str, float]:
    """Score the pairs of a whole data set, each view against all the others.

    Args:
        first: ``[N, D]``, one view of every crop; N is at least 2.
        second: the other views, in the same order.
        temperature: of the loss.

    Returns:
        ``retrieval``, the share of views that are most similar to their partner; ``alignment``, the mean cosine of
        partners; ``contrastive_loss``, that of :class:`PairedContrastiveLoss` with all N crops as one batch.

    Example:
        >>> views = torch.eye(2)
        >>> pair_scores(views, views, 0.5)["retrieval"]
        1.0
    """
    similarity, partner = _compared(torch.cat([first, second]))
    return {
        "retrieval": float((similarity.argmax(1) == partner).float().mean()),
        "alignment": float(similarity.gather(1, partner[:, None]).mean()),
        "contrastive_loss": float(F.cross_entropy(similarity / temperature, partner)),
    }


def _compared(views: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all views ``[2B, D]`` with all others, minus infinity with themselves, and the row of each partner."""
    views = F.normalize(views.float(), dim=1)
    partner = torch.arange(len(views), device=views.device).roll(len(views) // 2)
    return (views @ views.T).fill_diagonal_(-torch.inf), partner
