# SPDX-License-Identifier: Apache-2.0
"""Read lists of cases in the form of the Medical Segmentation Decathlon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import PARTS, Case, Found, LeftOut, Source
from ahm_transforms.io.dicom import dicom_case, find_series
from ahm_transforms.io.dicom_headers import is_dicom
from ahm_transforms.io.find import case_of_file, visible_files
from ahm_transforms.io.json_file import read_json
from ahm_transforms.io.reader import is_nifti_or_picture
from ahm_transforms.io.spelling import nfc, on_disk

_PATIENT_KEYS = ("patient_id", "subject")
_LABEL_KEYS = ("label", "mask")

Datalist = str | Path | Mapping[str, Any]
"""A JSON file, or what it would hold."""


def read_datalist(
    datalist: Datalist,
    *,
    dataset_dir: str | Path | None = None,
    patient_pattern: str | None = None,
    cache_dir: str | Path | None = None,
) -> Source:
    """Return the cases of all lists and which of them are listed for validation and test.

    An entry is a path, or a dictionary with ``image`` (a path, the files of one DICOM series in any order, or the
    folder that holds one) and, if known, ``patient_id`` or ``subject``, ``label`` and ``mask``, which are handed on as
    they are. DICOM files say themselves who the patient is. Paths are relative to ``dataset_dir``, or else to the JSON
    file, if it is one. A ``test`` list without labels beside a ``training`` list with labels, as in the Decathlon, is
    passed over: it can test nothing. ``cache_dir`` remembers DICOM headers as it does for `find_cases`.

    Raises:
        FileNotFoundError: the datalist does not exist.
        ValueError: it is no JSON, has no ``training`` list, or an entry names no image.
    """
    name, content = datalist_name(datalist), _content(datalist)
    root = Path() if isinstance(datalist, Mapping) else Path(datalist).parent
    source = Source(Found(), {}, Path(dataset_dir) if dataset_dir is not None else root)
    labelled = {part: any("label" in entry for entry in _dicts(content.get(part))) for part in PARTS}
    for part in PARTS:
        if part == "test" and labelled["training"] and not labelled["test"]:
            continue
        for index, entry in enumerate(content.get(part) or []):
            _add(source, part, entry, f"{name}: {part}[{index}]", patient_pattern, cache_dir)
    return source


def datalist_name(datalist: Datalist) -> str:
    """Return how messages call it."""
    return "the lists given" if isinstance(datalist, Mapping) else str(datalist)


def _content(datalist: Datalist) -> Mapping[str, Any]:
    content = datalist if isinstance(datalist, Mapping) else read_json(Path(datalist), "datalist")
    if not isinstance(content, Mapping) or not isinstance(content.get("training"), list) or not content["training"]:
        raise ValueError(
            f'datalist {datalist_name(datalist)} needs a list "training" with at least one entry, as in the Decathlon.'
        )
    return content


def _dicts(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries or [] if isinstance(entry, dict)]


def _add(
    source: Source, part: str, entry: Any, where: str, patient_pattern: str | None, cache_dir: str | Path | None
) -> None:
    entry = {"image": entry} if isinstance(entry, str) else entry
    image = entry.get("image") if isinstance(entry, dict) else None
    files: list[Any] = image if isinstance(image, list) else [image]
    if not files or not all(isinstance(name, str) for name in files):
        raise ValueError(f'{where} must be a path or a dictionary with "image", got {entry!r}.')
    patient = next((nfc(str(entry[key])) for key in _PATIENT_KEYS if entry.get(key) is not None), None)
    paths = [on_disk(source.root / name) for name in files]
    if isinstance(image, str) and paths[0].is_dir():
        case = _series_in_folder(source, image, paths[0], cache_dir)
    elif len(paths) > 1 and any(is_dicom(path) for path in paths):
        case = _series_of_files(source, paths, cache_dir)
    elif not is_nifti_or_picture(paths[0]) and is_dicom(paths[0]):
        case = _single_file(source, image, paths[0])
    else:
        case = case_of_file(paths[0], root=source.root, patient_pattern=None if patient else patient_pattern)
        case["image"] = case["image"] if isinstance(image, str) else [str(path) for path in paths]
    if case is not None:
        case["patient_id"] = patient or case["patient_id"]
        source.found.cases.append(case | {key: entry[key] for key in _LABEL_KEYS if key in entry})
        if part != "training":
            source.listed[case["case_id"]] = part


def _series_in_folder(source: Source, image: str, folder: Path, cache_dir: str | Path | None) -> Case | None:
    files, _, bad = visible_files(folder)
    found = find_series(files, root=folder, cache_dir=cache_dir)
    found.bad += bad
    return _only_series(source, image, found)


def _series_of_files(source: Source, paths: Sequence[Path], cache_dir: str | Path | None) -> Case | None:
    found = find_series(paths, root=source.root, cache_dir=cache_dir)
    used = {name for case in found.cases for name in case["image"]}
    others = [path.name for path in paths if str(path) not in used]
    if used and others and not found.bad:
        found.bad.append(LeftOut(others[0], f"one of {len(others)} file(s) that are none of its slices"))
    return _only_series(source, f"{paths[0].name} and {len(paths) - 1} more", found)


def _single_file(source: Source, image: Any, path: Path) -> Case | None:
    try:
        return dicom_case(path) | {"image": str(path) if isinstance(image, str) else [str(path)]}
    except ValueError as error:
        source.found.bad.append(LeftOut(path.name, str(error).removeprefix(f"{path} ")))
        return None


def _only_series(source: Source, name: str, found: Found) -> Case | None:
    """Return the one DICOM series that was found; anything else is a bad case."""
    if len(found.cases) == 1 and not found.bad:
        return found.cases[0]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in [*found.bad, *found.left_out])
    source.found.bad.append(LeftOut(name, f"expected one DICOM series in it, found {len(found.cases)}. {reasons}"))
    return None
