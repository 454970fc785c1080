# SPDX-License-Identifier: Apache-2.0
"""Name results by the case, not by the file they come from: folders of scans are often called after a patient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ImageMetaKey, MetaKeys

__all__ = ["NameByCased"]

_SUFFIX = ".nii.gz"  # MONAI takes it off; without one, it would take off what follows the last dot of an id


class NameByCased(MapTransform):
    """Let `SaveImaged` name the images of ``keys`` by the case's id, which may hold dots.

    Args:
        keys: entries with `MetaTensor` images.
        id_key: entry with the case's id.
        allow_missing_keys: whether data without a case's id are passed over, as a server's are.

    Raises:
        KeyError: on call, without a case's id or an image.
    """

    def __init__(self, keys: KeysCollection, id_key: str = "case_id", *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.id_key = id_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` whose images carry the new name."""
        result = dict(data)
        if self.allow_missing_keys and self.id_key not in result:
            return result
        for key in self.key_iterator(result):
            result[key] = result[key].clone()
            result[key].meta[ImageMetaKey.FILENAME_OR_OBJ] = f"{result[self.id_key]}{_SUFFIX}"
            # It tells where the scan's file keeps channels; MONAI would take a colour picture's mask for one line.
            result[key].meta[MetaKeys.ORIGINAL_CHANNEL_DIM] = "no_channel"
        return result
