# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ahm_transforms.io import BadCasesError, load_cases, load_image, load_segmentation_cases
from ahm_transforms.io import reader as reader_module
from ahm_transforms.io.label_check import LabelCheck
from tests.fixtures_data import real_data, write_nifti, write_series

SHAPE = (12, 13, 14)
PARTS = ("training", "validation", "test")


def write_label(path: Path, *values: int, shape: tuple[int, ...] = SHAPE, affine: np.ndarray | None = None) -> None:
    label = np.zeros(shape, np.uint8)
    label.ravel()[: len(values)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, np.eye(4) if affine is None else affine), path)


def write_pairs(folder: Path, names: str, *values: int, images: str = "images", labels: str = "labels") -> Path:
    for name in names:
        write_nifti(folder / images / f"{name}.nii.gz")
        write_label(folder / labels / f"{name}.nii.gz", *(values or (1,)))
    return folder


def load(folder: Path | None, **options: Any) -> Any:
    return load_segmentation_cases(folder, **({"classes": ["a"], "val_fraction": 0, "test_fraction": 0} | options))


def bad(folder: Path | None, **options: Any) -> dict[str, str]:
    with pytest.raises(BadCasesError) as caught:
        load(folder, **options)
    assert all(name in str(caught.value) and reason in str(caught.value) for name, reason in caught.value.bad)
    return dict(caught.value.bad)


@pytest.mark.parametrize("labels", ["labels", "labelsTr", "masks", "segmentations"])
@pytest.mark.parametrize("below", [True, False])
def test_labels_beside_the_images_are_found(tmp_path: Path, labels: str, below: bool) -> None:
    images = "imagesTr" if labels == "labelsTr" else "images"
    write_pairs(tmp_path, "ab", images=images, labels=labels)
    cases = load(tmp_path / images if below else tmp_path)
    assert [case["label"] for case in cases.training] == [str(tmp_path / labels / f"{name}.nii.gz") for name in "ab"]
    assert not cases.left_out


@pytest.mark.parametrize("labels", ["marks", "x/labels"])
def test_labels_are_found_where_they_are_said_to_be(tmp_path: Path, labels: str) -> None:
    write_nifti(tmp_path / "sub-1/T1.nii")
    write_label(tmp_path / labels / "sub-1/T1.nii.gz", 1)
    cases = load(tmp_path, labels_dir=tmp_path / labels)
    (case,) = cases.training
    assert not cases.left_out, "labels are no images"
    assert case["case_id"] == "sub-1_T1"
    assert case["label"] == str(tmp_path / labels / "sub-1/T1.nii.gz")


def test_folder_of_images_does_not_count_in_the_name(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", "a", labels="../elsewhere")
    assert load(tmp_path / "data", labels_dir=tmp_path / "elsewhere").training[0]["case_id"] == "images_a"


def test_labels_of_nnunet_lack_the_number_of_the_channel(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr/p_001_0000.nii.gz")
    write_label(tmp_path / "labelsTr/p_001.nii.gz", 1)
    assert load(tmp_path).training[0]["label"].endswith("labelsTr/p_001.nii.gz")


def test_pictures_and_their_masks(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/a.jpg")
    Image.fromarray((noise[..., 0] > 99).astype(np.uint8) * 255).save(tmp_path / "masks/a.png")
    cases = load(tmp_path, spatial_dims=2, label_values=[255], channels=3)
    assert cases.training[0]["label"].endswith("masks/a.png")
    assert "holds the value(s) 255, expected 0, 1" in bad(tmp_path, spatial_dims=2)["a.jpg"]


def test_a_dicom_series_has_the_label_that_is_called_as_its_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "images/scan", size=(16, 20), slices=6)
    image = load_cases(tmp_path, val_fraction=0).training[0]["image"]
    affine = reader_module.load_image(image).affine.numpy()
    write_label(tmp_path / "labels/scan.nii.gz", 1, shape=(20, 16, 6), affine=affine)
    assert load(tmp_path).training[0]["image"] == image


def test_images_without_a_label_are_left_out_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path, "ab")
    for index in range(20):
        write_nifti(tmp_path / f"images/more{index}.nii.gz")
    with caplog.at_level(logging.WARNING):
        cases = load(tmp_path)
    assert len(cases.training) == 2 and len(cases.left_out) == 20
    (left_out,) = [message for message in caplog.messages if "no label" in message]
    assert left_out.startswith("20 left out:\n  20 such as more0.nii.gz")
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of 22 image\(s\) has a label: .*a folder labels, labelsTr"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load(tmp_path, labels_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be in different folders"):
        load(tmp_path, labels_dir=tmp_path)


def test_every_bad_label_is_listed_with_file_expectation_and_finding(tmp_path: Path) -> None:
    write_pairs(tmp_path, "g")
    for name in ("unknown", "empty", "size", "affine", "damaged", "float", "channels"):
        write_nifti(tmp_path / f"images/{name}.nii.gz")
    labels = tmp_path / "labels"
    write_label(labels / "unknown.nii.gz", 1, 9, 7, 5, 4, 3, 8)
    write_label(labels / "empty.nii.gz")
    write_label(labels / "size.nii.gz", 1, shape=(12, 13, 15))
    write_label(labels / "affine.nii.gz", 1, affine=np.diag([1, 1, 1.01, 1]))
    (labels / "damaged.nii.gz").write_text("no label")
    nib.save(nib.Nifti1Image(np.full(SHAPE, 0.25, np.float32), np.eye(4)), labels / "float.nii.gz")
    write_label(labels / "channels.nii.gz", 1, shape=(*SHAPE, 2))
    reasons = bad(tmp_path)
    expected = {
        "unknown": "unknown.nii.gz holds the value(s) 3, 4, 5, 7, 8 and 1 more, expected 0, 1",
        "empty": "empty.nii.gz is all background, expected some of a: pass --allow_empty_labels true",
        "size": "size.nii.gz has size (12, 13, 15), expected (12, 13, 14) as the image",
        "affine": "affine.nii.gz has an affine that differs by up to 0.01, expected that of the image",
        "damaged": "damaged.nii.gz cannot be read: ",
        "float": "float.nii.gz holds the value(s) 0.25, which are not all integers, expected 0, 1",
        "channels": "channels.nii.gz has 2 channels, expected a map of one",
    }
    assert set(reasons) == {f"{name}.nii.gz" for name in expected}
    for name, reason in expected.items():
        assert reasons[f"{name}.nii.gz"].startswith(f"label {reason}")


def test_rounding_of_the_affine_is_no_other_grid(tmp_path: Path) -> None:
    write_pairs(tmp_path, "a")
    write_label(tmp_path / "labels/a.nii.gz", 1, affine=np.diag([1, 1, 1.0005, 1]))
    assert load(tmp_path).training


def test_skip_bad_leaves_bad_labels_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path, "ab")
    write_label(tmp_path / "labels/b.nii.gz")
    with caplog.at_level(logging.WARNING):
        cases = load(tmp_path, skip_bad=True)
    assert [case["case_id"] for case in cases.training] == ["images_a"]
    assert "b.nii.gz is all background" in caplog.text
    allowed = load(tmp_path, allow_empty_labels=True)
    assert allowed.summary()["training_cases_by_class"] == {"a": 1} and len(allowed.training) == 2


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, "abc")
    read: list[str] = []
    get_data = reader_module.NibabelReader.read
    monkeypatch.setattr(
        reader_module.NibabelReader, "read", lambda self, name, **k: read.append(name) or get_data(self, name, **k)
    )
    load(tmp_path, test_fraction=0.4, val_fraction=0.3)
    assert len(read) == len(set(read)) == 6


def test_no_patient_is_in_two_parts_and_the_tests_are_those_left_out_of_pretraining(tmp_path: Path) -> None:
    for index in range(20):
        write_pairs(tmp_path, [f"p{index // 2}_{index}"])  # type: ignore[arg-type]
    options: dict[str, Any] = {"test_fraction": 0.3, "patient_pattern": r"p\d", "val_fraction": 0.1}
    cases = load(tmp_path, split_seed=5, **options)
    sides = [{case["patient_id"] for case in getattr(cases, part)} for part in PARTS]
    assert [len(side) for side in sides] == [6, 1, 3] and len(set.union(*sides)) == 10
    pretraining = load_cases(tmp_path / "images", seed=5, **options)
    assert {case["patient_id"] for case in pretraining.test} == sides[2]


def test_label_fraction_chooses_training_patients_and_nothing_else(tmp_path: Path) -> None:
    write_pairs(tmp_path, "abcdefghij")
    options = {"val_fraction": 0.2, "test_fraction": 0.2}
    runs = [load(tmp_path, label_fraction=share, seed=3, **options) for share in (0.1, 0.5, 1)]
    ids = [{case["case_id"] for case in run.training} for run in runs]
    assert [len(each) for each in ids] == [1, 3, 6] and ids[0] < ids[1] < ids[2]
    assert runs[0].validation == runs[2].validation and runs[0].test == runs[2].test
    assert runs[0].summary()["training_patients"] == 1 and len(runs[0].geometry) == 5
    others = [load(tmp_path, label_fraction=0.1, seed=seed, **options) for seed in range(9)]
    assert len({run.training[0]["case_id"] for run in others}) > 1
    assert all(run.test == runs[0].test for run in others)


def test_a_class_that_training_lacks_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path, "abcd", 1)
    with pytest.raises(
        ValueError, match=r"class 'two' \(label value 7\) occurs in none of the 4 training case\(s\)"
    ) as e:
        load(tmp_path, classes=["one", "two"], label_values=[1, 7])
    assert all(f"--{name}" in str(e.value) for name in ("seed", "label_fraction", "classes"))
    everything = load(tmp_path, test_fraction=0.25)
    for case in everything.training:
        write_label(Path(case["label"]), 1, 2)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, classes=["one", "two"], test_fraction=0.25)
    assert "class 'two' (label value 2) occurs in none of the 1 test case(s)" in caplog.text


def test_datalist_with_labels_and_a_test_list(tmp_path: Path) -> None:
    write_pairs(tmp_path, "abc")
    entries = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in "abc"]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": entries[:1], "validation": [entries[1]], "test": [entries[2]]}))
    cases = load(None, datalist=path, val_fraction=0.9)
    assert [[case["case_id"] for case in getattr(cases, part)] for part in PARTS] == [
        [f"images_{name}"] for name in "abc"
    ]
    assert cases.test[0]["label"] == str(tmp_path / "labels/c.nii.gz")


def test_test_list_without_labels_gives_way_to_a_drawn_one(tmp_path: Path) -> None:
    write_pairs(tmp_path, "abcd")
    entries = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in "abcd"]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": entries, "test": ["images/not_there.nii.gz"]}))
    cases = load(None, datalist=path, test_fraction=0.25)
    assert (len(cases.training), len(cases.test)) == (3, 1)
    images = [entry["image"] for entry in entries]
    path.write_text(json.dumps({"training": images, "test": ["images/not_there.nii.gz"]}))
    cases = load(None, datalist=path, test_fraction=0.25, labels_dir=tmp_path / "labels")
    assert (len(cases.training), len(cases.test), len(cases.left_out)) == (3, 1, 1)


def test_of_a_block_only_its_own_classes_count(tmp_path: Path) -> None:
    write_pairs(tmp_path, "a", 1, 2)
    label, image = str(tmp_path / "labels/a.nii.gz"), load_image(tmp_path / "images/a.nii.gz")
    case = {"label": label, "block": [[0, 12], [0, 13], [1, 2]]}
    check = LabelCheck(("one", "two"), (1, 2))
    assert check({"label": label}, image) == {"one", "two"}
    assert check(case, image) == {"two"}
    with pytest.raises(ValueError, match="all background"):
        check({**case, "block": [[1, 12], [0, 13], [0, 14]]}, image)


def test_one_map_for_each_class(tmp_path: Path) -> None:
    write_nifti(tmp_path / "x/a.nii.gz")
    for name in ("one", "two"):
        write_label(tmp_path / f"{name}.nii.gz", *((1, 0) if name == "one" else (0, 1)))
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": [{"image": "x/a.nii.gz", "label": ["one.nii.gz", "two.nii.gz"]}]}))
    cases = load(None, datalist=path, classes=["one", "two"])
    assert cases.count_classes("training") == {"one": 1, "two": 1}
    write_label(tmp_path / "two.nii.gz", 1, shape=(12, 13, 15))
    assert (
        "two.nii.gz has size (12, 13, 15), expected (12, 13, 14)"
        in bad(None, datalist=path, classes=["one", "two"])["a.nii.gz"]
    )
    (tmp_path / "two.nii.gz").unlink()
    reasons = bad(None, datalist=path, classes=["one", "two"])
    assert reasons["a.nii.gz"] == "label two.nii.gz does not exist"
    path.write_text(json.dumps({"training": [{"image": "x/a.nii.gz", "label": 3}]}))
    with pytest.raises(ValueError, match=r"the label of a\.nii\.gz must be a path or a list of paths, got 3"):
        load(None, datalist=path)


@pytest.mark.parametrize("classes", [[], "ab", ["a", "a"], ["a", " a "], ["a", ""], ["a", " "]])
def test_classes_are_a_list_of_names(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(ValueError, match="classes: expected a list of different names, none of them empty, got"):
        load(write_pairs(tmp_path, "a"), classes=classes)


@pytest.mark.parametrize("shapes", [((12, 13, 1), (12, 13, 1)), ((12, 13), (12, 13, 1)), ((12, 13, 1), (12, 13))])
def test_a_picture_may_be_a_nifti_file_of_one_slice(tmp_path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
    write_nifti(tmp_path / "images/a.nii.gz", shapes[0])
    write_label(tmp_path / "labels/a.nii.gz", 1, shape=shapes[1])
    options: dict[str, Any] = {"spatial_dims": 2, "pictures": True}
    cases = load(tmp_path, **options)
    assert cases.geometry["images_a"] == ((12, 13), (1.0, 1.0)) and cases.count_classes("training") == {"a": 1}
    write_nifti(tmp_path / "images/a.nii.gz", (12, 13, 2))
    assert "expected a picture for modality image2d" in bad(tmp_path, **options)["a.nii.gz"]


def test_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, "a")
    write_label(tmp_path / "labels/a.nii", 1)
    with pytest.raises(ValueError, match=r"holds a\.nii and a\.nii\.gz: keep one of them"):
        load(tmp_path)


def test_real_hippocampus() -> None:
    cases = load_segmentation_cases(real_data("hippocampus_mr/images"), classes=["anterior", "posterior"], channels=1)
    assert [len(getattr(cases, part)) for part in PARTS] == [96, 32, 32]
    assert cases.count_classes("test") == {"anterior": 32, "posterior": 32}
    assert "hippocampus" not in json.dumps(cases.summary())


def test_real_ultrasound_has_empty_masks_and_values_of_255(tmp_path: Path) -> None:
    for path in sorted(real_data("busi_ultrasound").glob("*/*_1?.png")):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).symlink_to(path)
    options: dict[str, Any] = {"classes": ["lesion"], "spatial_dims": 2, "label_values": [255], "channels": 1}
    with pytest.raises(BadCasesError) as caught:
        load_segmentation_cases(tmp_path, **options)
    assert len(caught.value.bad) == 10 and all(name.startswith("normal") for name, _ in caught.value.bad)
    cases = load_segmentation_cases(tmp_path, allow_empty_labels=True, label_fraction=0.5, **options)
    assert [len(getattr(cases, part)) for part in PARTS] == [9, 6, 6]


def test_real_glioma() -> None:
    cases = load_segmentation_cases(real_data("lgg_flair_mr"), classes=["tumour"], spatial_dims=2, channels=1)
    assert [len(getattr(cases, part)) for part in PARTS] == [12, 4, 4]
