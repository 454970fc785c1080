# SPDX-License-Identifier: Apache-2.0
"""Group DICOM files into series and sort their slices; only headers are read here."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ahm_transforms.io._types import Case, Found, LeftOut

_TAGS = [
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "SeriesNumber",
    "PatientID",
    "Modality",
    "ImageType",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "SamplesPerPixel",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
]
_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_ORIENTATION_TOLERANCE = 1e-3
_GAP_FACTOR = 1.5  # a gap this many times the usual one means that a slice is missing


def find_series(paths: Iterable[Path], *, root: Path) -> Found:
    """Return one case for each DICOM series among ``paths``, its files sorted along the slice normal.

    Files without the DICOM preamble are passed over. Localizers, single slices, multi-frame files and series that hold
    several volumes are left out; mixed sizes and missing slices are bad. Names in the report are the series number and
    the folder below ``root``. ``patient_id`` and ``case_id`` are short hashes of PatientID and SeriesInstanceUID:
    pseudonyms, which somebody who holds a list of patients could still match.
    """
    found = Found()
    series: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in paths:
        try:
            header = pydicom.dcmread(path, specific_tags=_TAGS, stop_before_pixels=True)
        except InvalidDicomError:
            continue
        except Exception as error:  # pydicom raises whatever a damaged header makes it stumble over
            found.bad.append(LeftOut(path.relative_to(root).as_posix(), f"unreadable DICOM header: {error}"))
            continue
        # the same slice stored twice (a copy of the study, say) counts once
        series[str(header.get("SeriesInstanceUID", ""))].setdefault(str(header.get("SOPInstanceUID", path)), header)
    series.pop("", None)  # DICOMDIR and the like
    for uid, slices in series.items():
        _add_series(found, uid, list(slices.values()), root)
    return found


def dicom_case(path: Path) -> Case:
    """Return the case of one single-frame DICOM file, whatever its series holds besides.

    Raises:
        ValueError: it is no DICOM file, or holds no image or several frames.
    """
    try:
        header = pydicom.dcmread(path, specific_tags=_TAGS, stop_before_pixels=True)
    except Exception as error:  # pydicom raises whatever a damaged header makes it stumble over
        raise ValueError(f"{path} cannot be read: expected NIfTI, PNG, TIFF, JPEG or DICOM. {error}") from error
    reason = _not_an_image([header])
    if reason is None and _is_truncated(header):
        reason = "the file ends early"
    if reason:
        raise ValueError(f"{path} cannot be used: {reason}.")
    uid = str(header.get("SOPInstanceUID", path.name))
    return {**_case(uid, [header]), "case_id": f"image-{short_hash(uid)}"}


def short_hash(text: str) -> str:
    """Return twelve hexadecimal digits that stand for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def transfer_syntax(path: str | Path) -> str:
    """Return the name of a DICOM file's transfer syntax, or an empty text for any other file."""
    try:
        return str(pydicom.dcmread(path, specific_tags=[], stop_before_pixels=True).file_meta.TransferSyntaxUID.name)
    except (InvalidDicomError, OSError, AttributeError):
        return ""


def _add_series(found: Found, uid: str, slices: list[Any], root: Path) -> None:
    folder = Path(slices[0].filename).parent.relative_to(root).as_posix()
    name = f"series {slices[0].get('SeriesNumber', '?')} in {folder}"
    if reason := _not_a_volume(slices):
        found.left_out.append(LeftOut(name, reason))
        return
    slices = [slices[index] for index in np.argsort(_positions_mm(slices), kind="stable")]
    if reason := _damage(slices):
        found.bad.append(LeftOut(name, reason))
        return
    found.cases.append(_case(uid, slices))


def _case(uid: str, slices: Sequence[Any]) -> Case:
    patient = slices[0].get("PatientID") or slices[0].get("StudyInstanceUID") or uid
    return {
        "image": [str(header.filename) for header in slices],
        "case_id": f"series-{short_hash(uid)}",
        "patient_id": f"patient-{short_hash(str(patient))}",
    }


def _not_an_image(slices: Sequence[Any]) -> str | None:
    if any("Rows" not in header for header in slices):
        return f"holds no image slices (modality {slices[0].get('Modality', '?')})"
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in slices):
        return "multi-frame (enhanced) DICOM; convert it to NIfTI"
    return None


def _not_a_volume(slices: Sequence[Any]) -> str | None:
    if reason := _not_an_image(slices):
        return reason
    if any("LOCALIZER" in (header.get("ImageType") or "") for header in slices):
        return "a localizer"
    if len(slices) == 1:
        return "a single slice"
    if any(not header.get(tag) for header in slices for tag in ("ImagePositionPatient", "ImageOrientationPatient")):
        return "slices without position: projection images or screen captures"
    orientations = np.array([header.ImageOrientationPatient for header in slices], dtype=float)
    if np.ptp(orientations, axis=0).max() > _ORIENTATION_TOLERANCE:
        return "mixed slice orientations: a localizer or several stacks"
    if len(np.unique(_positions_mm(slices).round(3))) < len(slices):
        return "several images at one position (echoes, phases or directions): more than one volume"
    return None


def _positions_mm(slices: Sequence[Any]) -> np.ndarray:
    orientation = np.asarray(slices[0].ImageOrientationPatient, dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    return np.array([header.ImagePositionPatient for header in slices], dtype=float) @ normal


def _damage(slices: Sequence[Any]) -> str | None:
    sizes = sorted({(int(header.Columns), int(header.Rows)) for header in slices})
    if len(sizes) > 1:
        return f"slices of mixed sizes: {', '.join(f'{w} x {h}' for w, h in sizes)}"
    spacings = {tuple(map(float, header.get("PixelSpacing") or ())) for header in slices}
    if len(spacings) > 1:
        return f"slices of mixed pixel spacings: {sorted(spacings)} mm"
    gaps = np.diff(_positions_mm(slices))
    usual = float(np.median(gaps))
    wide = np.flatnonzero(gaps > _GAP_FACTOR * usual)
    if len(wide):
        where = ", ".join(f"{gaps[i]:.2f} mm after slice {i + 1}" for i in wide[:3])
        return f"slices are missing: gaps of {where}, where slices are {usual:.2f} mm apart"
    short = [header for header in slices if _is_truncated(header)]
    return f"{len(short)} file(s) end early, such as {Path(short[0].filename).name}" if short else None


def _is_truncated(header: Any) -> bool:
    """Whether the file is shorter than its own uncompressed pixels (ITK fills the rest with zeros, silently)."""
    if header.file_meta.get("TransferSyntaxUID") not in _UNCOMPRESSED:
        return False
    samples = int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel") or 1)
    return Path(header.filename).stat().st_size < samples * int(header.get("BitsAllocated") or 16) // 8
