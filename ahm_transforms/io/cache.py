# SPDX-License-Identifier: Apache-2.0
"""A cache of cases that leaves memory for the rest of the work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from threading import Thread, current_thread
from time import monotonic
from typing import Any

from monai.data import CacheDataset

from ahm_transforms.io.memory import available_memory

__all__ = ["BoundedCacheDataset"]

SECONDS = 0.05  # between two looks at the memory, each of which takes about a millisecond

logger = logging.getLogger(__name__)


class BoundedCacheDataset(CacheDataset):
    """MONAI's ``CacheDataset`` that stops caching before memory is full.

    What the deterministic transforms make of a case stays in memory as long as ``keep_free`` of what was free at the
    start is left; processes that fill their caches at the same time share it. The other cases are read anew whenever
    they are asked for, with the same result, and a warning says how many they are.

    Args:
        data: cases.
        transform: deterministic transforms first, random ones after them.
        cache_rate: share of the cases to cache at most.
        keep_free: share of the free memory that stays free, in [0, 1].
        num_workers: threads that fill the cache.
        progress: whether a bar shows how it fills.
        copy_cache: ``False`` where no random transform writes into its input.

    Raises:
        ValueError: for a share outside [0, 1].

    Example:
        >>> import torch
        >>> from monai.transforms import ScaleIntensityd
        >>> cases = [{"image": torch.rand(1, 8, 8)} for _ in range(3)]
        >>> dataset = BoundedCacheDataset(cases, ScaleIntensityd("image"), progress=False)
        >>> len(dataset), dataset.cache_num
        (3, 3)
    """

    cache_num: int

    def __init__(
        self,
        data: Sequence[Any],
        transform: Sequence[Callable[..., Any]] | Callable[..., Any],
        *,
        cache_rate: float = 1.0,
        keep_free: float = 0.5,
        num_workers: int | None = 1,
        progress: bool = True,
        copy_cache: bool = True,
    ) -> None:
        for name, share in (("cache_rate", cache_rate), ("keep_free", keep_free)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {share}.")
        self.keep_free = keep_free
        options = {"num_workers": num_workers, "progress": progress, "copy_cache": copy_cache}
        super().__init__(data, transform, cache_rate=cache_rate, **options)

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list[Any]:
        self._least, self._next_look = self.keep_free * available_memory(), 0.0
        self._end = len(self.data)  # the first case that does not fit
        self._readers: dict[Thread, int] = {}  # and the case that each has come to
        try:
            cached = list(takewhile(lambda item: item is not None, super()._fill_cache(indices)))
        except BaseException:  # Ctrl+C as well: a process that ends while other threads still read aborts
            self._end = 0
            for reader in tuple(self._readers):
                reader.join()
            raise
        self._readers.clear()  # so that the dataset can be sent to other processes
        if len(cached) < self.cache_num:
            self.cache_num = len(cached)
            logger.warning(
                "memory holds %d of %d case(s) and has %.1f GiB left; the others are read again in each epoch. "
                "--num_workers 4 does that in the background, --cache_dir keeps them prepared on disk.",
                *(len(cached), len(self.data), available_memory() / 2**30),
            )
        return cached

    def _load_cache_item(self, idx: int) -> Any:
        self._readers[current_thread()] = idx
        if idx < self._end and monotonic() >= self._next_look:
            self._next_look = monotonic() + SECONDS
            if available_memory() < self._least:
                # a reader that is late still keeps a case before it
                self._end = min(self._end, max(tuple(self._readers.values())))
        return super()._load_cache_item(idx) if idx < self._end else None
