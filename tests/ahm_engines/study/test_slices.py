# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ahm_engines.bundles import bundles_folder
from ahm_engines.study import slices as module
from ahm_engines.study.cells import finetuning_cells, make_job
from ahm_engines.study.reading import read_study
from ahm_engines.study.runner import StudyRun
from ahm_engines.study.settings import Study
from ahm_engines.study.slices import with_slices
from ahm_engines.study.splits import make_splits

NAMES = [f"p{patient}_{scan}" for patient in range(5) for scan in "ab"]


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 1000, (8, 8, 4)).astype(np.int16)
    shown = np.zeros(values.shape, np.uint8)
    shown[2:4, 2:4, 3] = 7
    for folder, array in (("images", values), ("drawn", shown)):
        (tmp_path / folder).mkdir()
        for name in NAMES:
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    return tmp_path


def study(volumes: Path, changes: dict[str, Any] | None = None) -> Study:
    data = {"dataset_dir": str(volumes / "images"), "labels_dir": str(volumes / "drawn"), "label_values": [7]}
    data |= {"slices": True, "classes": ["without", "with"], "patient_pattern": r"p\d"}
    content = {"task": "classification", "arms": ["scratch"], "seeds": {"1.0": 2}, "data": data}
    return read_study(changes=content | (changes or {}))


def test_slices_are_the_cases_and_patients_stay_together(volumes: Path) -> None:
    given = study(volumes)
    sliced = with_slices(given, volumes / "study")
    assert given.data["slices"] and "slices" not in sliced.data
    assert (sliced.data["modality"], sliced.data["spatial_dims"]) == ("image2d", 2)
    splits = make_splits(sliced, volumes / "study/splits")
    assert splits.patients == {(1.0, 0, 0): 3, (1.0, 1, 0): 3}
    for path in splits.finetune.values():
        parts = json.loads(path.read_text())
        assert [len(parts[part]) for part in ("training", "validation", "test")] == [24, 8, 8]  # 4 slices a scan
        for entry in chain(*parts.values()):
            assert Path(entry["image"]).name.startswith(entry["patient_id"])
            assert entry["label"] == ("with" if "slice003" in entry["image"] else "without")


def test_slices_are_written_once(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_slices(study(volumes), volumes / "study")
    monkeypatch.setattr(module, "write_slices", None)
    assert with_slices(study(volumes), volumes / "study") == first


def test_a_run_that_is_stopped_leaves_no_slices(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "images/p0").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_slices", stop)
        with_slices(study(volumes), volumes)
    assert not (volumes / "slices").exists()
    sliced = with_slices(study(volumes), volumes)
    assert len(list(Path(sliced.data["dataset_dir"]).rglob("*.nii.gz"))) == 4 * len(NAMES)
    assert not (volumes / ".slices-unfinished").exists()


def test_slices_of_other_volumes_are_not_taken(volumes: Path) -> None:
    with_slices(study(volumes), volumes / "study")
    with pytest.raises(ValueError, match="holds slices of other volumes or classes"):
        with_slices(study(volumes, {"data.patient_pattern": r"p\d_\w"}), volumes / "study")


@pytest.mark.parametrize("changes", [{"task": "segmentation"}, {"data.datalist": "list.json"}])
def test_only_classifications_of_a_folder_have_slices(volumes: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"data\.slices: expected the task classification and a dataset_dir"):
        with_slices(study(volumes, changes), volumes / "study")
    plain = study(volumes, {"data.slices": False})
    assert with_slices(plain, volumes / "study") is plain


def test_a_study_records_its_own_settings_and_runs_slices(volumes: Path) -> None:
    given, folder = study(volumes), volumes / "study"
    run = StudyRun(given, folder, bundles_folder())
    assert json.loads((folder / "study.json").read_text())["data"] == given.data
    (cell,) = [cell for cell in finetuning_cells(run.study) if cell.seed == 1]
    job = make_job(cell, run.study, run.splits, folder, run.bundles, epochs=1, before=None)
    assert (job.options["modality"], job.options["spatial_dims"]) == ("image2d", 2)
    assert Path(job.options["dataset_dir"]) == folder / "slices/images"
    StudyRun(given, folder, bundles_folder())  # goes on
