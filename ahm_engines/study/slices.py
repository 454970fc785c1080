# SPDX-License-Identifier: Apache-2.0
"""Studies of slices: volumes with label maps become 2D cases that show foreground or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from ahm_engines.files import write_json
from ahm_engines.study.settings import Study
from ahm_transforms.io import slice_options, write_slices

__all__ = ["with_slices"]

# entries of data that are about the volumes
CUTTING = ("dataset_dir", "labels_dir", "label_values", "patient_pattern", "skip_bad")
SOURCE = "source.json"


def with_slices(study: Study, folder: Path) -> Study:
    """Return a study of the axial slices of its volumes if ``data.slices`` says so, else the study itself.

    The slices, see `write_slices`, are written into ``<folder>/slices`` once; a run that is stopped meanwhile leaves
    none. A slice belongs to the patient of its volume.

    Args:
        study: a classification with the two classes of slices, without foreground and with it.
        folder: of the study.

    Raises:
        ValueError: another task, a datalist, or slices of other volumes in ``folder``.
        BadCasesError, FileNotFoundError: as `write_slices`.
    """
    data = study.data
    if not data.get("slices"):
        return study
    if study.task != "classification" or data.get("datalist") or not data.get("dataset_dir"):
        raise ValueError("data.slices: expected the task classification and a dataset_dir, without datalist.")
    source = {key: data[key] for key in (*CUTTING, "classes") if data.get(key) is not None}
    slices = folder / "slices"
    if slices.is_dir():
        _check_source(slices / SOURCE, source)
    else:
        _write(slices, source)
    kept = {key: value for key, value in data.items() if key not in (*CUTTING, "slices", "allow_empty_labels")}
    return replace(study, data={**kept, **slice_options(slices), "modality": "image2d"})


def _write(slices: Path, source: dict[str, object]) -> None:
    """Write the slices elsewhere first: a folder of that name is complete."""
    unfinished = slices.with_name(".slices-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_slices(unfinished, **source)  # type: ignore[arg-type]
    write_json(unfinished / SOURCE, source)
    unfinished.rename(slices)


def _check_source(path: Path, source: dict[str, object]) -> None:
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != json.loads(json.dumps(source)):
        raise ValueError(
            f"{path.parent} holds slices of other volumes or classes: {before}, expected {source}. Choose another "
            "--output_dir, or remove that folder."
        )
