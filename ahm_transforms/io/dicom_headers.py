# SPDX-License-Identifier: Apache-2.0
"""What is needed of the headers of DICOM files, which a folder may remember."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from ahm_transforms.io.remembered import Remembered

__all__ = ["Header", "is_dicom", "read_header", "read_headers", "short_hash"]

_TAGS = [
    "SOPClassUID",
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
    "PhotometricInterpretation",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
]
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # of a data set, little endian
_THICKNESS_TOLERANCE = 1.01


class Header(NamedTuple):
    """What is needed of a slice's header, in a tenth of the memory; what the file lacks is empty or 0.

    ``instance``, ``series``, ``study`` and ``patient`` are short hashes of the UIDs and of PatientID.
    """

    file: str
    syntax: str
    instance: str
    series: str
    study: str
    number: str
    patient: str
    modality: str
    frames: int
    rows: int
    columns: int
    bits: int
    samples: int
    shared_colours: bool
    spacing: tuple[float, ...]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    gap: float
    localizer: bool
    preamble: bool


def read_headers(
    paths: Sequence[Path], cache_dir: str | Path | None = None
) -> Iterator[tuple[Path, Header | Exception]]:
    """Give each file with its header, or with what `read_header` raised.

    Args:
        paths: the files.
        cache_dir: remembers the headers of a folder until a file in it changes, unless one of them is damaged.

    Raises:
        OSError: files cannot be written to ``cache_dir``.
    """
    memory = None if cache_dir is None else Remembered(cache_dir, "headers")
    for _, files in groupby(paths, lambda path: path.parent):
        yield from _headers_of_folder(list(files), memory)


def read_header(path: Path) -> Header:
    """Return the header of one file.

    Raises:
        InvalidDicomError: it is no DICOM.
        Exception: whatever pydicom stumbles over in a damaged header.
    """
    header, preamble = _read_dataset(path)

    def text(tag: str) -> str:
        return sys.intern(str(header.get(tag) or "").strip())  # an ID with a blank before it is the same ID

    def hashed(tag: str) -> str:
        found = text(tag)
        return sys.intern(short_hash(found)) if found else ""

    def count(tag: str) -> int:
        return int(header.get(tag) or 0)

    def numbers(tag: str, count: int) -> tuple[float, ...]:
        values = tuple(np.ravel(header.get(tag) or ()).astype(float).tolist())  # pydicom makes one number no list
        if len(values) not in (0, count):
            raise ValueError(f"{tag}: expected {count} numbers, got {len(values)}")
        return values

    kinds = header.get("ImageType") or ()
    return Header(
        file=str(path),
        syntax=sys.intern(str(header.file_meta.get("TransferSyntaxUID", ""))),
        instance=hashed("SOPInstanceUID"),
        series=hashed("SeriesInstanceUID"),
        study=hashed("StudyInstanceUID"),
        number=text("SeriesNumber"),
        patient=hashed("PatientID"),
        modality=text("Modality"),
        frames=count("NumberOfFrames"),
        rows=count("Rows"),
        columns=count("Columns"),
        bits=count("BitsAllocated"),
        samples=count("SamplesPerPixel"),
        shared_colours=text("PhotometricInterpretation") == "YBR_FULL_422",
        spacing=numbers("PixelSpacing", 2),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        gap=_stated_gap_mm(header),
        localizer="LOCALIZER" in kinds,
        preamble=preamble,
    )


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, with or without preamble, whose header can be read."""
    try:
        _read_dataset(path)
    except Exception:  # pydicom raises whatever a damaged header makes it stumble over
        return False
    return True


def short_hash(text: str) -> str:
    """Return twelve hexadecimal digits that stand for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _headers_of_folder(paths: Sequence[Path], memory: Remembered | None) -> Iterator[tuple[Path, Header | Exception]]:
    case = {"image": [str(path) for path in paths]}
    kept = None if memory is None else memory.read(case)
    if kept is not None:
        yield from ((path, _from_json(path, values)) for path, values in zip(paths, kept["headers"], strict=True))
        return
    headers: list[Header | Exception] = []
    for path in paths:
        headers.append(_try_to_read(path))
        yield path, headers[-1]
    if memory is not None and all(isinstance(header, Header | InvalidDicomError) for header in headers):
        memory.write(case, {"headers": [header[1:] if isinstance(header, Header) else None for header in headers]})


def _try_to_read(path: Path) -> Header | Exception:
    try:
        return read_header(path)
    except Exception as error:  # pydicom raises whatever a damaged header makes it stumble over
        return error


def _from_json(path: Path, values: Sequence[Any] | None) -> Header | Exception:
    if values is None:
        return InvalidDicomError()
    texts = (sys.intern(value) if isinstance(value, str) else value for value in values)
    return Header._make([str(path), *(tuple(value) if isinstance(value, list) else value for value in texts)])


def _read_dataset(path: Path) -> tuple[pydicom.Dataset, bool]:
    """Return the tags, and whether the file has a preamble; one that is no DICOM raises `InvalidDicomError`."""
    try:
        return pydicom.dcmread(path, specific_tags=_TAGS, stop_before_pixels=True), True
    except InvalidDicomError:
        with path.open("rb") as file:
            if file.read(2) not in _FIRST_GROUPS:
                raise
        try:
            dataset = pydicom.dcmread(path, specific_tags=_TAGS, stop_before_pixels=True, force=True)
            known = "SOPClassUID" in dataset or "Rows" in dataset
        except Exception:  # any binary file may begin like this
            known = False
        if not known:
            raise
        return dataset, False


def _stated_gap_mm(header: pydicom.Dataset) -> float:
    """Return how far an MR scanner says its slices lie apart, from centre to centre, or 0.

    In CT and in images derived from others the tag is often wrong. Some scanners write what is between two slices
    instead, which is less than the slices are thick.
    """
    if header.get("Modality") != "MR" or "DERIVED" in (header.get("ImageType") or ()):
        return 0.0
    try:
        gap, thickness = (abs(float(header.get(tag) or 0)) for tag in ("SpacingBetweenSlices", "SliceThickness"))
    except (TypeError, ValueError):  # nothing else needs them
        return 0.0
    return gap if 0 < thickness < _THICKNESS_TOLERANCE * gap else 0.0
