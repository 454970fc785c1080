# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ahm_transforms.io import BadCasesError, LeftOut, find_cases, load_cases
from ahm_transforms.io.check import check_cases
from tests.fixtures_data import real_data, write_nifti, write_series


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_every_bad_file_is_listed_with_its_reason(tmp_path: Path) -> None:
    for name in ("good", "truncated", "short"):
        write_nifti(tmp_path / f"{name}.nii.gz", (20, 20, 20))
    truncate(tmp_path / "truncated.nii.gz")
    (tmp_path / "text.nii.gz").write_text("this is no image")
    (tmp_path / "empty.nii").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG broken")
    write_nifti(tmp_path / "flat.nii.gz", (20, 20))
    write_nifti(tmp_path / "small.nii.gz", (20, 4, 20))
    write_nifti(tmp_path / "channels.nii.gz", (20, 20, 20, 2))
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path, min_size=8, channels=1)
    reasons = {bad.name: bad.reason for bad in caught.value.bad}
    assert set(reasons) == {
        *("truncated.nii.gz", "text.nii.gz", "empty.nii", "picture.png"),
        *("flat.nii.gz", "small.nii.gz", "channels.nii.gz"),
    }
    for name in ("truncated.nii.gz", "text.nii.gz", "empty.nii", "picture.png"):
        assert "cannot be read" in reasons[name]
    assert "expected 3 spatial axes" in reasons["flat.nii.gz"]
    assert "has size (20, 4, 20), smaller than one patch (8, 8, 8)" in reasons["small.nii.gz"]
    assert "has 2 channel(s), expected 1" in reasons["channels.nii.gz"]
    text = str(caught.value)
    assert "--skip_bad true" in text
    assert all(name in text and reason in text for name, reason in reasons.items())


def test_headers_that_mislead_are_bad_cases(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    for unit in ("micron", "meter", "mm", "unknown"):
        image = nib.Nifti1Image(values, np.eye(4))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / f"{unit}.nii.gz")
    nib.save(nib.Nifti1Image(values + 1j, np.eye(4)), tmp_path / "complex.nii.gz")
    colours = np.zeros(values.shape, [(name, np.uint8) for name in "RGB"])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "colours.nii.gz")
    for name, place in (("flat", np.zeros(12)), ("nan", np.array([1, 0, 0, np.nan, 0, 1, 0, 0, 0, 0, 1, 0]))):
        image = nib.Nifti1Image(values, np.eye(4))
        image.header["sform_code"], image.header["qform_code"] = 1, 0
        for row, key in zip(place.reshape(3, 4), ("srow_x", "srow_y", "srow_z"), strict=True):
            image.header[key] = row
        header = image.header.binaryblock + bytes(4)
        (tmp_path / f"{name}.nii").write_bytes(header + values.tobytes())
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path)
    reasons = {bad.name: bad.reason.removeprefix("cannot be read: ValueError: ") for bad in caught.value.bad}
    assert set(reasons) == {"micron.nii.gz", "meter.nii.gz", "complex.nii.gz", "colours.nii.gz", "flat.nii", "nan.nii"}
    assert reasons["micron.nii.gz"] == "spacing is in micron, expected mm"
    assert reasons["meter.nii.gz"] == "spacing is in meter, expected mm"
    assert reasons["complex.nii.gz"].startswith("holds complex values")
    assert reasons["colours.nii.gz"].startswith("holds RGB colours")
    assert reasons["flat.nii"] == reasons["nan.nii"]
    assert reasons["nan.nii"].startswith("the affine is singular or not finite")


def test_a_single_slice_is_bad_for_a_network_of_volumes(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scout.nii.gz", (12, 13, 1))
    write_nifti(tmp_path / "volume.nii.gz")
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path, val_fraction=0)
    reasons = {bad.name: bad.reason for bad in caught.value.bad}
    assert reasons == {"scout.nii.gz": "has size (12, 13, 1), a single slice: expected a volume for spatial_dims=3"}
    assert len(load_cases(tmp_path, spatial_dims=2, val_fraction=0).training) == 2


def test_skip_bad_leaves_them_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_nifti(tmp_path / "good.nii.gz")
    (tmp_path / "text.nii.gz").write_text("no image")
    with caplog.at_level(logging.WARNING):
        cases = load_cases(tmp_path, skip_bad=True, val_fraction=0)
    assert [case["case_id"] for case in cases.training] == ["good"]
    assert [left.name for left in cases.left_out] == ["text.nii.gz"]
    assert "text.nii.gz" in caplog.text
    (tmp_path / "good.nii.gz").unlink()
    with pytest.raises(BadCasesError, match=r"text\.nii\.gz"):
        load_cases(tmp_path, skip_bad=True)


def test_truncated_pictures_are_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    truncate(tmp_path / "a.png")
    with pytest.raises(BadCasesError, match=r"a\.png: cannot be read"):
        load_cases(tmp_path, spatial_dims=2)


def test_nan_and_constant_images_are_reported_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(values * 0 + 5, np.eye(4)), tmp_path / "constant.nii.gz")
    values[2, 3, 4] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii.gz")
    with caplog.at_level(logging.WARNING):
        cases = load_cases(tmp_path, val_fraction=0)
    assert len(cases.training) == 2
    assert "constant.nii.gz (constant), nan.nii.gz (NaN or infinite)" in caplog.text


def test_images_that_look_like_label_maps_are_reported_and_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    for index in range(7):
        labels = random.integers(0, 64, (40, 8, 8)).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"map{index}.nii.gz")
    nib.save(nib.Nifti1Image(labels / np.float32(2), np.eye(4)), tmp_path / "halves.nii.gz")
    labels[3, 4, 5], labels[4, 5, 6] = 200, 201  # rarely looked at
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "more.nii.gz")
    write_nifti(tmp_path / "scan.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert len(load_cases(tmp_path, val_fraction=0).training) == 10
    (message,) = caplog.messages
    assert message == (
        "7 image(s) hold no more than 64 different whole numbers and look like label maps: "
        "map0.nii.gz, map1.nii.gz, map2.nii.gz, map3.nii.gz, map4.nii.gz, ..."
    )


def test_copies_of_another_patients_image_are_reported_and_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.random.default_rng(0).random((8, 9, 700)).astype(np.float32)
    named = {"p1_a": values, "p1_b": values, "p2_a": values, "p3_a": values.reshape(9, 8, 700), "p4_a": values}
    named |= {"p5_a": np.where(values == values[3, 4, 10], 2, values)}  # one voxel differs
    named |= {"p6_a": np.zeros_like(values), "p7_a": np.zeros_like(values)}
    for name, array in named.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    options = {"patient_pattern": r"(p\d)", "val_fraction": 0, "cache_dir": tmp_path / "cache"}
    for _ in range(2):  # read, and remembered
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(load_cases(tmp_path, **options).training) == len(named)
        (message,) = [message for message in caplog.messages if "copies" in message]
        assert message.startswith(
            "2 image(s) look like copies of another patient's: p2_a.nii.gz of p1_a.nii.gz; p4_a.nii.gz of p1_a.nii.gz. "
        )
    caplog.clear()
    load_cases(tmp_path, **options | {"patient_pattern": r"(p)"})
    assert "copies" not in caplog.text


def test_sizes_are_compared_in_the_axes_that_the_recipe_sees(tmp_path: Path) -> None:
    sagittal = np.array([[0, 0, 4.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # slices along the last axis
    write_nifti(tmp_path / "a.nii.gz", (30, 28, 6), sagittal)
    assert load_cases(tmp_path, min_size=(6, 30, 28)).geometry["a"] == ((6, 30, 28), (4.0, 1.0, 1.0))
    with pytest.raises(BadCasesError, match=r"\(6, 30, 28\), smaller than one patch \(8, 8, 8\)"):
        load_cases(tmp_path, min_size=8)


def test_volumes_serve_2d_and_only_the_slices_must_be_large_enough(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (30, 28, 2))
    assert load_cases(tmp_path, spatial_dims=2, min_size=16, val_fraction=0).training


@pytest.mark.parametrize(("free", "workers"), [(10**12, 8), (3 * 12 * 16 * 20 * 30, 3), (10, 1)])
def test_no_more_images_are_read_at_a_time_than_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, workers: int
) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    write_series(tmp_path / "series", slices=30)  # the largest
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "text.nii.gz").write_text("no image")
    pools: list[int] = []

    def pool(max_workers: int) -> ThreadPoolExecutor:
        pools.append(max_workers)
        return ThreadPoolExecutor(max_workers)

    monkeypatch.setattr("ahm_transforms.io.check.available_memory", lambda: free)
    monkeypatch.setattr("ahm_transforms.io.check.ThreadPoolExecutor", pool)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
    cases = [{"image": str(path), "case_id": path.name, "patient_id": path.name} for path in files]
    checked = check_cases([*cases, *find_cases(tmp_path / "series").cases], spatial_dims=2)
    assert len(checked.cases) == 3 and len(checked.bad) == 1
    assert pools == [workers]


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadCasesError([LeftOut("a", "b")])))
    assert error.bad == [("a", "b")]


@pytest.mark.parametrize(
    ("folder", "dims", "count", "copies"),
    [
        ("hippocampus_mr/images", 3, 160, ""),
        (
            "busi_ultrasound/images",
            2,
            780,
            "1 image(s) look like copies of another patient's: malignant_145",
        ),
    ],
)
def test_real_folders_are_clean_but_for_a_copy(
    folder: str, dims: int, count: int, copies: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        cases = load_cases(real_data(folder), spatial_dims=dims, min_size=16, channels=1)
    assert len(caplog.messages) == bool(copies) and copies in caplog.text
    assert len(cases.training) + len(cases.validation) == count
    assert len(cases.validation) == count // 5


def test_real_patients_with_two_phases_stay_together() -> None:
    cases = load_cases(real_data("acdc_cine_mr/images"), patient_pattern=r"(patient\d+)", spatial_dims=2)
    summary = cases.summary()
    assert (summary["training_patients"], summary["training_cases"]) == (8, 16)
    assert (summary["validation_patients"], summary["validation_cases"]) == (2, 4)


def test_many_cases_with_one_reason_are_one_line_and_all_are_kept() -> None:
    bad = [LeftOut(f"scan{number}", "label all empty") for number in range(30)] + [LeftOut("other", "too small")]
    error = BadCasesError(bad)
    assert str(error).startswith("31 case(s) cannot be used:")
    assert "30 such as scan0, scan1, scan2, scan3, scan4: label all empty" in str(error)
    assert "other: too small" in str(error)
    assert error.bad == bad


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pictures_are_refused_where_volumes_are_expected(tmp_path: Path, spatial_dims: int) -> None:
    for suffix in ("png", "jpg", "tif"):
        Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / f"a_{suffix}.{suffix}")
    write_nifti(tmp_path / "slice.nii.gz", (8, 10))
    write_nifti(tmp_path / "volume.nii.gz")
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path, spatial_dims=spatial_dims, pictures=False)
    assert {name for name, _ in caught.value.bad} == {"a_png.png", "a_jpg.jpg", "a_tif.tif", "slice.nii.gz"}
    assert all("size (" in reason and "pass --modality image2d" in reason for _, reason in caught.value.bad)
    assert len(load_cases(tmp_path, spatial_dims=2, val_fraction=0).training) == 5


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("p1/T1", "p2/T1", "p2/T2"):
        write_nifti(tmp_path / f"{name}.nii.gz")
        truncate(tmp_path / f"{name}.nii.gz")
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path)
    assert [bad.name for bad in caught.value.bad] == ["T1.nii.gz (p1_T1)", "T1.nii.gz (p2_T1)", "T2.nii.gz"]


def test_pictures_want_two_dimensions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 2 for pictures \(modality image2d\), got 3: pass --spatial_dims 2"):
        load_cases(tmp_path, pictures=True)
