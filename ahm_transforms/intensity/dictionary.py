# SPDX-License-Identifier: Apache-2.0
"""The intensity transforms for dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform

from ahm_transforms.intensity.array import PercentilesToUnit, WindowToUnit


class _Eachd(MapTransform):
    """Apply one array transform to every key."""

    transform: Callable[[NdarrayOrTensor], NdarrayOrTensor]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the keys transformed."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key])
        return result


class WindowToUnitd(_Eachd):
    """`WindowToUnit` for dictionaries.

    Args:
        keys: entries to scale.
        low: what becomes 0.
        high: what becomes 1.
        allow_missing_keys: whether an absent entry is passed over.
    """

    def __init__(self, keys: KeysCollection, low: float, high: float, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = WindowToUnit(low, high)


class PercentilesToUnitd(_Eachd):
    """`PercentilesToUnit` for dictionaries.

    Args:
        keys: entries to scale, each by itself.
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
        channel_wise: whether each channel has percentiles of its own.
        allow_missing_keys: whether an absent entry is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 1.0,
        upper: float = 99.0,
        *,
        channel_wise: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = PercentilesToUnit(lower, upper, channel_wise=channel_wise)
