# SPDX-License-Identifier: Apache-2.0
"""Read labels as class indices, whatever values and files they are stored in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, is_no_channel
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from ahm_transforms.io.reader import NIFTI_SUFFIXES, LabelReader, has_suffix, load_image

_MAX_CLASSES = 255  # they are kept as uint8
_VALUES_SHOWN = 5
_AFFINE_TOLERANCE = 1e-3  # of the spacing


class LoadLabeld(MapTransform):
    """Load labels as uint8 `MetaTensor` [*S] of class indices: 0 is background, class k of the list is k.

    A path is a map of label values. A list of paths holds one map for each class, binary or of probabilities, from 0
    to 1 or, as soon as one value is above 1, from 0 to 255. A voxel takes the class of the largest value if that is at
    least one half, else it is background.

    Args:
        keys: entries that hold a path, or a list of paths.
        num_classes: how many foreground classes there are.
        label_values: the value of each class in single maps, 1 to ``num_classes`` unless told otherwise; masks stored
            as pictures often want ``[255]``.
        pictures: whether maps of one slice are pictures, as for `load_image`.
        allow_missing_keys: whether an absent entry is passed over.

    Raises:
        ValueError: ``label_values`` do not fit; on call, when a label holds other values or has channels.
        OSError: on call, when a label cannot be read.

    Example:
        >>> load = LoadLabeld("label", num_classes=1, label_values=[255])
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_classes: int,
        label_values: Sequence[int] | None = None,
        pictures: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.pictures = pictures
        self.label_values = values_of_classes(num_classes, label_values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with class indices in the place of paths."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = load_label(result[key], self.label_values, pictures=self.pictures)
        return result


def values_of_classes(num_classes: int, label_values: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the value that stands for each foreground class in a label map.

    Raises:
        ValueError: there are more or fewer values than classes, or values that are 0 or occur twice.
    """
    if not 1 <= num_classes <= _MAX_CLASSES:
        raise ValueError(f"there must be 1 to {_MAX_CLASSES} foreground classes, got {num_classes}.")
    values = tuple(range(1, num_classes + 1)) if label_values is None else ensure_tuple(label_values)
    whole = all(isinstance(value, int) for value in values)
    if not whole or len(values) != num_classes or len({*values, 0}) != num_classes + 1:
        raise ValueError(
            f"label_values must be {num_classes} different integer(s), one for each foreground class and none of them "
            f"0 (background), got {list(values)}."
        )
    return values


def load_label(
    label: PathLike | Sequence[PathLike], label_values: Sequence[int], *, pictures: bool = False
) -> MetaTensor:
    """Return the class indices of one label [*S] as uint8, with its geometry; ``pictures`` as for `load_image`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no label of these classes.
    """
    if not isinstance(label, list | tuple):
        single = load_map(label, pictures=pictures)
        return _as_label(_from_values(single, label_values, names_of(label)), single)
    if len(label) != len(label_values):
        raise ValueError(
            f"{names_of(label)}: {len(label)} map(s), expected one for each of {len(label_values)} class(es)"
        )
    maps = [load_map(path, pictures=pictures) for path in label]
    for path, other in zip(label, maps, strict=True):
        if problem := grid_problem(maps[0], other):
            raise ValueError(f"{names_of(path)} {problem} {names_of(label[0])}")
    return _as_label(_from_maps(torch.stack([each.as_tensor() for each in maps]), names_of(label)), maps[0])


def load_map(path: PathLike, *, pictures: bool = False) -> MetaTensor:
    """Return a picture or volume of one channel as float32 [*S]; ``pictures`` as for `load_image`.

    Raises:
        OSError: it cannot be read.
        ValueError: it has several channels.
    """
    image = load_image(path, reader=LabelReader(), pictures=pictures)
    channel_dim = image.meta["original_channel_dim"]
    if is_no_channel(channel_dim):
        return image
    channels = image.shape[int(channel_dim)]
    if channels != 1:
        raise ValueError(f"{names_of(path)} has {channels} channels, expected a map of one")
    return MetaTensor(image.as_tensor().squeeze(int(channel_dim)), meta=image.meta)


def grid_problem(expected: MetaTensor, found: MetaTensor) -> str:
    """Return how the grid of an image differs from the one expected, as the start of a sentence, or an empty text."""
    shape, wanted = (tuple(int(size) for size in image.meta["spatial_shape"]) for image in (found, expected))
    if shape != wanted:
        return f"has size {shape}, expected {wanted} as"
    files = (expected.meta["filename_or_obj"], found.meta["filename_or_obj"])
    if len(wanted) == 2 and not all(has_suffix(name, NIFTI_SUFFIXES) for name in files):
        return ""  # pictures, DICOM among them, do not say where they lie
    off = float((found.affine - expected.affine).abs().max())
    if off > _AFFINE_TOLERANCE * float(affine_to_spacing(expected.affine, len(wanted)).min()):
        return f"has an affine that differs by up to {off:.4g}, expected that of"
    return ""


def names_of(paths: PathLike | Sequence[PathLike]) -> str:
    """Return the names of one or several files without their folders."""
    return ", ".join(Path(path).name for path in ensure_tuple(paths))


def _from_values(values: MetaTensor, label_values: Sequence[int], name: str) -> torch.Tensor:
    plain = values.as_tensor()
    known, order = torch.tensor((0, *label_values), dtype=plain.dtype).sort()
    order, others = order.to(torch.uint8), []
    classes = torch.empty_like(plain, dtype=torch.uint8)
    for part, out in zip(plain.unbind(-1), classes.unbind(-1), strict=True):  # indices of all would take much memory
        index = torch.bucketize(part.contiguous(), known).clamp_(max=len(known) - 1)
        out.copy_(order[index])
        others.append(part[known[index] != part])
    if len(unknown := torch.cat(others).unique()):
        unknown = unknown[: int((~unknown.isnan()).sum()) + 1]  # the first NaN stands for all, which come last
        shown = ", ".join(map(_shown, unknown[:_VALUES_SHOWN].tolist()))
        more = f" and {len(unknown) - _VALUES_SHOWN} more" if len(unknown) > _VALUES_SHOWN else ""
        kind = "" if torch.equal(unknown, unknown.round()) else ", which are not all integers"
        expected = ", ".join(map(str, (0, *label_values)))
        raise ValueError(
            f"{name} holds the value(s) {shown}{more}{kind}, expected {expected}: "
            "check --classes and --label_values, or repair the label"
        )
    return classes


def _shown(value: float) -> str:
    """Return a number with as many digits as float32 holds."""
    return f"{value:.0f}" if value.is_integer() else str(np.float32(value))


def _from_maps(maps: torch.Tensor, name: str) -> torch.Tensor:
    low, high = (float(value) for value in torch.aminmax(maps))  # NaN shows in them
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{name}: values from {low:g} to {high:g}, expected probabilities, 0 to 1 or 0 to 255")
    largest, index = maps.max(dim=0)
    return torch.where(largest >= (0.5 if high <= 1 else 127.5), index + 1, 0).to(torch.uint8)


def _as_label(classes: torch.Tensor, image: MetaTensor) -> MetaTensor:
    return MetaTensor(classes, meta={**image.meta, "original_channel_dim": "no_channel"})
