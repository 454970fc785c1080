# SPDX-License-Identifier: Apache-2.0
"""Builders of small images on disk, and the folder of real ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
# rows and columns turned by 20 degrees about x and 10 about z
OBLIQUE = (0.98480775, 0.17364818, 0.0, -0.16317591, 0.92541658, 0.34202014)
PATIENT_NAME, PATIENT_ID = "Doe^Jane", "HOSPITAL-4711"


def real_data(name: str) -> Path:
    """Return a folder or file of the real data, or skip the test."""
    root = Path(os.environ.get("AHM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"needs the real data {name}: set AHM_DATA to the folder that holds it")
    return root / name


def write_nifti(path: Path, shape: Sequence[int] = (12, 13, 14), affine: np.ndarray | None = None) -> np.ndarray:
    """Write noise as int16 and return it."""
    values = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return values


def write_series(
    folder: Path,
    *,
    slices: int = 6,
    size: tuple[int, int] = (16, 20),
    orientation: Sequence[float] = AXIAL,
    gap_mm: float = 2.0,
    reverse_names: bool = False,
    skip: Sequence[int] = (),
    **tags: Any,
) -> np.ndarray:
    """Write one MR series of (rows, columns) slices and return its stored values [slices, rows, columns]."""
    values = np.random.default_rng(slices).integers(0, 500, (slices, *size)).astype(np.int16)
    normal = np.cross(orientation[:3], orientation[3:])
    series = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()} | tags
    for index in range(slices):
        position = np.array([-30.0, 12.0, 5.0]) + normal * gap_mm * index
        number = slices - index if reverse_names else index
        if index not in skip:
            geometry = {
                "ImagePositionPatient": position.round(6).tolist(),
                "ImageOrientationPatient": list(orientation),
            }
            write_slice(folder / f"IM{number:04d}", values[index], **(geometry | series))
    return values


def write_slice(path: Path, values: np.ndarray, **tags: Any) -> Path:
    """Write one DICOM file; ``tags`` by keyword, among them ``TransferSyntaxUID``."""
    syntax = tags.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
    meta.TransferSyntaxUID = syntax
    file = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
    defaults = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientName": PATIENT_NAME,
        "PatientID": PATIENT_ID,
        "Modality": "MR",
        "SeriesNumber": 3,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "Rows": values.shape[0],
        "Columns": values.shape[1],
        "PixelSpacing": [0.8, 1.1],
        "SliceThickness": 2.0,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": values.astype("<i2").tobytes(),
    }
    for name, value in (defaults | tags).items():
        if value is not None:
            setattr(file, name, value)
    if syntax.is_compressed:
        file["PixelData"].is_undefined_length = True
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path)
    return path


def assert_same_marks(seg: Any, image: Any) -> int:
    """A DICOM SEG of highdicom and a NIfTI file mark the same voxels; return how many.

    DICOM counts to the left and back, NIfTI to the right and front.
    """
    volume = seg.get_volume(combine_segments=True)
    to_nifti = np.linalg.inv(image.affine) @ np.diag([-1, -1, 1, 1]) @ volume.affine
    index = np.argwhere(volume.array > 0)
    places = index @ to_nifti[:3, :3].T + to_nifti[:3, 3]
    nearest = places.round().astype(int)
    assert np.abs(places - nearest).max() < 0.02
    rebuilt = np.zeros(image.shape, np.uint8)
    rebuilt[tuple(nearest.T)] = volume.array[tuple(index.T)]
    np.testing.assert_array_equal(rebuilt, np.asarray(image.dataobj))
    return len(index)


def write_radiograph(path: Path, values: np.ndarray, **tags: Any) -> Path:
    """Write one DICOM image without a position in space, 12 bits unless told otherwise."""
    stated = {"Modality": "DX", "SOPClassUID": DigitalXRayImageStorageForPresentation, "PixelRepresentation": 0}
    stated |= {"BitsStored": 12, "HighBit": 11, "SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    stated |= {"SliceThickness": None, "SeriesNumber": 1}
    return write_slice(path, values, **(stated | tags))
