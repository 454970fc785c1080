# SPDX-License-Identifier: Apache-2.0
"""Prepare each case once, and keep it on disk for the next epoch, the next run, the next arm of a study."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, RandomizableTrait, Transform

from ahm_transforms.cache_folder import CacheFolder

__all__ = ["PersistentSteps", "persistent"]

VALUES, AFFINE = "values of a MetaTensor", "affine of a MetaTensor"

logger = logging.getLogger(__name__)


class PersistentSteps(Transform):
    """Deterministic steps whose result is kept in a folder, and read from there later on.

    A stored case belongs to the entries of the case, to the size and the time of change of the files that they name, to
    the steps with their arguments, to this package's code and the versions of MONAI and torch: what changes is prepared
    anew. Code of your own steps is not looked into: choose another folder when you change it.
    Of the meta data, the affine stays alone.

    Args:
        steps: deterministic transforms.
        cache_dir: see `CacheFolder`.

    Raises:
        OSError: when files cannot be written there.
        TypeError: on call, when the steps leave something else than tensors, arrays, numbers and text.

    Example:
        >>> import tempfile
        >>> from monai.transforms import ScaleIntensityd
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     steps = PersistentSteps([ScaleIntensityd("image")], folder)
        ...     first, second = (steps({"image": torch.arange(3.0)}) for _ in range(2))
        >>> second["image"].as_tensor()
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, steps: Sequence[Transform], cache_dir: str | Path) -> None:
        self.steps = Compose(steps)
        self.kept = CacheFolder(cache_dir, pickle_hashing(list(steps)).decode(), suffix=".pt")

    def __call__(self, data: Mapping[str, Any]) -> Any:
        """Return what the steps make of a case, from the folder if it is there."""
        path = self.kept.path(data)
        if path.is_file():
            try:
                return _read(path)
            except Exception as error:  # torch raises whatever a damaged file makes it stumble over
                logger.warning("%s is damaged and is made anew (%s).", path, " ".join(str(error).split())[:200])
        ready = self.steps(data)
        try:
            with self.kept.replacing(path) as temporary:
                torch.save(_without_meta(ready), temporary)
                stored = _read(temporary)
        except UnpicklingError as error:
            raise TypeError(
                "cache_dir: expected tensors, arrays, numbers and text in a prepared case, got "
                f"{ {key: type(value).__name__ for key, value in ready.items()} }."
            ) from error
        return stored


def persistent(chain: Compose, cache_dir: str | Path | None) -> Compose:
    """Keep in a folder what a chain makes of a case ahead of its first random step; without a folder, do nothing.

    Args:
        chain: deterministic steps first, random ones after them.
        cache_dir: see `PersistentSteps`.

    Raises:
        OSError: as `PersistentSteps`.
    """
    if cache_dir is None:
        return chain
    first = chain.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
    )
    steps = list(chain.transforms)
    return Compose([PersistentSteps(steps[:first], cache_dir), *([] if first is None else steps[first:])])


def _read(path: Path) -> Any:
    return _with_affine(torch.load(path, weights_only=True))


def _without_meta(item: Any) -> Any:
    """What torch.load takes with ``weights_only``: a MetaTensor becomes two plain tensors, an array one."""
    if isinstance(item, Mapping):
        return {key: _without_meta(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_without_meta(value) for value in item]
    if isinstance(item, MetaTensor):
        return {VALUES: item.as_tensor().contiguous(), AFFINE: item.affine}  # crops of other layouts are slow
    return torch.as_tensor(item) if isinstance(item, np.ndarray | np.generic) else item


def _with_affine(item: Any) -> Any:
    if isinstance(item, list):
        return [_with_affine(value) for value in item]
    if not isinstance(item, dict):
        return item
    if item.keys() == {VALUES, AFFINE}:
        return MetaTensor(item[VALUES], affine=item[AFFINE])
    return {key: _with_affine(value) for key, value in item.items()}
