# SPDX-License-Identifier: Apache-2.0
"""Look at labels and masks beside their images before training starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import ensure_tuple

from ahm_transforms.io._types import Case
from ahm_transforms.io.check import unreadable
from ahm_transforms.io.labels import grid_problem, load_label, load_map, names_of


@dataclass(frozen=True)
class LabelCheck:
    """Which classes occur in the label of a case, within its block if it is one.

    Args:
        classes: names of classes 1, 2, ...
        label_values: the value of each in the label maps.
        allow_empty: whether all may be background.
        pictures: whether volumes of one slice are read as pictures.
    """

    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    allow_empty: bool = False
    pictures: bool = False

    def __call__(self, case: Case, image: MetaTensor) -> frozenset[str]:
        """Return their names.

        Raises:
            ValueError: the label does not fit the image or the classes, or holds nothing and ``allow_empty`` is off.
        """
        label = _beside(case, image, "label", self._load).as_tensor()
        inside = label[tuple(slice(start, stop) for start, stop in case.get("block", ()))]
        counts = torch.bincount(inside.flatten(), minlength=len(self.classes) + 1).tolist()
        present = frozenset(name for name, count in zip(self.classes, counts[1:], strict=True) if count)
        if not present and not self.allow_empty:
            raise ValueError(
                f"label {names_of(case['label'])} is all background, expected some of {', '.join(self.classes)}: "
                "pass --allow_empty_labels true if that is right"
            )
        return present

    @cached_property
    def _load(self) -> Callable[[Any], MetaTensor]:
        """Blocks of one scan share a label."""
        return lru_cache(maxsize=1)(partial(load_label, label_values=self.label_values, pictures=self.pictures))


@dataclass(frozen=True)
class ClassCheck:
    """The class of a case; its mask, if masks are asked for, must be there, readable and on the image's grid.

    Args:
        classes: names of classes 0, 1, ...
        pictures: whether volumes of one slice are read as pictures.
    """

    classes: tuple[str, ...]
    pictures: bool = False

    def __call__(self, case: Case, image: MetaTensor) -> frozenset[str]:
        """Return its name.

        Raises:
            ValueError: the mask is not.
        """
        if "mask" in case:
            if case["mask"] is None:
                raise ValueError("no mask")
            _beside(case, image, "mask", partial(load_map, pictures=self.pictures))
        return frozenset([self.classes[case["label"]]])


def _beside(case: Case, image: MetaTensor, key: str, load: Callable[[Any], MetaTensor]) -> MetaTensor:
    """Return the map that a case keeps under ``key``; any reason not to becomes a ValueError that names the file."""
    files = tuple(case[key]) if isinstance(case[key], list) else case[key]
    missing = [path for path in ensure_tuple(files) if not Path(path).is_file()]
    if missing:
        raise ValueError(f"{key} {names_of(missing)} does not exist")
    try:
        label = load(files)
    except OSError as error:
        raise ValueError(f"{key} {names_of(files)} {unreadable(error)}") from error
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error
    if problem := grid_problem(image, label):
        raise ValueError(f"{key} {names_of(files)} {problem} the image")
    return label
