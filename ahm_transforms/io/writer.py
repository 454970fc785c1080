# SPDX-License-Identifier: Apache-2.0
"""Write results in the shape that the scan's file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.data import NibabelWriter

from ahm_transforms.io.reader import FILE_AXES, NIFTI_SUFFIXES

__all__ = ["FileShapeWriter", "writer_for"]


class FileShapeWriter(NibabelWriter):
    """Write NIfTI with as many spatial axes as the scan's file has: MONAI drops those of length 1 at the end."""

    data_obj: Any

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        """Take the affine and, from ``load_image``, the number of axes."""
        super().set_metadata(meta_dict, resample, **options)
        while self.data_obj.ndim < (meta_dict or {}).get(FILE_AXES, 0):
            self.data_obj = self.data_obj[..., None]


def writer_for(output_ext: str) -> type[FileShapeWriter] | None:
    """Return the ``writer`` of `SaveImaged` for files of this suffix; None lets MONAI choose one."""
    return FileShapeWriter if output_ext in NIFTI_SUFFIXES else None
