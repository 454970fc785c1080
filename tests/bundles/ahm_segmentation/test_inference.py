# SPDX-License-Identifier: Apache-2.0
"""Inference: NIfTI, pictures and DICOM in; NIfTI on the scan's own grid, DICOM SEG and a quick look out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import ITKReader
from monai.transforms import LoadImage
from PIL import Image
from pydicom import dcmread

from tests.bundles.ahm_segmentation.segmenting import (
    CLASSES,
    infer,
    message_of,
    planted,
    train,
    write_case,
    write_labelled,
    write_threshold,
)
from tests.bundles.running import OBLIQUE_LIA, SEGMENTATION, TINY_UNET, run_bundle
from tests.bundles.running import train as pretrain
from tests.fixtures_data import OBLIQUE, PATIENT_ID, PATIENT_NAME, write_nifti, write_radiograph, write_series


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("volumes"), 4)


@pytest.fixture(scope="module")
def trained(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(volumes, output, spacing_mm=1.5)
    return output / "models/model.pt"


def result(folder: Path, case: str) -> nib.Nifti1Image:
    return nib.load(folder / case / f"{case}_seg.nii.gz")


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 3.0, 1.0]), OBLIQUE_LIA], ids=["anisotropic", "oblique"])
def test_bright_box_is_found_where_it_is(tmp_path: Path, affine: np.ndarray, dims: int) -> None:
    write_case(tmp_path / "data", "scan", (planted(0) == 1).astype(np.uint8), affine)
    options = write_threshold(tmp_path / "model.pt", dims)
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "model.pt", **options)

    image = result(tmp_path / "out", "images_scan")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(image.dataobj, planted(0) == 1)


def test_settings_of_the_training_need_not_be_repeated(trained: Path, tmp_path: Path) -> None:
    values = write_nifti(tmp_path / "data/ward/scan.nii.gz", (20, 26, 19), OBLIQUE_LIA)
    run = infer(tmp_path / "data", tmp_path / "out", trained)
    assert run.parser.get_parsed_content("classes") == CLASSES
    assert run.parser.get_parsed_content("spacing_mm") == 1.5
    assert run.parser.get_parsed_content("inferer").roi_size == (16, 16, 16)
    assert written(tmp_path / "out") == [
        "results.json",
        "ward_scan/ward_scan_quicklook.png",
        "ward_scan/ward_scan_seg.nii.gz",
    ]
    image = result(tmp_path / "out", "ward_scan")
    assert image.shape == values.shape
    np.testing.assert_allclose(image.affine, OBLIQUE_LIA, atol=1e-4)


def test_one_file_is_enough(trained: Path, tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz")
    infer(tmp_path / "scan.nii.gz", tmp_path / "out", trained)
    assert result(tmp_path / "out", "scan").shape == (12, 13, 14)


def test_scan_smaller_than_the_window(trained: Path, tmp_path: Path) -> None:
    write_nifti(tmp_path / "data/scan.nii.gz", (9, 11, 7))
    infer(tmp_path / "data", tmp_path / "out", trained, spacing_mm=1.0)
    assert result(tmp_path / "out", "scan").shape == (9, 11, 7)


def test_overlapping_windows_cover_a_large_scan(tmp_path: Path) -> None:
    label = np.zeros((50, 20, 40), np.uint8)
    label[2:48, 3:17, 5:35] = 1
    write_case(tmp_path / "data", "scan", label)
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "model.pt", **write_threshold(tmp_path / "model.pt"))
    np.testing.assert_array_equal(result(tmp_path / "out", "images_scan").dataobj, label)


@pytest.mark.parametrize("channels", [1, 3])
def test_picture(tmp_path: Path, channels: int) -> None:
    square = np.zeros((40, 56), np.uint8)
    square[5:20, 30:50] = 255
    pixels = np.stack([square] * channels, -1).squeeze()
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data/p.png")
    options = write_threshold(tmp_path / "model.pt", 2, modality="image2d", in_channels=channels)
    options["network_def"]["in_channels"] = channels
    content = torch.load(tmp_path / "model.pt")
    content["model"]["weight"] = content["model"]["weight"].expand(2, channels, 1, 1) / channels
    torch.save(content, tmp_path / "model.pt")
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "model.pt", **options)
    np.testing.assert_array_equal(np.squeeze(result(tmp_path / "out", "p").dataobj).T, square > 0)
    assert (tmp_path / "out/p/p_quicklook.png").is_file()


@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 1)])
def test_picture_in_nifti_keeps_shape_and_affine(tmp_path: Path, shape: tuple[int, ...]) -> None:
    square = np.zeros((40, 56), np.float32)
    square[5:20, 30:50] = 255
    affine = np.array([[-2.0, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]])
    (tmp_path / "data").mkdir()
    nib.save(nib.Nifti1Image(square.reshape(shape), affine), tmp_path / "data/p.nii.gz")
    options = write_threshold(tmp_path / "model.pt", 2, modality="image2d")
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "model.pt", **options)
    found = result(tmp_path / "out", "p")
    np.testing.assert_array_equal(found.dataobj, square.reshape(shape) > 0)
    np.testing.assert_allclose(found.affine, affine)


@pytest.mark.parametrize("whole_folder", [True, False], ids=["series", "one file"])
def test_dicom_comes_back_as_nifti_and_dicom_seg(tmp_path: Path, whole_folder: bool) -> None:
    values = write_series(
        tmp_path / "data" / PATIENT_ID, slices=9, size=(20, 24), orientation=OBLIQUE, reverse_names=True
    )
    options = write_threshold(tmp_path / "model.pt", 3 if whole_folder else 2, classes=["lesion"])
    source = tmp_path / "data" / PATIENT_ID
    source = source if whole_folder else next(source.iterdir())
    infer(source.parent if whole_folder else source, tmp_path / "out", tmp_path / "model.pt", **options)

    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    image, seg = result(tmp_path / "out", folder.name), dcmread(folder / f"{folder.name}_seg.dcm")
    assert (folder / f"{folder.name}_quicklook.png").is_file()
    truth = LoadImage(reader=ITKReader())(source)
    found = np.asarray(image.dataobj)
    assert found.shape == tuple(truth.shape)
    np.testing.assert_allclose(image.affine, truth.affine.numpy(), atol=1e-3)
    middle = np.percentile(truth.numpy(), [1, 99]).mean()
    assert np.mean(found == (truth.numpy() > middle)) > 0.99
    if whole_folder:
        assert np.mean(found == (values.transpose(2, 1, 0) > 250)) > 0.95

    (segment,) = seg.SegmentSequence
    assert segment.SegmentLabel == "lesion"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    assert seg.PatientID == PATIENT_ID
    for frame, groups in zip(seg.pixel_array.reshape(-1, 20, 24), seg.PerFrameFunctionalGroupsSequence, strict=True):
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float) * [-1, -1, 1]
        index = round(float((np.linalg.inv(image.affine) @ [*place, 1])[2]))
        np.testing.assert_array_equal(frame.T, found[:, :, index])
    assert seg.pixel_array.sum() == found.sum() > 0
    for name in written(tmp_path / "out"):
        assert not any(secret in name for secret in (PATIENT_ID, PATIENT_NAME))


def test_dicom_to_which_no_dicom_seg_can_refer_comes_back_as_nifti_and_is_told(tmp_path: Path) -> None:
    options = write_threshold(tmp_path / "model.pt", 2, modality="image2d")
    values = np.zeros((24, 20), np.int16)
    values[4:9, 6:15] = 4000
    for name, tags in (("good", {}), ("lacking", {"StudyInstanceUID": None})):
        write_radiograph(tmp_path / "data" / f"{name}.dcm", values, **tags)
    message = message_of(infer, tmp_path / "data", tmp_path / "out", tmp_path / "model.pt", **options)
    assert "1 of 2 case(s) failed" in message
    assert "lacking.dcm has no StudyInstanceUID, to which a DICOM SEG must refer" in message
    names = written(tmp_path / "out")
    assert sum(name.endswith("_seg.nii.gz") for name in names) == 2
    assert sum(name.endswith("_seg.dcm") for name in names) == 1


def test_bad_cases_do_not_stop_the_good_ones(
    volumes: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a_broken.nii.gz").write_text("this is no image")
    (data / "good.nii.gz").symlink_to(volumes / "scan0.nii.gz")
    write_nifti(data / "scout.nii.gz", (12, 13, 1))
    message = message_of(infer, data, tmp_path / "out", trained)
    assert "2 of 3 case(s) failed, the others are in" in message and "a_broken  failed" in message
    assert "scout.nii.gz has size (12, 13, 1), a single slice: expected a volume" in message
    assert "1 case(s) done, 2 failed" in caplog.text
    report = json.loads((tmp_path / "out/results.json").read_text())
    statuses = {case["case_id"]: case["status"] for case in report["cases"]}
    assert statuses == {"a_broken": "failed", "good": "ok", "scout": "failed"}
    assert result(tmp_path / "out", "good").shape == (20, 24, 18)
    assert not (tmp_path / "out/a_broken").exists()


def test_series_that_is_no_volume_is_told(trained: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "data" / PATIENT_NAME / "scout", slices=1)
    assert "holds no image" in message_of(infer, tmp_path / "data", tmp_path / "out", trained)
    for name in ("scan_1.0T", "scan_1.5T"):
        write_nifti(tmp_path / f"data/{name}.nii.gz", (12, 13, 14 if name == "scan_1.0T" else 15))
    infer(tmp_path / "data", tmp_path / "out", trained)
    text = (tmp_path / "out/results.json").read_text()
    report = json.loads(text)
    assert [case["status"] for case in report["cases"]] == ["skipped", "ok", "ok"]
    assert report["cases"][0]["case_id"].startswith("series-") and PATIENT_NAME not in text
    assert report["cases"][0]["reason"] == "a single slice"
    assert result(tmp_path / "out", "scan_1.0T").shape == (12, 13, 14)
    assert result(tmp_path / "out", "scan_1.5T").shape == (12, 13, 15)


def test_wrong_number_of_channels_is_told_by_case(trained: Path, tmp_path: Path) -> None:
    write_nifti(tmp_path / "data/scan.nii.gz", (20, 24, 18, 2))
    assert "scan.nii.gz has 2 channel(s), expected channels=1" in message_of(
        infer, tmp_path / "data", tmp_path / "out", trained
    )


def test_checkpoint_of_pretraining(volumes: Path, tmp_path: Path) -> None:
    pretrain(volumes, tmp_path / "run", max_epochs=1, min_epoch_length=1)
    path = tmp_path / "run/models/model.pt"
    message = message_of(infer, volumes, tmp_path / "out", path, backbone_args=TINY_UNET)
    assert f"{path}: a checkpoint of pretraining, expected one of segmentation" in message
    assert "--pretrained" in message
    assert written(tmp_path / "out") == []


def test_checkpoint_of_classification(volumes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task": "classification", "classes": ["benign", "malignant"], "spatial_dims": 3}
    torch.save({"model": {}, "provenance": {"settings": settings}}, tmp_path / "model.pt")
    message = message_of(infer, volumes, tmp_path / "out", tmp_path / "model.pt")
    assert "model.pt: a checkpoint of classification, expected one of segmentation" in message
    assert written(tmp_path / "out") == []


def test_other_classes_than_the_checkpoint_has(volumes: Path, trained: Path, tmp_path: Path) -> None:
    message = message_of(infer, volumes, tmp_path / "out", trained, classes=["liver", "spleen"])
    assert "trained for the classes ['box', 'slab'], got classes ['liver', 'spleen']" in message
    assert written(tmp_path / "out") == []


def test_another_network_than_the_checkpoint_has(volumes: Path, trained: Path, tmp_path: Path) -> None:
    message = message_of(infer, volumes, tmp_path / "out", trained, backbone="segresnet", backbone_args={})
    assert "model.pt: 'model' was saved from another architecture" in message


def test_missing_and_damaged_checkpoint(volumes: Path, trained: Path, tmp_path: Path) -> None:
    assert "nowhere.pt: no such checkpoint" in message_of(infer, volumes, tmp_path / "out", tmp_path / "nowhere.pt")
    (tmp_path / "half.pt").write_bytes(trained.read_bytes()[:2000])
    assert "half.pt: not a readable checkpoint" in message_of(infer, volumes, tmp_path / "out", tmp_path / "half.pt")


def test_missing_and_empty_folder(trained: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in message_of(infer, tmp_path / "nowhere", tmp_path / "out", trained)
    (tmp_path / "data").mkdir()
    assert "holds no image" in message_of(infer, tmp_path / "data", tmp_path / "out", trained)


def test_tensorrt_overlay_changes_nothing_without_cuda(volumes: Path, trained: Path, tmp_path: Path) -> None:
    scan = volumes / "scan0.nii.gz"
    infer(scan, tmp_path / "plain", trained)
    options = {"dataset_dir": str(scan), "output_dir": str(tmp_path / "trt"), "checkpoint": str(trained)}
    run_bundle(["inference.json", "inference_trt.json"], "infer", bundle=SEGMENTATION, **options)
    assert written(tmp_path / "trt") == written(tmp_path / "plain")
    plain, other = (result(tmp_path / name, "scan0") for name in ("plain", "trt"))
    np.testing.assert_array_equal(plain.dataobj, other.dataobj)
