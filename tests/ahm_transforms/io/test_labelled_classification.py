# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ahm_transforms.io import BadCasesError, load_classification_cases
from ahm_transforms.recipes import classification_deterministic
from tests.fixtures_data import real_data, write_nifti, write_series

PARTS = ("training", "validation", "test")
CLASSES = ["normal", "abnormal", "grade1"]


def write_picture(path: Path, size: tuple[int, int] = (8, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)).save(path)


def load(folder: Path | None, **options: Any) -> Any:
    defaults = {"classes": CLASSES, "spatial_dims": 2, "val_fraction": 0, "test_fraction": 0}
    return load_classification_cases(folder, **(defaults | options))


def labels(folder: Path | None, **options: Any) -> dict[str, int]:
    return {case["case_id"]: case["label"] for case in load(folder, **options).training}


def bad(folder: Path | None, **options: Any) -> dict[str, str]:
    with pytest.raises(BadCasesError) as caught:
        load(folder, **options)
    return dict(caught.value.bad)


def test_class_is_a_whole_word_of_the_path(tmp_path: Path) -> None:
    for name in ("normal_1", "Abnormal/x", "sub-normal/y", "normal12", "grade1/z", "a.grade1-b"):
        write_picture(tmp_path / f"{name}.png")
    found = labels(tmp_path)
    assert found == {"normal_1": 0, "Abnormal_x": 1, "sub-normal_y": 0, "normal12": 0, "grade1_z": 2, "a.grade1-b": 2}


def test_no_class_or_several_in_the_path_are_bad_cases(tmp_path: Path) -> None:
    for name in ("normal", "subnormal", "normal/grade1", "grade12"):
        write_picture(tmp_path / f"{name}.png")
    reasons = bad(tmp_path)
    assert reasons.pop("grade1.png").startswith("the classes grade1, normal in 'normal/grade1.png', expected one of")
    assert set(reasons) == {"subnormal.png", "grade12.png"}
    assert all(reason.startswith("no class in") and "--class_pattern" in reason for reason in reasons.values())


def test_the_longest_name_counts(tmp_path: Path) -> None:
    for name in ("left lung 1", "left 1"):
        write_picture(tmp_path / f"{name}.png")
    assert labels(tmp_path, classes=["left", "left lung"]) == {"left 1": 0, "left lung 1": 1}


@pytest.mark.parametrize("pattern", ["_([NA])", "(?<=_)[NA]"])
def test_pattern_finds_the_class_by_its_group_or_as_a_whole(tmp_path: Path, pattern: str) -> None:
    for name in ("a_N", "b_A", "grade_A_N"):
        write_picture(tmp_path / f"{name}.png")
    assert labels(tmp_path, classes=["N", "A"], class_pattern=pattern) == {"a_N": 0, "b_A": 1, "grade_A_N": 1}
    write_picture(tmp_path / "c.png")
    assert "no class in 'c.png'" in bad(tmp_path, classes=["N", "A"], class_pattern=pattern)["c.png"]
    assert (
        "is of class 'A', expected one of N, B" in bad(tmp_path, classes=["N", "B"], class_pattern=pattern)["b_A.png"]
    )
    with pytest.raises(ValueError, match=r"class_pattern '\(' is no regular expression"):
        load(tmp_path, class_pattern="(")


def test_dicom_series_are_classified_by_their_folders(tmp_path: Path) -> None:
    write_series(tmp_path / "normal/one")
    write_series(tmp_path / "abnormal/two")
    assert sorted(labels(tmp_path, classes=CLASSES[:2], spatial_dims=3).values()) == [0, 1]


@pytest.mark.parametrize("key", ["case_id", "image"])
def test_table_says_the_class_by_id_or_path(tmp_path: Path, key: str) -> None:
    for name in ("x/1", "x/2", "3"):
        write_picture(tmp_path / f"data/{name}.png")
    rows = ["x_1", "x_2", "3"] if key == "case_id" else ["x/1.png", "x/2.png", "3.png"]
    table = tmp_path / "labels.csv"
    table.write_text(f"\ufeffage,{key},label\n60,{rows[0]},normal\n61, {rows[1]} ,abnormal\n62,{rows[2]},2\n")
    assert labels(tmp_path / "data", labels_csv=table) == {"3": 2, "x_1": 0, "x_2": 1}
    table.write_text(f"{key},label\n{rows[0]},normal\n{rows[1]},strange\n")
    reasons = bad(tmp_path / "data", labels_csv=table)
    assert "is of class 'strange', expected one of normal, abnormal, grade1" in reasons["2.png"]
    assert reasons["3.png"] == "has no row in labels.csv, expected its case_id or image there"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with a line of column names"),
        ("normal_1,normal\n", r"with 'label' and 'case_id' or 'image', got \['normal_1', 'normal'\]"),
        ("case_id;label\nnormal_1;normal\n", "separated by commas"),
        ("case_id,label\nnormal_1,normal\nnormal_1,abnormal\n", "line 3: normal_1 has two classes"),
    ],
)
def test_wrong_tables_are_clear_errors(tmp_path: Path, text: str, message: str) -> None:
    write_picture(tmp_path / "normal_1.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, labels_csv=tmp_path / "labels.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        load(tmp_path, labels_csv=tmp_path / "none.csv")


@pytest.mark.parametrize("classes", [["1", "2", "3"], ["low", "-1", "2.5"]])
def test_where_a_class_is_called_by_a_number_no_number_is_an_index(tmp_path: Path, classes: list[str]) -> None:
    for name in "abcd":
        write_picture(tmp_path / f"{name}.png")
    rows = zip("abcd", [*classes, "0"], strict=True)
    (tmp_path / "table.csv").write_text("\n".join(["case_id,label", *(f"{name},{label}" for name, label in rows)]))
    options = {"classes": classes, "labels_csv": tmp_path / "table.csv"}
    assert bad(tmp_path, **options) == {"d.png": f"is of class '0', expected one of {', '.join(classes)}"}
    assert labels(tmp_path, **options, skip_bad=True) == {"a": 0, "b": 1, "c": 2}


def test_datalist_says_the_class_by_name_or_index(tmp_path: Path) -> None:
    for name in "abcd":
        write_picture(tmp_path / f"{name}.png")
    entries = [
        {"image": f"{name}.png", "label": label} for name, label in zip("abcd", ["normal", 1, "2", 0], strict=True)
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": entries[:3], "test": entries[3:]}))
    cases = load(None, datalist=path, test_fraction=0.5)
    assert [case["label"] for case in cases.training] == [0, 1, 2]
    assert [(case["case_id"], case["label"]) for case in cases.test] == [("d", 0)]
    path.write_text(json.dumps({"training": entries, "test": ["of_unknown_class.png"]}))
    assert len(load(None, datalist=path, test_fraction=0.25).test) == 1
    entries[0]["label"] = 3
    path.write_text(json.dumps({"training": entries}))
    assert "is of class 3, expected one of normal, abnormal, grade1, or its index" in bad(None, datalist=path)["a.png"]


def test_masks_have_the_names_of_the_images(tmp_path: Path) -> None:
    for name in ("normal_1", "abnormal_1", "grade1"):
        write_picture(tmp_path / f"images/{name}.png")
        write_picture(tmp_path / f"masks/{name}.png")
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert "mask" not in load(images).training[0]
    assert [Path(case["mask"]).name for case in load(images, masks_dir=masks).training] == [
        "abnormal_1.png",
        "grade1.png",
        "normal_1.png",
    ]
    write_picture(masks / "normal_1.png", size=(9, 9))
    (masks / "grade1.png").unlink()
    assert bad(images, masks_dir=masks) == {
        "normal_1.png": "mask normal_1.png has size (9, 9), expected (9, 8) as the image",
        "grade1.png": "no mask",
    }


def test_what_is_skipped_moves_no_patient_to_another_part(tmp_path: Path) -> None:
    for index in range(20):
        for folder in ("images", "masks"):
            write_picture(tmp_path / f"{folder}/{CLASSES[index % 2]}_{index}.png")
    options: dict[str, Any] = {"classes": CLASSES[:2], "val_fraction": 0.3, "test_fraction": 0.3, "skip_bad": True}
    whole = load(tmp_path / "images", **options)
    (tmp_path / "masks/normal_2.png").unlink()
    write_picture(tmp_path / "masks/abnormal_5.png", size=(9, 9))
    less = load(tmp_path / "images", masks_dir=tmp_path / "masks", **options)
    for part in PARTS:
        ids = [case["case_id"] for case in getattr(whole, part) if case["case_id"] not in ("normal_2", "abnormal_5")]
        assert [case["case_id"] for case in getattr(less, part)] == ids


def test_a_picture_and_its_mask_may_be_nifti_files_of_one_slice(tmp_path: Path) -> None:
    write_nifti(tmp_path / "images/normal.nii.gz", (8, 9, 1))
    write_nifti(tmp_path / "masks/normal.nii.gz", (8, 9, 1))
    (case,) = load(tmp_path / "images", classes=["normal"], masks_dir=tmp_path / "masks", pictures=True).training
    chain = classification_deterministic("image2d", spatial_dims=2, image_size=8, mask_channel=True)
    assert chain(case)["image"].shape == (2, 8, 8)


def test_masks_of_a_datalist(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "m.png")
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "a.png", "label": 0, "mask": "m.png"}]}))
    assert load(None, datalist=path, classes=["x"]).training[0]["mask"] == str(tmp_path / "m.png")
    path.write_text(json.dumps({"training": [{"image": "a.png", "label": 0, "mask": ["m.png"]}]}))
    with pytest.raises(ValueError, match=r"the mask of a\.png must be a path, got \['m\.png'\]"):
        load(None, datalist=path, classes=["x"])


def test_a_class_that_training_lacks_is_an_error(tmp_path: Path) -> None:
    for index in range(5):
        write_picture(tmp_path / f"normal_{index}.png")
    with pytest.raises(ValueError, match=r"class 'abnormal' \(index 1\), 'grade1' \(index 2\) occurs in none of the 5"):
        load(tmp_path)
    with pytest.raises(ValueError, match="pass labels_csv or class_pattern, not both"):
        load(tmp_path, labels_csv="x.csv", class_pattern="x")


def test_patients_stay_together_and_classes_are_shared_out(tmp_path: Path) -> None:
    for patient in range(20):
        name = "abnormal" if patient < 5 else "normal"
        for index in range(2):
            write_nifti(tmp_path / f"{name}/p{patient:02}_{index}.nii.gz")
    options: dict[str, Any] = {"classes": CLASSES[:2], "patient_pattern": r"p\d+", "spatial_dims": 3}
    cases = load(tmp_path, val_fraction=0.2, test_fraction=0.2, **options)
    assert [cases.count_classes(part) for part in PARTS] == [
        {"normal": 18, "abnormal": 6},
        {"normal": 6, "abnormal": 2},
        {"normal": 6, "abnormal": 2},
    ]
    sides = [{case["patient_id"] for case in getattr(cases, part)} for part in PARTS]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 20
    for seed in range(4):
        few = load(tmp_path, test_fraction=0.2, label_fraction=0.25, seed=seed, **options)
        assert few.count_classes("training") == {"normal": 6, "abnormal": 2}
    runs = [load(tmp_path, test_fraction=0.2, split_seed=seed, stratify=False, **options) for seed in range(4)]
    assert len({run.count_classes("test")["abnormal"] for run in runs}) > 1


def test_real_ultrasound() -> None:
    folder = real_data("busi_ultrasound")
    options: dict[str, Any] = {"classes": ["benign", "malignant", "normal"], "spatial_dims": 2, "channels": 1}
    cases = load_classification_cases(folder / "images", masks_dir=folder / "masks", **options)
    assert cases.summary()["test_cases_by_class"] == pytest.approx({"benign": 87, "malignant": 42, "normal": 27}, abs=1)
    assert all(Path(case["mask"]).name == Path(case["image"]).name for case in cases.training)
