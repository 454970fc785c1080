# SPDX-License-Identifier: Apache-2.0
"""DICOM images without a position in space, through all three bundles, as pictures are."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from tests.bundles import running
from tests.bundles.ahm_classification import classifying
from tests.bundles.ahm_segmentation import segmenting
from tests.fixtures_data import PATIENT_NAME, write_radiograph

PICTURES: dict[str, Any] = {"modality": "image2d", "spatial_dims": 2}
ROWS, COLUMNS = 24, 28


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of each of eight patients in one series, and masks of a bright square; half of the patients are ill."""
    folder = tmp_path_factory.mktemp("radiographs")
    (folder / "labels").mkdir()
    for number in range(8):
        series, study, kind = generate_uid(), generate_uid(), ("healthy", "ill")[number % 2]
        for view in ("frontal", "lateral"):
            label = np.zeros((ROWS, COLUMNS), np.uint8)
            label[4 + number : 12 + number, 6:16] = 1
            noise = np.random.default_rng(number).integers(0, 500, label.shape)
            values = (noise + 3000 * label.astype(int)).astype(np.int16)
            tags = {"PatientID": f"P{number}", "SeriesInstanceUID": series, "StudyInstanceUID": study}
            tags |= {"InstanceNumber": 1, "PatientOrientation": ["L", "F"]}
            inverse = {"PhotometricInterpretation": "MONOCHROME1"} if view == "lateral" else {}
            stored = 4095 - values if inverse else values
            name = f"{kind}_{number}_{view}"
            write_radiograph(folder / f"images/{name}.dcm", stored, **tags, **inverse)
            Image.fromarray(label).save(folder / f"labels/{name}.png")
    return folder


def test_pretraining_and_its_inference(data: Path, tmp_path: Path) -> None:
    workflow = running.train(data / "images", tmp_path, **PICTURES, labels_dir=str(data / "labels"), test_fraction=0.25)
    cases = workflow.parser.get_parsed_content("cases")
    assert [len(part) for part in (cases.training, cases.validation, cases.test)] == [8, 4, 4]  # both views of each
    record = (tmp_path / "run_record.json").read_text()
    assert json.loads(record)["data"]["training_patients"] == 4
    assert PATIENT_NAME not in record
    running.infer(data / "images", tmp_path / "out", tmp_path / "models/model.pt")
    policies = sorted((tmp_path / "out").rglob("*policy*.nii.gz"))
    assert [nib.load(path).shape[:2] for path in policies] == [(COLUMNS, ROWS)] * 16


def test_segmentation_comes_back_as_nifti_and_dicom_seg(data: Path, tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom")
    options = {**PICTURES, "classes": ["square"], "max_epochs": 1, "val_fraction": 0.25, "test_fraction": 0.25}
    segmenting.train(data / "images", tmp_path, **options)
    segmenting.evaluate(data / "images", tmp_path, **options)
    scores = json.loads((tmp_path / "evaluation/scores.json").read_text())
    assert scores["cases"] == 4
    segmenting.infer(data / "images", tmp_path / "out", tmp_path / "models/model.pt")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["done"], results["failed"], results["skipped"]) == (16, 0, 0)
    assert PATIENT_NAME not in str(results)
    image = pydicom.dcmread(data / "images/ill_1_lateral.dcm")
    for case in results["cases"]:
        folder = tmp_path / "out" / case["case_id"]
        found = nib.load(folder / f"{case['case_id']}_seg.nii.gz")
        seg = hd.seg.segread(folder / f"{case['case_id']}_seg.dcm")
        assert found.shape[:2] == (COLUMNS, ROWS) and (seg.Columns, seg.Rows) == (COLUMNS, ROWS)
        if image.SOPInstanceUID in {str(uid) for _, _, uid in seg.get_source_image_uids()}:
            assert seg.StudyInstanceUID == image.StudyInstanceUID


def test_classification_by_file_names(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**PICTURES, "classes": ["healthy", "ill"], "val_fraction": 0.25, "test_fraction": 0.25}
    with caplog.at_level(logging.INFO):
        classifying.train(data / "images", tmp_path, **options)
    assert PATIENT_NAME not in caplog.text
    scores = classifying.evaluate(data / "images", tmp_path, **options)
    assert scores["cases"] == 4
    classifying.infer(data / "images", tmp_path / "out", tmp_path / "models/model.pt")
    assert len(classifying.predictions(tmp_path / "out")) == 16
