# SPDX-License-Identifier: Apache-2.0
"""Group DICOM files into series and sort their slices; only headers are read here."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ahm_transforms.io._types import Case, Found, LeftOutCase
from ahm_transforms.io.dicom_headers import Header, read_header, read_headers, short_hash
from ahm_transforms.io.progress import with_bar

LOGGER = logging.getLogger(__name__)

_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_ORIENTATION_TOLERANCE = 1e-3
_GAP_FACTOR = 1.5  # a gap this many times the usual one means that a slice is missing
_UNEVEN = 0.25  # of the mean gap: how far a slice may lie from where one spacing puts it
_SHIFTED = 0.25  # of a pixel: how far a slice may lie beside the line through the first one along the normal
_SPARSE = 0.6  # of the gap found: a smaller one in the header means that slices are missing between all others
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_PREAMBLE_BYTES = 132
_NO_PREAMBLE = (
    "no DICOM preamble (128 bytes and DICM); write such a file anew with dcmtk's dcmconv, or with pydicom: "
    "dcmread(file, force=True), file_meta.TransferSyntaxUID where it is missing, "
    "save_as(file, enforce_file_format=True)"
)


def find_series(
    paths: Sequence[Path], *, root: Path, pictures: bool = False, cache_dir: str | Path | None = None
) -> Found:
    """Return one case for each DICOM series among ``paths``, its files sorted along the slice normal.

    With ``pictures``, images without a position in space (radiographs, mammograms, ultrasound) are cases, each by
    itself. Files that are no DICOM are passed over; empty ones among slices and those called .dcm, .dicom or .ima are
    bad. Localizers, single slices, multi-frame files and series that hold several volumes are left out; mixed sizes,
    missing slices, uneven distances, slices that are shifted against each other (gantry tilt) or of several patients,
    and files without preamble or SeriesInstanceUID are bad. Names in the report are the series number and the folder
    below ``root``. ``patient_id`` and ``case_id`` are short hashes of PatientID and SeriesInstanceUID: pseudonyms which
    somebody who holds a list of patients could still match. What is bad or left out has a ``case_id`` of that kind too.
    A warning names each series without PixelSpacing, of which pixels count as 1 mm; those of pictures always do.
    ``cache_dir`` remembers the headers of a folder until a file in it changes.
    """
    found = Found()
    series: dict[str, dict[str, Header]] = defaultdict(dict)
    others: list[Path] = []
    for path, header in with_bar(read_headers(paths, cache_dir), "Reading DICOM headers", len(paths)):
        if isinstance(header, InvalidDicomError):
            others.append(path)
            continue
        if isinstance(header, Exception):
            reason = str(header).replace(f"{path.parent}{os.sep}", "")
            found.bad.append(_left_out_file(path, root, f"unreadable DICOM header: {reason}"))
            continue
        if not header.series and not header.rows and header.preamble:
            continue  # DICOMDIR and the like
        # the same slice stored twice (a copy of the study, say) counts once
        uid = header.series or short_hash(_below(root, path.parent))
        first = series[uid].setdefault(header.instance or str(path), header)
        if pictures and first is not header and not header.position:
            found.left_out.append(_left_out_file(path, root, "another file has its SOPInstanceUID"))
    for uid, slices in series.items():
        if pictures and not any(header.position for header in slices.values()):
            _add_pictures(found, list(slices.values()), root)
        else:
            _add_series(found, uid, list(slices.values()), root)
    names = {_kind_of_name(Path(header.file)) for slices in series.values() for header in slices.values()}
    found.bad += [_left_out_file(path, root, reason) for path in others if (reason := _lost(path, names))]
    return found


def dicom_case(path: Path) -> Case:
    """Return the case of one single-frame DICOM file, whatever its series holds besides.

    Raises:
        ValueError: it is no DICOM file, or holds no image or several frames.
    """
    try:
        header = read_header(path)
    except Exception as error:  # pydicom raises whatever a damaged header makes it stumble over
        raise ValueError(f"{path} cannot be read: expected NIfTI, PNG, TIFF, JPEG or DICOM. {error}") from error
    if reason := _damaged_file(header) or _not_an_image([header]):
        raise ValueError(f"{path} cannot be used: {reason}.")
    _warn_without_spacing(header, path.name)
    return _picture(header, path.name) | {"image": [header.file]}


def transfer_syntax(path: str | Path) -> str:
    """Return the name of a DICOM file's transfer syntax, or an empty text for any other file."""
    try:
        return str(pydicom.dcmread(path, specific_tags=[], stop_before_pixels=True).file_meta.TransferSyntaxUID.name)
    except (InvalidDicomError, OSError, AttributeError):
        return ""


def _below(root: Path, path: Path) -> str:
    """Return how reports call a file or folder; the lists of a datalist may hold some from elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _left_out_file(path: Path, root: Path, reason: str) -> LeftOutCase:
    name = _below(root, path)
    return LeftOutCase(name, reason, f"image-{short_hash(name)}")


def _kind_of_name(path: Path) -> tuple[Path, str]:
    """Return folder and suffix; what follows the last dot of a UID is none."""
    suffix = path.suffix.lower()
    return path.parent, "" if suffix[1:].isdigit() else suffix


def _lost(path: Path, names: Collection[tuple[Path, str]]) -> str:
    """Return why a file ought to be DICOM: its suffix says so, or it is empty and named as slices beside it."""
    named = path.suffix.lower() in DICOM_SUFFIXES
    with path.open("rb") as file:
        if any(file.read(_PREAMBLE_BYTES)):
            return "no DICOM, although its name says so" if named else ""
    return "empty, or zeros where DICOM begins" if named or _kind_of_name(path) in names else ""


def _add_series(found: Found, uid: str, slices: list[Header], root: Path) -> None:
    scouts = [header for header in slices if header.localizer]
    if len(scouts) < len(slices):
        slices = [header for header in slices if not header.localizer]
        found.left_out += [_left_out_file(Path(scout.file), root, "a localizer within a series") for scout in scouts]
    folder = _below(root, Path(slices[0].file).parent)
    name, case_id = f"series {slices[0].number or '?'} in {folder}", f"series-{uid}"
    if reason := _not_a_series(slices):
        found.bad.append(LeftOutCase(name, reason, case_id))
        return
    if reason := _not_a_volume(slices):
        found.left_out.append(LeftOutCase(name, reason, case_id))
        return
    slices = [slices[index] for index in np.argsort(_positions_mm(slices), kind="stable")]
    if reason := _damage(slices):
        found.bad.append(LeftOutCase(name, reason, case_id))
        return
    _warn_without_spacing(slices[0], name)
    found.cases.append(_case(uid, slices))


def _warn_without_spacing(header: Header, name: str) -> None:
    if header.position and not header.spacing:
        LOGGER.warning(
            "%s has no PixelSpacing: 1 mm is assumed. Where that is wrong, write the tag, or convert to NIfTI with the "
            "right spacing.",
            name,
        )


def _add_pictures(found: Found, headers: Sequence[Header], root: Path) -> None:
    for header in headers:
        path = Path(header.file)
        if reason := _damaged_file(header):
            found.bad.append(_left_out_file(path, root, reason))
        elif reason := _not_an_image([header]) or ("a localizer" if header.localizer else None):
            found.left_out.append(_left_out_file(path, root, reason))
        else:
            found.cases.append(_picture(header, _below(root, path)))


def _picture(header: Header, name: str) -> Case:
    uid = header.instance or short_hash(name)
    return {
        "image": header.file,
        "case_id": f"image-{uid}",
        "patient_id": f"patient-{header.patient or header.study or header.series or uid}",
    }


def _damaged_file(header: Header) -> str | None:
    if not header.preamble:
        return _NO_PREAMBLE
    return "the file ends early" if _is_truncated(header) else None


def _case(uid: str, slices: Sequence[Header]) -> Case:
    patient = max(header.patient for header in slices)  # the only one, but some slices may lack it
    return {
        "image": [header.file for header in slices],
        "case_id": f"series-{uid}",
        "patient_id": f"patient-{patient or slices[0].study or uid}",
    }


def _not_a_series(slices: Sequence[Header]) -> str | None:
    without = sum(not header.preamble for header in slices)
    if without:
        return f"{without} of {len(slices)} file(s) with {_NO_PREAMBLE}"
    if not slices[0].series:
        return f"{len(slices)} file(s) without SeriesInstanceUID, which says what belongs together"
    patients = len({header.patient for header in slices} - {""})
    if patients > 1:
        return f"slices of {patients} patients (PatientID) in one series"
    return None


def _not_an_image(slices: Sequence[Header]) -> str | None:
    if not all(header.rows and header.modality != "SEG" for header in slices):
        return f"holds no image slices (modality {slices[0].modality or '?'})"
    if any(header.frames > 1 for header in slices):
        return "multi-frame (enhanced) DICOM; convert it to NIfTI"
    return None


def _not_a_volume(slices: Sequence[Header]) -> str | None:
    if reason := _not_an_image(slices):
        return reason
    if any(header.localizer for header in slices):
        return "a localizer"
    if len(slices) == 1:
        return "a single slice"
    if not all(header.position and header.orientation for header in slices):
        return "slices without position: projection images or screen captures"
    orientations = np.array([header.orientation for header in slices])
    if np.ptp(orientations, axis=0).max() > _ORIENTATION_TOLERANCE:
        return "mixed slice orientations: a localizer or several stacks"
    if len(np.unique(_positions_mm(slices).round(3))) < len(slices):
        return "several images at one position (echoes, phases or directions): more than one volume"
    return None


def _normal(slices: Sequence[Header]) -> np.ndarray:
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    return normal / (np.linalg.norm(normal) or 1.0)


def _positions_mm(slices: Sequence[Header]) -> np.ndarray:
    return np.array([header.position for header in slices]) @ _normal(slices)


def _shift_mm(slices: Sequence[Header]) -> float:
    """Return how far slices lie beside the line through the first one along the normal, where the affine puts them."""
    way = np.array([header.position for header in slices]) - slices[0].position
    normal = _normal(slices)
    return float(np.linalg.norm(way - np.outer(way @ normal, normal), axis=1).max())


def _damage(slices: Sequence[Header]) -> str | None:
    sizes = sorted({(header.columns, header.rows) for header in slices})
    if len(sizes) > 1:
        return f"slices of mixed sizes: {', '.join(f'{w} x {h}' for w, h in sizes)}"
    if len({header.samples or 1 for header in slices}) > 1:
        return "grey and colour slices in one series"
    spacings = {header.spacing for header in slices}
    if len(spacings) > 1:
        return f"slices of mixed pixel spacings: {sorted(spacings)} mm"
    positions = _positions_mm(slices)
    gaps = np.diff(positions)
    usual = float(np.median(gaps))
    wide = np.flatnonzero(gaps > _GAP_FACTOR * usual)
    if len(wide):
        where = ", ".join(f"{gaps[i]:.2f} mm after slice {i + 1}" for i in wide[:3])
        return f"slices are missing: gaps of {where}, where slices are {usual:.2f} mm apart"
    off = np.abs(positions - np.linspace(positions[0], positions[-1], len(slices))).max()
    if off > _UNEVEN * gaps.mean():
        told = f"uneven slice distances: {gaps.min():.2f} to {gaps.max():.2f} mm"
        return f"{told}, with one spacing for all, slices would lie up to {off:.1f} mm off"
    stated = max(header.gap for header in slices)
    if 0 < stated < _SPARSE * usual:
        return f"slices are missing: they are {usual:.2f} mm apart, SpacingBetweenSlices says {stated:.2f} mm"
    shift = _shift_mm(slices)
    if shift > _SHIFTED * min(slices[0].spacing or (1.0,)):
        told = f"slices are shifted against each other by up to {shift:.1f} mm, as by a tilted gantry"
        return f"{told}; dcm2niix corrects a tilt and writes the series as NIfTI"
    short = [header for header in slices if _is_truncated(header)]
    return f"{len(short)} file(s) end early, such as {Path(short[0].file).name}" if short else None


def _is_truncated(header: Header) -> bool:
    """Whether the file is shorter than its own uncompressed pixels (ITK fills the rest with zeros, silently)."""
    if header.syntax not in _UNCOMPRESSED:
        return False
    per_pixel = 2 if header.shared_colours else header.samples or 1  # two pixels share their colour in YBR_FULL_422
    samples = header.rows * header.columns * per_pixel
    return Path(header.file).stat().st_size < samples * (header.bits or 16) // 8
