# SPDX-License-Identifier: Apache-2.0
"""Find the images in a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ahm_transforms.io._types import Case, Found, LeftOut, LeftOutCase, lines_by_reason
from ahm_transforms.io.check import case_name
from ahm_transforms.io.dicom import dicom_case, find_series
from ahm_transforms.io.dicom_headers import short_hash
from ahm_transforms.io.reader import NIFTI_SUFFIXES, has_suffix, is_nifti_or_picture
from ahm_transforms.io.spelling import nfc

# Label maps beside the images (Decathlon, nnU-Net and others) would otherwise be trained on as if they were images.
_LABEL_FOLDERS = re.compile(r"(label|mask|seg|segmentation|annotation|gt|ground_?truth)s?(tr|ts)?", re.IGNORECASE)
_OTHER_FORMATS = (".hdr", ".mgh", ".mgz", ".mha", ".mhd", ".nhdr", ".nrrd")  # the .img beside .hdr may be DICOM, too
LABEL_FOLDER = "a folder of labels by its name; pass it as dataset_dir if it is not"


def find_cases(
    folder: str | Path,
    *,
    patient_pattern: str | None = None,
    pictures: bool = False,
    cache_dir: str | Path | None = None,
) -> Found:
    """Return every NIfTI file, 2D picture and DICOM series below ``folder``.

    Args:
        folder: where to look; sub-folders count, hidden files and folders of labels do not.
        patient_pattern: regular expression that finds the patient in a file's path relative to ``folder``; its first
            group, or else the whole match, is the patient. ACDC's ``patient002_frame01.nii.gz`` wants
            ``(patient\\d+)``. Without it every file is a patient of its own. DICOM files say it themselves.
        pictures: whether DICOM images without a position in space (radiographs, mammograms, ultrasound) are cases, each
            by itself; otherwise they are left out.
        cache_dir: folder that remembers DICOM headers, which are read again once a file beside them changes.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that can be read.
        OSError: files cannot be written to ``cache_dir``.
        ValueError: the pattern does not match a file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {folder} is not a folder.")
    files, left_out, bad = visible_files(root)
    images = [path for path in files if is_nifti_or_picture(path)]
    found = find_series(sorted(set(files) - set(images)), root=root, pictures=pictures, cache_dir=cache_dir)
    found.cases += [case_of_file(path, root=root, patient_pattern=patient_pattern) for path in images]
    found.left_out += left_out + _other_formats(files)
    found.bad += bad
    if not found.cases and not found.bad:
        raise FileNotFoundError(
            f"dataset_dir {folder} holds no image: expected NIfTI (.nii, .nii.gz), PNG, TIFF, JPEG or DICOM series, "
            f"in it or in its sub-folders.{lines_by_reason(found.left_out)}"
        )
    return found


def _other_formats(files: Sequence[Path]) -> list[LeftOut]:
    """Return one line on the volumes that only other programs read."""
    counts = Counter(path.suffix.lower() for path in files if has_suffix(path, _OTHER_FORMATS))
    name = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    return [LeftOutCase(name, "not read here; convert to NIfTI", "other-formats")] if counts else []


def find_inputs(path: str | Path, *, patient_pattern: str | None = None, pictures: bool = False) -> Found:
    """Return what to predict on: all of a folder, or one NIfTI file, 2D picture or single-frame DICOM file.

    Only DICOM headers are opened. What is damaged or would get a case_id twice is in ``bad``, localizers and the like
    are in ``left_out``: the others can go on.

    Args:
        path: a folder or a file.
        patient_pattern: as for `find_cases`.
        pictures: as for `find_cases`.

    Raises:
        FileNotFoundError: ``path`` does not exist, or the folder holds nothing that can be read.
        ValueError: the file is no image, or the pattern does not match.
    """
    path = Path(path)
    if path.is_dir():
        return _without_twins(find_cases(path, patient_pattern=patient_pattern, pictures=pictures))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder or an image.")
    if is_nifti_or_picture(path):
        return Found([case_of_file(path, root=path.parent, patient_pattern=patient_pattern)])
    return Found([dicom_case(path)])


def case_of_file(path: Path, *, root: Path, patient_pattern: str | None = None) -> Case:
    """Return the case of one file; its id is the path below ``root`` without suffix, joined by underscores (NFC)."""
    relative = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    name = next((path.name[: -len(end)] for end in NIFTI_SUFFIXES[::-1] if has_suffix(path, [end])), path.stem)
    case_id = nfc("_".join((*relative.parent.parts, name)))
    return {"image": str(path), "case_id": case_id, "patient_id": _patient(relative, case_id, patient_pattern)}


def _patient(relative: Path, case_id: str, pattern: str | None) -> str:
    if pattern is None:
        return case_id
    try:
        match = re.search(nfc(pattern), nfc(relative.as_posix()))
    except re.error as error:
        raise ValueError(f"patient_pattern {pattern!r} is no regular expression: {error}.") from error
    if match is None:
        raise ValueError(f"patient_pattern {pattern!r} finds no patient in {relative.as_posix()!r}.")
    return match.group(1) if match.re.groups else match.group(0)


def visible_files(root: Path) -> tuple[list[Path], list[LeftOut], list[LeftOut]]:
    """Return the files below ``root``, sorted, without hidden ones and folders of labels; those folders; what is bad.

    A folder that links lead to as well counts once, and links may lead in circles. A folder that cannot be read is bad.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    errors: list[OSError] = []
    seen: set[str] = set()
    tops = [str(root)]
    for top in tops:  # links join at the end: what they lead to is called by its own place if that is below root
        for folder, names, members in os.walk(top, onerror=errors.append):
            if os.path.realpath(folder) in seen:
                names.clear()
                continue
            seen.add(os.path.realpath(folder))
            labels = [name for name in names if _LABEL_FOLDERS.fullmatch(name)]
            left_out += [_left_folder(Path(folder) / name, root, LABEL_FOLDER) for name in labels]
            names[:] = sorted(name for name in names if name not in labels and not name.startswith("."))
            tops += [path for name in names if os.path.islink(path := os.path.join(folder, name))]
            files += [Path(folder) / member for member in members if not member.startswith(".")]
    bad = [_left_folder(Path(error.filename), root, f"cannot be read: {error.strerror}") for error in errors]
    return sorted(files), left_out, bad


def _left_folder(folder: Path, root: Path, reason: str) -> LeftOut:
    where = folder.relative_to(root).as_posix()
    return LeftOutCase(f"{where}/", reason, f"folder-{short_hash(where)}")


def _without_twins(found: Found) -> Found:
    """Keep the first of the cases with the same id: the results of one would overwrite the other's."""
    seen: set[str] = set()
    for case in list(found.cases):
        if case["case_id"] in seen:
            found.cases.remove(case)
            found.bad.append(LeftOut(case_name(case), f"another image has the case_id {case['case_id']}"))
        seen.add(case["case_id"])
    return found
