# SPDX-License-Identifier: Apache-2.0
"""Look at labels and masks beside their images before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import ensure_tuple

from ahm_transforms.io._types import Case
from ahm_transforms.io.check import unreadable
from ahm_transforms.io.labels import grid_problem, names_of


def check_label(
    case: Case, image: MetaTensor, *, classes: Sequence[str], load: Callable[[Any], MetaTensor], allow_empty: bool
) -> frozenset[str]:
    """Return the classes that occur in the label of a case, within its block if it is one.

    Args:
        case: what to look at.
        image: its image.
        classes: names of classes 1, 2, ...
        load: how to read a path, or a tuple of paths, as class indices.
        allow_empty: whether all may be background.

    Raises:
        ValueError: the label does not fit the image or the classes, or holds nothing and ``allow_empty`` is off.
    """
    label = _beside(case, image, "label", load).as_tensor()
    inside = label[tuple(slice(start, stop) for start, stop in case.get("block", ()))]
    counts = torch.bincount(inside.flatten(), minlength=len(classes) + 1).tolist()
    present = frozenset(name for name, count in zip(classes, counts[1:], strict=True) if count)
    if not present and not allow_empty:
        raise ValueError(
            f"label {names_of(case['label'])} is all background, expected some of {', '.join(classes)}: "
            "pass --allow_empty_labels true if that is right"
        )
    return present


def check_class(
    case: Case, image: MetaTensor, *, classes: Sequence[str], load: Callable[[Any], MetaTensor]
) -> frozenset[str]:
    """Return the class of a case; its mask, if masks are asked for, must be there, readable and on the image's grid.

    Args:
        case: what to look at.
        image: its image.
        classes: names of the classes.
        load: how to read the path of a mask.

    Raises:
        ValueError: the mask is not.
    """
    if "mask" in case:
        if case["mask"] is None:
            raise ValueError("no mask")
        _beside(case, image, "mask", load)
    return frozenset([classes[case["label"]]])


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
