# SPDX-License-Identifier: Apache-2.0
"""Bring intensities to [0, 1] in a few passes over the memory, whatever the values."""

from __future__ import annotations

import torch
from monai.config import NdarrayOrTensor, NdarrayTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

_SAMPLE_VOXELS = 2**18  # percentiles of so many voxels are within a fraction of a percent of those of all


class WindowToUnit(Transform):
    """Map ``[low, high]`` linearly to [0, 1] and clip; NaN and infinity count as ``low``.

    The result is float32, of the same shape and kind (tensor or array); the input is left alone.

    Args:
        low: what becomes 0, in the image's unit (HU for CT).
        high: what becomes 1.

    Raises:
        ValueError: ``low`` is not below ``high``.

    Example:
        >>> WindowToUnit(-175, 250)(torch.tensor([[-1000.0, 37.5, float("nan")]]))
        tensor([[0.0000, 0.5000, 0.0000]])
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it as a plain list

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"a window needs low < high, got [{low}, {high}].")
        self.low, self.high = float(low), float(high)

    def __call__(self, img: NdarrayTensor) -> NdarrayTensor:
        """Scale ``img`` of shape [C, *S]."""
        out = _finite(img, self.low).sub_(self.low).div_(self.high - self.low).clamp_(0, 1)
        scaled: NdarrayTensor = convert_to_dst_type(out, img, dtype=torch.float32)[0]
        return scaled


class PercentilesToUnit(Transform):
    """Map two percentiles of the image linearly to 0 and 1 and clip; NaN and infinity count as 0.

    Where both percentiles are equal, the least and the greatest value take their place; a constant channel becomes 0.
    Large images are sampled on a regular grid. The result is float32, of the same shape and kind (tensor or array).

    Args:
        lower: percentile that becomes 0, in [0, 100].
        upper: percentile that becomes 1.
        channel_wise: whether each channel has percentiles of its own (MR sequences) or all share them (colours).

    Raises:
        ValueError: the percentiles are not 0 <= lower < upper <= 100.

    Example:
        >>> PercentilesToUnit(0, 100)(torch.tensor([[2.0, 4.0, 6.0]]))
        tensor([[0.0000, 0.5000, 1.0000]])
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it as a plain list

    def __init__(self, lower: float = 1.0, upper: float = 99.0, *, channel_wise: bool = True) -> None:
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"percentiles must satisfy 0 <= lower < upper <= 100, got {lower} and {upper}.")
        self.percentiles = (lower, upper)
        self.channel_wise = channel_wise

    def __call__(self, img: NdarrayTensor) -> NdarrayTensor:
        """Scale ``img`` of shape [C, *S]."""
        out = _finite(img, 0.0)
        for channel in out.split(1 if self.channel_wise else len(out)):
            low, high = self._range(channel)
            # a constant channel has nothing to divide by: subtracting leaves zeros
            channel.sub_(low).div_(high - low if high > low else 1.0).clamp_(0, 1)
        scaled: NdarrayTensor = convert_to_dst_type(out, img, dtype=torch.float32)[0]
        return scaled

    def _range(self, channel: torch.Tensor) -> tuple[float, float]:
        values = _sample(channel)
        quantiles = torch.tensor(self.percentiles, dtype=values.dtype, device=values.device) / 100
        low, high = torch.quantile(values, quantiles).tolist()
        return (low, high) if high > low else (float(channel.min()), float(channel.max()))


def _finite(img: NdarrayOrTensor, value: float) -> torch.Tensor:
    """Return a plain float32 copy of ``img`` in which ``value`` stands for NaN and infinity."""
    plain: torch.Tensor = convert_to_tensor(img)
    return torch.nan_to_num(plain.to(torch.float32), nan=value, posinf=value, neginf=value)


def _sample(img: torch.Tensor) -> torch.Tensor:
    """Return voxels of [C, *S] on a regular grid, about `_SAMPLE_VOXELS` of them, in one row."""
    dims = img.ndim - 1
    step = max(1, round((img.numel() / _SAMPLE_VOXELS) ** (1 / dims)))
    return img[(slice(None), *(slice(None, None, step),) * dims)].reshape(-1)
