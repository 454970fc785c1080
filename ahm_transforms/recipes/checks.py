# SPDX-License-Identifier: Apache-2.0
"""Steps of a chain that stop at what does not fit, and name the file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ahm_transforms.io.check import axes_problem
from ahm_transforms.io.labels import grid_problem


class CheckShaped(MapTransform):
    """Stop at an image whose number of channels or of spatial axes is not the one expected, and name the file.

    Args:
        keys: entries of shape [C, *S].
        channels: the number of channels expected.
        spatial_dims: 2 or 3, of the network that follows.
        picture: whether a picture is expected, or a volume; None takes both.

    Raises:
        ValueError: on call, when the number is another, a picture was expected and it is none, or a volume, or when a
            network of volumes would get a single slice.
    """

    def __init__(self, keys: KeysCollection, channels: int, *, spatial_dims: int, picture: bool | None = None) -> None:
        super().__init__(keys)
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.picture = picture

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` as it is."""
        result = dict(data)
        for key in self.key_iterator(result):
            found = result[key].shape[0]
            if found != self.channels:
                raise ValueError(f"{_name(result[key])} has {found} channel(s), expected channels={self.channels}.")
            size = result[key].shape[1:]
            if problem := axes_problem(size, pictures=self.picture, spatial_dims=self.spatial_dims):
                raise ValueError(f"{_name(result[key])} {problem}.")
        return result


class OnImageGridd(MapTransform):
    """Stop at a label or mask that lies on another grid than its image; where it fits, it takes the image's affine.

    Affines differ a little where files round them. Sharing one keeps both on one grid through all that follows.

    Args:
        keys: entries of shape [C, *S] that belong to the image, as loaded.
        image_key: the image, of shape [C, *S], as loaded.

    Raises:
        ValueError: on call, when size or place differ.
    """

    def __init__(self, keys: KeysCollection, image_key: Hashable = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` in which the keys have the image's affine."""
        result = dict(data)
        image = result[self.image_key]
        for key in self.key_iterator(result):
            if problem := grid_problem(image, result[key]):
                raise ValueError(f"{_name(result[key])} {problem} its image {_name(image)}.")
            result[key] = result[key].clone()
            result[key].affine = image.affine
        return result


def _name(img: MetaTensor) -> str:
    return Path(str(img.meta.get("filename_or_obj", "image"))).name
