# SPDX-License-Identifier: Apache-2.0
"""Radiographs and other DICOM images without a position in space: pictures, each a case of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from ahm_transforms import recipes
from ahm_transforms.io import (
    BadCasesError,
    find_cases,
    find_inputs,
    load_cases,
    load_classification_cases,
    load_image,
    load_segmentation_cases,
)
from ahm_transforms.io.dicom_seg import SaveDicomSegd
from ahm_transforms.io.segments import Segment
from tests.fixtures_data import PATIENT_ID, PATIENT_NAME, write_nifti, write_radiograph, write_series, write_slice

PICTURES: dict[str, Any] = {"spatial_dims": 2, "pictures": True}
ROWS, COLUMNS = 24, 20


def values(number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 4096, (ROWS, COLUMNS)).astype(np.int16)


def write_patients(folder: Path, count: int = 6) -> Path:
    """Write a frontal and a lateral view of each patient, in one series."""
    for number in range(count):
        series = generate_uid()
        for view in ("frontal", "lateral"):
            tags = {"PatientID": f"P{number}", "SeriesInstanceUID": series}
            write_radiograph(folder / f"p{number}" / f"{view}.dcm", values(number), **tags)
    return folder


def test_each_image_is_a_case_and_views_of_a_patient_stay_together(tmp_path: Path) -> None:
    cases = load_cases(write_patients(tmp_path), **PICTURES, val_fraction=0.5)
    assert (len(cases.training), len(cases.validation)) == (6, 6)
    parts = [{case["patient_id"] for case in part} for part in (cases.training, cases.validation)]
    assert [len(part) for part in parts] == [3, 3] and not parts[0] & parts[1]
    every = cases.training + cases.validation
    assert len({case["case_id"] for case in every}) == 12
    told = str([case["case_id"] + case["patient_id"] for case in every])
    assert PATIENT_NAME not in told and not any(f"P{number}" in told for number in range(6))
    assert {geometry.shape for geometry in cases.geometry.values()} == {(COLUMNS, ROWS)}


def test_files_that_share_a_uid_are_told_and_those_without_one_are_told_apart(tmp_path: Path) -> None:
    series = generate_uid()
    for number in range(3):
        tags = {"SeriesInstanceUID": series, "SOPInstanceUID": series if number else None, "PatientID": None}
        write_radiograph(tmp_path / f"p{number}/frontal.dcm", values(number), **tags)
    write_radiograph(tmp_path / "p3/frontal.dcm", values(3), SeriesInstanceUID=series, SOPInstanceUID=None)
    found = find_inputs(tmp_path, pictures=True)
    assert len({case["case_id"] for case in found.cases}) == 3 and not found.bad
    assert found.left_out == [("p2/frontal.dcm", "another file has its SOPInstanceUID")]


def test_in_a_datalist_they_are_called_as_in_a_folder(tmp_path: Path) -> None:
    folder = write_patients(tmp_path)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.dcm"))]
    cases = load_cases(folder, datalist={"training": names}, **PICTURES, val_fraction=0.5)
    searched = load_cases(folder, **PICTURES, val_fraction=0.5)
    assert (cases.training, cases.validation) == (searched.training, searched.validation)
    listed = {"training": [{"image": names[0], "patient_id": "p"}, {"image": [names[1]]}]}
    few = load_cases(folder, datalist=listed, **PICTURES, val_fraction=0).training
    told = {str(case["image"]): case["patient_id"] for case in few}
    assert told[str(folder / names[0])] == "p" and told[str([str(folder / names[1])])].startswith("patient-")
    path = write_radiograph(folder / names[0], np.zeros((60, 60), np.int16))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(BadCasesError, match=r"frontal\.dcm: cannot be used: the file ends early"):
        load_cases(folder, datalist={"training": names}, **PICTURES)


def test_without_being_asked_for_they_are_left_out(tmp_path: Path) -> None:
    write_patients(tmp_path, 1)
    write_nifti(tmp_path / "scan.nii.gz")
    cases = load_cases(tmp_path, val_fraction=0)
    assert [Path(case["image"]).name for case in cases.training] == ["scan.nii.gz"]
    assert ["without position" in item.reason for item in cases.left_out] == [True]


def test_volumes_localizers_clips_and_segmentations_are_no_pictures(tmp_path: Path) -> None:
    write_radiograph(tmp_path / "good.dcm", values())
    write_series(tmp_path / "ct")
    write_radiograph(tmp_path / "clip.dcm", values(), NumberOfFrames=1, Modality="US")
    clip = pydicom.dcmread(tmp_path / "clip.dcm")
    clip.NumberOfFrames, clip.PixelData = 2, 2 * clip.PixelData
    clip.save_as(tmp_path / "clip.dcm")
    write_radiograph(tmp_path / "seg.dcm", values(), Modality="SEG")
    write_radiograph(tmp_path / "scout.dcm", values(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice(tmp_path / "slice.dcm", values(), SeriesInstanceUID=generate_uid(), ImagePositionPatient=[0, 0, 0])
    found = find_cases(tmp_path, pictures=True)
    assert sorted(len(case["image"]) if isinstance(case["image"], list) else 1 for case in found.cases) == [1, 6]
    reasons = {item.name: item.reason for item in found.left_out}
    assert reasons["scout.dcm"] == "a localizer"
    assert "multi-frame" in reasons["clip.dcm"] and "holds no image" in reasons["seg.dcm"]
    assert "a single slice" in reasons["series 3 in ."] and not found.bad


def test_volumes_are_bad_where_pictures_are_expected(tmp_path: Path) -> None:
    write_patients(tmp_path, 2)
    write_series(tmp_path / "ct")
    write_nifti(tmp_path / "scan.nii.gz")
    with pytest.raises(BadCasesError) as caught:
        load_cases(tmp_path, **PICTURES)
    assert str(caught.value).count("expected a picture for modality image2d") == 2
    assert len(load_cases(tmp_path, **PICTURES, skip_bad=True, val_fraction=0).training) == 4


def test_damaged_ones_are_named(tmp_path: Path) -> None:
    write_patients(tmp_path, 2)
    path = write_radiograph(tmp_path / "p0/frontal.dcm", np.zeros((60, 60), np.int16))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(BadCasesError, match=r"p0/frontal\.dcm: the file ends early"):
        load_cases(tmp_path, **PICTURES)
    cases = load_cases(tmp_path, **PICTURES, skip_bad=True, val_fraction=0)
    assert len(cases.training) == 3


def test_a_picture_is_read_as_a_png_is(tmp_path: Path) -> None:
    stored = values()
    dicom = write_radiograph(tmp_path / "a.dcm", stored, RescaleSlope=2.0, RescaleIntercept=-5.0)
    Image.fromarray(stored.astype(np.uint16)).save(tmp_path / "a.png")
    image, png = load_image(dicom), load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.numpy(), 2 * stored.T - 5)
    np.testing.assert_array_equal(png.numpy(), stored.T)
    chain = recipes.deterministic("image2d", spatial_dims=2, spacing_mm=2)
    one, other = (chain({"image": str(path)})["image"] for path in (dicom, tmp_path / "a.png"))
    assert one.shape == other.shape == (1, COLUMNS // 2, ROWS // 2)
    np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-6)
    np.testing.assert_array_equal(one.affine.numpy(), other.affine.numpy())


def test_what_is_dense_is_bright_in_both_photometric_interpretations(tmp_path: Path) -> None:
    stored = values()
    plain = load_image(write_radiograph(tmp_path / "a.dcm", stored)).numpy()
    turned = write_radiograph(tmp_path / "b.dcm", 4095 - stored, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(load_image(turned).numpy(), plain)


def test_colours_are_channels(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS, 3)).astype(np.uint8)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "US"}
    tags |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": colours.tobytes()}
    path = write_radiograph(tmp_path / "a.dcm", values(), **tags)
    np.testing.assert_array_equal(load_image(path).numpy(), colours.transpose(1, 0, 2))
    with pytest.raises(BadCasesError, match="has 3 channel"):
        load_cases(tmp_path, **PICTURES, channels=1)
    (case,) = load_cases(tmp_path, **PICTURES, channels=3, val_fraction=0).training
    chain = recipes.deterministic("image2d", spatial_dims=2, channels=3)
    assert chain(case)["image"].shape == (3, COLUMNS, ROWS)


def test_pixels_that_share_their_colour_are_no_file_that_ends_early(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (100, 80)).astype(np.uint8)
    stored = np.full((100, 40, 4), 128, np.uint8)  # two of brightness, then blue and red for both
    stored[..., :2] = grey.reshape(100, 40, 2)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 0}
    tags |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "Modality": "US", "PixelData": stored.tobytes()}
    path = write_radiograph(tmp_path / "a.dcm", grey, **tags)
    (case,) = load_cases(tmp_path, **PICTURES, channels=3, val_fraction=0).training
    np.testing.assert_allclose(load_image(case["image"]).numpy(), np.stack([grey.T] * 3, axis=-1), atol=1)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(BadCasesError, match="the file ends early"):
        load_cases(tmp_path, **PICTURES, channels=3)


def test_classes_come_from_folders_and_tables(tmp_path: Path) -> None:
    for number in range(4):
        name = ("healthy", "ill")[number % 2]
        write_radiograph(tmp_path / "x" / name / f"{number}.dcm", values(number), PatientID=f"P{number}")
    options: dict[str, Any] = {**PICTURES, "classes": ["healthy", "ill"], "val_fraction": 0, "test_fraction": 0}
    labels = {
        Path(case["image"]).stem: case["label"] for case in load_classification_cases(tmp_path, **options).training
    }
    assert labels == {"0": 0, "1": 1, "2": 0, "3": 1}
    (tmp_path / "table.csv").write_text(
        "image,label\n"
        + "".join(f"x/{('healthy', 'ill')[n % 2]}/{n}.dcm,{('ill', 'healthy')[n % 2]}\n" for n in range(4))
    )
    table = load_classification_cases(tmp_path / "", labels_csv=tmp_path / "table.csv", **options)
    assert {Path(case["image"]).stem: case["label"] for case in table.training} == {"0": 1, "1": 0, "2": 1, "3": 0}


@pytest.mark.parametrize("suffix", [".dcm", ".dicom", ".DCM", ""])
def test_masks_have_the_names_of_the_files(tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        write_radiograph(tmp_path / f"images/1.2.{number}{suffix}", values(number), PatientID=f"P{number}")
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        mask[2:8, 3:9] = 1
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"labels/1.2.{number}.png")
    options: dict[str, Any] = {**PICTURES, "classes": ["lung"], "val_fraction": 0, "test_fraction": 0}
    cases = load_segmentation_cases(tmp_path / "images", **options)
    names = [(Path(case["image"]).name, f"{Path(case['label']).stem}{suffix}") for case in cases.training]
    assert len(names) == 3 and all(image == label for image, label in names)


def test_a_nifti_label_may_lie_anywhere_as_the_picture_does(tmp_path: Path) -> None:
    write_radiograph(tmp_path / "images/a.dcm", values())
    (tmp_path / "labels").mkdir()
    label = nib.Nifti1Image(np.ones((COLUMNS, ROWS), np.uint8), np.diag([-0.14, -0.14, 1, 1]))
    nib.save(label, tmp_path / "labels/a.nii.gz")
    options: dict[str, Any] = {**PICTURES, "classes": ["lung"], "val_fraction": 0, "test_fraction": 0}
    (case,) = load_segmentation_cases(tmp_path / "images", **options).training
    ready = recipes.segmentation_deterministic("image2d", spatial_dims=2, num_classes=1)(case)
    assert ready["image"].shape == ready["label"].shape == (1, COLUMNS, ROWS)


def test_inference_takes_a_folder_or_one_file(tmp_path: Path) -> None:
    folder = write_patients(tmp_path, 2)
    found = find_inputs(folder, pictures=True)
    assert len(found.cases) == 4 and not found.left_out and not found.bad
    (alone,) = find_inputs(folder / "p0/frontal.dcm").cases
    assert alone["case_id"] in {case["case_id"] for case in found.cases}
    assert load_image(alone["image"]).shape == (COLUMNS, ROWS)


EMPTY_PLACE = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"), "")


@pytest.mark.parametrize("tags", [{"PatientOrientation": ["L", "F"]}, EMPTY_PLACE], ids=["turned", "empty place"])
def test_a_segmentation_is_written_as_dicom_seg(tmp_path: Path, tags: dict[str, Any]) -> None:
    hd = pytest.importorskip("highdicom")
    path = write_radiograph(tmp_path / "a.dcm", values(), **tags)
    classes = np.zeros((1, COLUMNS, ROWS), np.uint8)
    classes[0, 3:9, 2:5] = 1
    segments = [Segment("lung", ("123037004", "SCT", "Anatomical Structure"), ("39607008", "SCT", "Lung"))]
    save = SaveDicomSegd("pred", tmp_path / "out", segments, separate_folder=False)
    save({"pred": load_image(path)[None].new_tensor(classes), "files": [str(path)], "case_id": "a"})
    seg = hd.seg.segread(tmp_path / "out/a_seg.dcm")
    image = pydicom.dcmread(path)
    assert (seg.PatientID, seg.StudyInstanceUID) == (PATIENT_ID, image.StudyInstanceUID)
    frame = seg.get_pixels_by_source_instance([image.SOPInstanceUID], combine_segments=True)[0]
    np.testing.assert_array_equal(frame, classes[0].T)


@pytest.mark.parametrize("tag", ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
def test_what_a_dicom_seg_cannot_refer_to_is_named(tmp_path: Path, tag: str) -> None:
    path = write_radiograph(tmp_path / "a.dcm", values(), **{tag: None})
    save = SaveDicomSegd("pred", tmp_path / "out", [])
    with pytest.raises(ValueError, match=rf"a\.dcm has no {tag}, to which a DICOM SEG must refer"):
        save({"pred": load_image(path)[None], "files": [str(path)], "case_id": "a"})
