# SPDX-License-Identifier: Apache-2.0
"""Running statistics that live on the device and travel with the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahm_networks.processes import gather

__all__ = ["RunningMoments"]


class RunningMoments(nn.Module):
    """Exponential mean and variance of a stream of numbers.

    The first steps are a plain average, so that nothing is biased towards the initial values. Of several processes,
    each takes in the numbers of all, and all have to update at the same time.

    Args:
        decay: weight of the past, in [0, 1).
    """

    mean: Tensor
    var: Tensor
    steps: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("var", torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))

    @property
    def std(self) -> Tensor:
        """Standard deviation, never quite zero."""
        return (self.var + 1e-12).sqrt()

    @torch.no_grad()
    def update(self, values: Tensor, where: Tensor | None = None) -> None:
        """Take in ``values`` (those that ``where`` marks); an empty selection changes nothing."""
        values = values.to(self.mean.dtype)  # half precision could not count that many, float64 does not mix
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        total = where.to(values.dtype).sum()
        mean = torch.where(where, values, 0.0).sum() / total.clamp_min(1.0)
        spread = torch.where(where, values - mean, 0.0).square().sum() / total.clamp_min(1.0)
        some, mean, spread = _joined(*gather(torch.stack([total, mean, spread])).unbind(1))
        share = (self.steps + 1.0).reciprocal().clamp_min(1.0 - self.decay) * some
        delta = mean - self.mean
        self.mean.addcmul_(share, delta)
        self.var.lerp_(spread + (1.0 - share) * delta.square(), share)
        self.steps.add_(some)


def _joined(totals: Tensor, means: Tensor, spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of parts ``[P]``: whether there is any number, the mean and the variance of all (Chan et al. 1983)."""
    share = totals / totals.sum().clamp_min(1.0)
    mean = (share * means).sum()
    return totals.sum() > 0, mean, (share * (spreads + (means - mean).square())).sum()
