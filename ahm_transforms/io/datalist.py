# SPDX-License-Identifier: Apache-2.0
"""Read a list of cases from a JSON file in the form of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import Case
from ahm_transforms.io.find import case_of_file

_PATIENT_KEYS = ("patient_id", "subject")


def read_datalist(
    path: str | Path, *, dataset_dir: str | Path | None = None, patient_pattern: str | None = None
) -> tuple[list[Case], list[Case] | None]:
    """Return the training cases and, where the file lists them, the validation cases.

    An entry is a path, or a dictionary with ``image`` (a path, or the sorted files of one DICOM series) and, if known,
    ``patient_id`` or ``subject``. Paths are relative to ``dataset_dir``, or else to the JSON file. ``test`` is left
    alone: it stays unseen.

    Raises:
        FileNotFoundError: the datalist does not exist.
        ValueError: it is no JSON, has no ``training`` list, or an entry names no image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"datalist {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"datalist {path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list) or not content["training"]:
        raise ValueError(f'datalist {path} needs a list "training" with at least one entry, as in the Decathlon.')
    root = Path(dataset_dir) if dataset_dir is not None else path.parent

    def cases(key: str) -> list[Case]:
        entries = content[key]
        return [_case(entry, f"{path}: {key}[{i}]", root, patient_pattern) for i, entry in enumerate(entries)]

    return cases("training"), cases("validation") if content.get("validation") else None


def _case(entry: Any, where: str, root: Path, patient_pattern: str | None) -> Case:
    entry = {"image": entry} if isinstance(entry, str) else entry
    image = entry.get("image") if isinstance(entry, dict) else None
    files: list[Any] = image if isinstance(image, list) else [image]
    if not files or not all(isinstance(name, str) for name in files):
        raise ValueError(f'{where} must be a path or a dictionary with "image", got {entry!r}.')
    paths = [root / name for name in files]
    patient = next((str(entry[key]) for key in _PATIENT_KEYS if key in entry), None)
    case = case_of_file(paths[0], root=root, patient_pattern=None if patient else patient_pattern)
    return {
        "image": str(paths[0]) if isinstance(image, str) else [str(name) for name in paths],
        "case_id": case["case_id"],
        "patient_id": patient or case["patient_id"],
    }
