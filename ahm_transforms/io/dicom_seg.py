# SPDX-License-Identifier: Apache-2.0
"""Write segmentations of DICOM series as DICOM SEG, the form in which hospitals keep them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform
from pydicom.misc import is_dicom
from pydicom.uid import generate_uid

from ahm_transforms.io.segments import LONGEST_TEXT, Segment

__all__ = ["SaveDicomSegd", "write_dicom_seg"]

LOGGER = logging.getLogger(__name__)
NAME = "monai-ahm"
_SEXES = ("M", "F", "O")
# Old and anonymised files leave these out, where the standard wants them at least empty.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName", "SliceThickness"),
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID")


def write_dicom_seg(
    segmentation: NdarrayOrTensor,
    series_files: Sequence[str | Path],
    path: str | Path,
    segments: Sequence[Segment],
    *,
    series_description: str = "Automatic segmentation",
) -> Path:
    """Write the classes of one scan as binary segments that refer to the scan's own slices.

    Every segment is described, found or not; frames without a voxel are left out. Where no class has one, a single
    empty frame per segment, on the first slice, says that nothing was found. Patient and study are those of the scan,
    the texts are UTF-8. The file appears complete or not at all.

    Args:
        segmentation: class indices on the scan's own grid, as `load_image` reads it: [columns, rows, slices], or
            [columns, rows] of a radiograph and the like; 0 is background. The place of a `MetaTensor` is checked
            against the files.
        series_files: the slices, in the order in which they were loaded.
        path: file to write.
        segments: what classes 1, 2, ... are.
        series_description: of the new series.

    Raises:
        ImportError: highdicom is not installed.
        ValueError: the segmentation is of another grid than the files, or holds something else than class indices, or
            the files lack one of their UIDs.
    """
    path = Path(path)
    headers = _read_headers(series_files)
    segmentation = segmentation[..., None] if segmentation.ndim == 2 else segmentation
    _check_grid(segmentation, headers)
    frames = _class_indices(segmentation, len(segments)).transpose(2, 1, 0)
    content = _segmentation_object(frames, headers, segments, series_description)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        content.save_as(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class SaveDicomSegd(MapTransform):
    """Write ``<case_id>_seg.dcm`` for scans that come from DICOM files; pass over others.

    Put it behind `Invertd`, which takes the segmentation back to the scan's own grid.

    Args:
        keys: entry with class indices [1, columns, rows, slices], or [1, columns, rows] of a picture.
        output_dir: folder of the results.
        segments: what classes 1, 2, ... are, as `read_segments` returns them.
        files_key: entry with the list of the scan's files.
        id_key: entry with the case's id.
        separate_folder: whether each case has a folder of its own in ``output_dir``.
        allow_missing_keys: whether data without a case's id are passed over, as a server's are.

    Raises:
        KeyError: on call, without a case's id or its files.
        ImportError, ValueError: on call, as `write_dicom_seg`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        segments: Sequence[Segment],
        *,
        files_key: str = "files",
        id_key: str = "case_id",
        separate_folder: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"keys must name one entry, as there is one file per case, got {self.keys}.")
        self.output_dir = Path(output_dir)
        self.segments = list(segments)
        self.files_key = files_key
        self.id_key = id_key
        self.separate_folder = separate_folder

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write, and return ``data`` as it is."""
        if self.allow_missing_keys and self.id_key not in data:
            return dict(data)
        files = data[self.files_key]
        if is_dicom(files[0]):
            case_id, pred = str(data[self.id_key]), data[self.keys[0]]
            if len(pred) != 1:
                raise ValueError(f"{self.keys[0]} must be one channel of class indices, got shape {tuple(pred.shape)}.")
            folder = self.output_dir / case_id if self.separate_folder else self.output_dir
            folder.mkdir(parents=True, exist_ok=True)
            write_dicom_seg(pred[0], files, folder / f"{case_id}_seg.dcm", self.segments)
        return dict(data)


def _read_headers(files: Sequence[str | Path]) -> list[pydicom.Dataset]:
    """Return the headers, completed where highdicom or the standard wants more than the scanner wrote."""
    headers: list[pydicom.Dataset] = [pydicom.dcmread(name, stop_before_pixels=True) for name in files]
    for name, header in zip(files, headers, strict=True):
        if lacking := [tag for tag in _NEEDED if not header.get(tag)]:
            raise ValueError(f"{Path(name).name} has no {' and no '.join(lacking)}, to which a DICOM SEG must refer.")
        for tag in _PLACE:
            if tag in header and not header.get(tag):
                delattr(header, tag)
    lost = "ImagePositionPatient" in headers[0] and "FrameOfReferenceUID" not in headers[0]
    if lost:
        LOGGER.warning("The series has no frame of reference: the segmentation gets one of its own.")
    for header in headers:
        for name in _MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
        if header.PatientSex not in _SEXES:
            header.PatientSex = ""
        if lost:
            header.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(header.SeriesInstanceUID)])
    return headers


def _check_grid(segmentation: NdarrayOrTensor, headers: Sequence[pydicom.Dataset]) -> None:
    first = headers[0]
    wanted = (int(first.Columns), int(first.Rows), len(headers))
    if tuple(segmentation.shape) != wanted:
        raise ValueError(
            f"the segmentation must have the grid of the DICOM series, {wanted} (columns, rows, slices), got "
            f"{tuple(segmentation.shape)}: invert the preprocessing before it is written."
        )
    if not isinstance(segmentation, MetaTensor) or "ImagePositionPatient" not in first:
        return
    corners = [(0, 0), (wanted[0] - 1, 0), (0, wanted[1] - 1)]
    found_mm = np.array([_world_mm(segmentation, column, row) for column, row in corners])
    wanted_mm = np.array([_slice_mm(first, column, row) for column, row in corners])
    if np.abs(found_mm - wanted_mm).max() > 0.5 * min(map(float, first.PixelSpacing)):
        raise ValueError(
            "the segmentation does not lie where its DICOM series does: invert the preprocessing, and give the files "
            "in the order in which they were loaded."
        )


def _world_mm(image: MetaTensor, column: int, row: int) -> np.ndarray:
    """Return the place of a voxel of the first slice to the left, back and up; affines count to the right and front."""
    return (np.asarray(image.affine.cpu(), dtype=float) @ [column, row, 0, 1])[:3] * [-1, -1, 1]


def _slice_mm(header: pydicom.Dataset, column: int, row: int) -> np.ndarray:
    axes = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
    down_mm, right_mm = map(float, header.PixelSpacing)
    return np.array(header.ImagePositionPatient, dtype=float) + axes[0] * right_mm * column + axes[1] * down_mm * row


def _class_indices(segmentation: NdarrayOrTensor, count: int) -> np.ndarray:
    values = np.asarray(segmentation.detach().cpu() if isinstance(segmentation, torch.Tensor) else segmentation)
    indices = values.astype(np.int64)
    if (indices != values).any() or indices.min() < 0 or indices.max() > count:
        raise ValueError(
            f"the segmentation must hold the class indices 0 to {count}, got values from {values.min()} to "
            f"{values.max()}; make classes of channels with AsDiscreted(argmax=True) first."
        )
    return indices.astype(np.uint16)


def _segmentation_object(
    frames: np.ndarray, headers: Sequence[pydicom.Dataset], segments: Sequence[Segment], description: str
) -> Any:
    try:
        import highdicom as hd  # optional, and slow to import
    except ImportError as error:
        raise ImportError('DICOM SEG is written with highdicom: pip install "monai-ahm[dicom]".') from error
    release = metadata.version(NAME)
    found = bool(frames.any())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string")  # it would print the patient's name
        return hd.seg.Segmentation(
            source_images=headers if found else headers[:1],
            pixel_array=frames if found else frames[:1],
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(hd, segments, release),
            series_instance_uid=generate_uid(),
            series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=NAME,
            manufacturer_model_name=NAME,
            software_versions=release,
            device_serial_number=release,
            omit_empty_frames=found,
            series_description=description[:LONGEST_TEXT],
            content_label="SEGMENTATION",
            specific_character_set="ISO_IR 192",
        )


def _descriptions(hd: Any, segments: Sequence[Segment], release: str) -> list[Any]:
    family = hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
    algorithm = hd.AlgorithmIdentificationSequence(name=NAME, family=family, version=release)
    return [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=segment.name[:LONGEST_TEXT],
            segmented_property_category=hd.sr.CodedConcept(*segment.category),
            segmented_property_type=hd.sr.CodedConcept(*segment.type),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, segment in enumerate(segments, start=1)
    ]
