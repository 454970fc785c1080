# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ahm_transforms.io import load_classification_cases, load_image, write_slices
from ahm_transforms.recipes import deterministic
from tests.fixtures_data import real_data

RAS = np.diag([1.0, 2.0, 3.0, 1.0])


def save(path: Path, values: np.ndarray, affine: np.ndarray = RAS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def volume(shape: tuple[int, int, int] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, shape).astype(np.int16)


def label(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = (4, 5, 6), value: int = 1) -> np.ndarray:
    values = np.zeros(shape, np.uint8)
    for voxel in voxels:
        values[voxel] = value
    return values


def table(folder: Path) -> dict[str, str]:
    with open(folder / "labels.csv", newline="") as file:
        return {row["image"]: row["label"] for row in csv.DictReader(file)}


def test_slices_keep_intensities_spacing_and_class(tmp_path: Path) -> None:
    values = volume()
    save(tmp_path / "images/a.nii.gz", values)
    save(tmp_path / "labels/a.nii.gz", label((0, 4, 2), (3, 0, 5)))
    write_slices(tmp_path / "out", tmp_path / "images")
    names = [f"a/a_slice00{index}.nii.gz" for index in range(6)]
    assert table(tmp_path / "out") == {name: "with" if name[-8] in "25" else "without" for name in names}
    for index, name in enumerate(names):
        written = nib.load(tmp_path / "out/images" / name)
        np.testing.assert_array_equal(written.get_fdata(), values[::-1, ::-1, index])  # from right and front
        assert written.header.get_zooms() == (1.0, 2.0)
        assert nib.aff2axcodes(written.affine) == ("L", "P", "S")


def test_slices_are_axial_however_volumes_are_stored(tmp_path: Path) -> None:
    values, shown = volume(), label((1, 2, 4))
    save(tmp_path / "ras/images/a.nii.gz", values)
    save(tmp_path / "ras/labels/a.nii.gz", shown)
    stored = RAS[:, [2, 0, 1, 3]] * [-1, 1, 1, 1]  # first axis to the feet, then to the right, then to the front
    for folder, array in (("images", values), ("labels", shown)):
        save(tmp_path / f"other/{folder}/a.nii.gz", array.transpose(2, 0, 1)[::-1], stored)
    for name in ("ras", "other"):
        write_slices(tmp_path / name / "out", tmp_path / name / "images")
    assert table(tmp_path / "ras/out") == table(tmp_path / "other/out")
    assert table(tmp_path / "ras/out")["a/a_slice004.nii.gz"] == "with"
    for path in (tmp_path / "ras/out/images/a").iterdir():
        one, other = (nib.load(tmp_path / name / "out/images/a" / path.name) for name in ("ras", "other"))
        np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
        np.testing.assert_array_equal(one.affine, other.affine)


def test_constant_slices_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = volume().astype(np.float32)
    values[..., 0], values[..., 3], values[..., 4] = 7, np.nan, 0
    values[1, 1, 4] = 1  # a single voxel is a signal
    save(tmp_path / "images/a.nii.gz", values)
    save(tmp_path / "labels/a.nii.gz", label((0, 0, 0), (0, 0, 1)))
    with caplog.at_level(logging.INFO, "ahm_transforms"):
        write_slices(tmp_path / "out", tmp_path / "images")
    assert [name[-8] for name in table(tmp_path / "out")] == ["1", "2", "4", "5"]
    assert len(list((tmp_path / "out/images").rglob("*.nii.gz"))) == 4
    assert "4 slice(s) of 1 volume(s), 2 constant one(s) left out." in caplog.text


def test_classifier_reads_them_with_the_patients_of_the_volumes(tmp_path: Path) -> None:
    for name in ("p1_early", "p1_late", "p2_early"):
        save(tmp_path / f"images/{name}.nii.gz", volume())
        save(tmp_path / f"drawn/{name}.nii.gz", label((0, 0, 1)) if name != "p2_early" else label())
    save(tmp_path / "images/p3_unlabelled.nii.gz", volume())
    classes = ["no tumor", "tumor"]
    options = write_slices(
        tmp_path / "out", tmp_path / "images", classes=classes, labels_dir=tmp_path / "drawn", patient_pattern=r"p\d"
    )
    found = load_classification_cases(**options, classes=classes, val_fraction=0, test_fraction=0, channels=1)
    assert {case["patient_id"] for case in found.training} == {"p1", "p2"}
    assert found.count_classes("training") == {"no tumor": 16, "tumor": 2}
    assert {case["case_id"] for case in found.training if case["label"]} == {
        "p1_p1_early_slice001",
        "p1_p1_late_slice001",
    }
    assert found.geometry["p2_p2_early_slice000"] == ((4, 5), (1.0, 2.0))
    chain = deterministic("image2d", spatial_dims=2, spacing_mm=2)
    assert chain(found.training[0])["image"].shape == (1, 2, 5)


def test_all_label_values_are_foreground(tmp_path: Path) -> None:
    save(tmp_path / "images/a.nii.gz", volume())
    save(tmp_path / "labels/a.nii.gz", label((0, 0, 1), value=2) + label((1, 1, 4), value=255))
    write_slices(tmp_path / "out", tmp_path / "images", label_values=[2, 255])
    assert [name[-8] for name, shown in table(tmp_path / "out").items() if shown == "with"] == ["1", "4"]
    with pytest.raises(ValueError, match=r"a\.nii\.gz holds the value\(s\) 255, expected 0, 2"):
        write_slices(tmp_path / "other", tmp_path / "images", label_values=[2])
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path / "images/ward/a.nii.gz", volume())
    save(tmp_path / "labels/ward/a.nii.gz", label((0, 0, 0)))
    with pytest.raises(ValueError, match=r"patient_pattern finds 'ward/a', expected a name for a folder"):
        write_slices(tmp_path / "out", tmp_path / "images", patient_pattern="ward/a")
    with pytest.raises(ValueError, match="classes: expected two names"):
        write_slices(tmp_path / "out", tmp_path / "images", classes=["tumor"])
    write_slices(tmp_path / "out", tmp_path / "images")
    with pytest.raises(FileExistsError, match="images exists: choose another output_dir"):
        write_slices(tmp_path / "out", tmp_path / "images")


def test_real_volumes(tmp_path: Path) -> None:
    source = real_data("lgg_flair_mr")
    name = "TCGA_CS_5396_20010302"
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.nii.gz").symlink_to(source / folder / f"{name}.nii.gz")
    write_slices(tmp_path / "out", tmp_path / "images")
    shown = table(tmp_path / "out")
    assert len(shown) == 22 and list(shown.values()).count("with") == 11  # 24 slices, two of them black
    drawn = np.asarray(nib.load(source / f"labels/{name}.nii.gz").dataobj).any((0, 1))
    assert {int(path[-10:-7]) for path, label in shown.items() if label == "with"} == set(np.flatnonzero(drawn))
    assert load_image(tmp_path / f"out/images/{name}/{name}_slice012.nii.gz").shape == (256, 256)
