# SPDX-License-Identifier: Apache-2.0
"""The evaluation config: scores on the scan's own grid, of predictions that are known beforehand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from tests.bundles.ahm_segmentation.segmenting import evaluate, message_of, train, write_labelled, write_threshold
from tests.bundles.running import OBLIQUE_LIA, SEGMENTATION, checkpoint, run_bundle

SHAPE = (24, 26, 20)
KNOWN: dict[str, Any] = {"classes": ["box"], "backbone_args": {}}


def write_shifted(folder: Path, shift: int, *, affine: np.ndarray, count: int = 3) -> Path:
    """Write boxes of 10 voxels a side whose labels lie ``shift`` voxels off along the first axis."""
    box = np.zeros(SHAPE, np.int16)
    box[5:15, 6:16, 4:14] = 1
    for number in range(count):
        for kind, values in (("images", 500 * box), ("labels", np.roll(box, shift, axis=0))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, affine), folder / kind / f"scan{number}.nii.gz")
    return folder / "images"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation/scores.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [np.diag([1.5, 1.0, 3.0, 1.0]), OBLIQUE_LIA], ids=["anisotropic", "oblique"])
def test_known_prediction_has_known_scores(tmp_path: Path, affine: np.ndarray, dims: int) -> None:
    data = write_shifted(tmp_path / "data", 2, affine=affine)
    options = write_threshold(tmp_path / "run/models/model.pt", dims)
    evaluate(data, tmp_path / "run", spatial_dims=dims, **KNOWN, **options)

    (row,) = rows_of(tmp_path / "run")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    assert float(row["dice"]) == float(row["dice_box"]) == pytest.approx(0.8)
    assert float(row["hd95_mm"]) == pytest.approx(2 * spacing[0], rel=1e-5)
    assert float(row["label_ml_box"]) == float(row["pred_ml_box"]) == pytest.approx(spacing.prod(), rel=1e-5)
    report = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert (report["cases"], report["classes"]) == (1, ["box"])
    assert report["scores"]["dice"]["mean"] == pytest.approx(0.8)


@pytest.mark.parametrize("spacing_mm", [0.8, [2.0, 1.5, 2.5]])
def test_scores_of_a_resampled_scan_are_those_of_its_own_grid(tmp_path: Path, spacing_mm: Any) -> None:
    data = write_shifted(tmp_path / "data", 0, affine=OBLIQUE_LIA)
    evaluate(
        data, tmp_path / "run", spacing_mm=spacing_mm, **KNOWN, **write_threshold(tmp_path / "run/models/model.pt")
    )

    (row,) = rows_of(tmp_path / "run")
    spacing = np.linalg.norm(OBLIQUE_LIA[:3, :3], axis=0)
    assert float(row["label_ml_box"]) == pytest.approx(spacing.prod(), rel=1e-5)  # of the file, not resampled
    assert float(row["dice"]) > 0.9
    assert float(row["surface_dice"]) > 0.9


def test_an_output_that_is_no_number_is_an_error_and_no_empty_segmentation(tmp_path: Path) -> None:
    data, path = write_shifted(tmp_path / "data", 0, affine=np.eye(4)), tmp_path / "run/models/model.pt"
    options = write_threshold(path)
    content = checkpoint(path)
    content["model"]["bias"].fill_(float("nan"))
    torch.save(content, path)
    message = message_of(evaluate, data, tmp_path / "run", **KNOWN, **options)
    assert "expected numbers in pred, got NaN or infinite values" in message


def test_tolerance_of_the_surface_is_in_mm(tmp_path: Path) -> None:
    data = write_shifted(tmp_path / "data", 1, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    options = {**KNOWN, **write_threshold(tmp_path / "run/models/model.pt")}
    shares = []
    for tolerance in (1.0, 2.5):
        evaluate(data, tmp_path / "run", surface_tolerance=tolerance, **options)
        shares.append(float(rows_of(tmp_path / "run")[0]["surface_dice"]))
    assert shares[0] < 0.9 and shares[1] == pytest.approx(1.0)


def test_pictures_are_measured_in_pixels(tmp_path: Path) -> None:
    square = np.zeros((40, 30), np.uint8)
    square[10:20, 5:15] = 255
    for folder, values in (("images", square), ("masks", np.roll(square, 3, axis=0))):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(values).save(tmp_path / "data" / folder / f"p{number}.png")
    options = write_threshold(tmp_path / "run/models/model.pt", 2)
    pictures = {"modality": "image2d", "spatial_dims": 2, "label_values": [255]}
    evaluate(tmp_path / "data/images", tmp_path / "run", **pictures, **KNOWN, **options)
    (row,) = rows_of(tmp_path / "run")
    assert float(row["dice"]) == pytest.approx(0.7)
    assert float(row["hd95_px"]) == pytest.approx(3.0)
    assert float(row["label_px_box"]) == 100


def test_settings_and_split_come_from_the_checkpoint(tmp_path: Path) -> None:
    """Or else a forgotten option would score another preprocessing, or patients who were trained on."""
    data = write_labelled(tmp_path / "data", 10)
    split = {"val_fraction": 0.3, "test_fraction": 0.4, "split_seed": 3, "patient_pattern": r"(scan\d)"}
    trained = train(data, tmp_path / "run", spacing_mm=1.5, spatial_dims=2, **split)
    given = {"dataset_dir": str(data), "output_dir": str(tmp_path / "run")}
    run = run_bundle(["train.json", "evaluate.json"], bundle=SEGMENTATION, **given)
    assert run.parser.get_parsed_content("settings") == trained.parser.get_parsed_content("settings")
    test = {case["case_id"] for case in trained.parser.get_parsed_content("cases").test}
    assert len(test) == 4 and {row["case_id"] for row in rows_of(tmp_path / "run")} == test


def test_patients_who_were_trained_on_are_counted_where_the_folder_has_grown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_labelled(tmp_path / "data", 6)
    before = train(data, tmp_path / "run").parser.get_parsed_content("cases")
    evaluate(data, tmp_path / "run")
    assert "trained on" not in caplog.text

    write_labelled(tmp_path / "data", 12)
    after = evaluate(data, tmp_path / "run").parser.get_parsed_content("cases")
    trained, scored = ({case["patient_id"] for case in part} for part in (before.training, after.test))
    assert trained & scored
    assert f"{len(trained & scored)} of {len(scored)} test patients have names of patients whom model.pt" in caplog.text
    caplog.clear()
    evaluate(data, tmp_path / "run", evaluate_cases="training")
    assert "have names" not in caplog.text


def test_validation_cases_can_be_scored_instead(tmp_path: Path) -> None:
    data = write_shifted(tmp_path / "data", 0, affine=np.eye(4), count=5)
    options = {**KNOWN, **write_threshold(tmp_path / "run/models/model.pt"), "val_fraction": 0.4}
    evaluate(data, tmp_path / "run", **options)
    test = [row["case_id"] for row in rows_of(tmp_path / "run")]
    evaluate(data, tmp_path / "run", **options, evaluate_cases="validation")
    validation = [row["case_id"] for row in rows_of(tmp_path / "run")]
    assert (len(test), len(validation)) == (1, 2) and not set(test) & set(validation)


def test_empty_test_part(tmp_path: Path) -> None:
    data = write_shifted(tmp_path / "data", 0, affine=np.eye(4))
    options = {**KNOWN, **write_threshold(tmp_path / "run/models/model.pt")}
    message = message_of(evaluate, data, tmp_path / "run", test_fraction=0.0, **options)
    assert "there are no test cases: set test_fraction above 0" in message
    assert not (tmp_path / "run/evaluation/scores.csv").exists()


def test_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    assert "model.pt: no such checkpoint" in message_of(evaluate, data, tmp_path / "run")


def test_checkpoint_of_other_classes(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    options = write_threshold(tmp_path / "run/models/model.pt")
    message = message_of(evaluate, data, tmp_path / "run", **options)
    for part in ("model.pt: trained for the classes ['box']", "['box', 'slab']"):
        assert part in message
