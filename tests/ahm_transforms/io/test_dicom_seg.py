# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import ComputedRadiographyImageStorage, generate_uid

from ahm_transforms.io import load_image
from ahm_transforms.io.dicom_seg import SaveDicomSegd, write_dicom_seg
from ahm_transforms.io.find import find_cases
from ahm_transforms.io.segments import Code, Segment, read_segments
from tests.fixtures_data import OBLIQUE, PATIENT_ID, PATIENT_NAME, write_nifti, write_series

TUMOR = Segment(
    "tumor",
    Code("49755003", "SCT", "Morphologically Abnormal Structure"),
    Code("108369006", "SCT", "Neoplasm"),
)
EDEMA = Segment("Ödem", Code("85756007", "SCT", "Tissue"), Code("OEDEMA", "99AHM", "Ödem"))


def series(folder: Path, **options: Any) -> list[str]:
    """Write a series and return its files as inference gets them."""
    write_series(folder, **({"FrameOfReferenceUID": generate_uid(), "orientation": OBLIQUE} | options))
    if options.get("slices") == 1:
        return [str(path) for path in folder.iterdir()]
    (case,) = find_cases(folder).cases
    return list(case["image"])


def planted(files: list[str]) -> np.ndarray:
    """Class 1 in a box, class 2 in one voxel of another slice."""
    labels = np.zeros(tuple(load_image(files).shape), np.uint8)
    labels[2:7, 3:5, 1:3] = 1
    labels[11, 9, 4] = 2
    return labels


def frames_by_source(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """Return every frame by segment number and the UID of the slice it was made from."""
    seg = pydicom.dcmread(path)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    frames = {}
    for groups, frame in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        frames[number, str(source.ReferencedSOPInstanceUID)] = frame
    return frames


def test_each_frame_is_that_of_its_slice_and_empty_frames_are_left_out(tmp_path: Path) -> None:
    files = series(tmp_path / "s", reverse_names=True)
    labels = planted(files)
    path = write_dicom_seg(labels, files, tmp_path / "seg.dcm", [TUMOR, EDEMA])

    wanted = {}
    for place, name in enumerate(files):
        for number in (1, 2):
            if (labels[..., place] == number).any():
                wanted[number, str(pydicom.dcmread(name).SOPInstanceUID)] = (labels[..., place] == number).T
    found = frames_by_source(path)
    assert found.keys() == wanted.keys()
    for key, frame in wanted.items():
        np.testing.assert_array_equal(found[key], frame)


def test_frames_lie_where_their_slices_lie(tmp_path: Path) -> None:
    files = series(tmp_path / "s")
    seg = pydicom.dcmread(write_dicom_seg(planted(files), files, tmp_path / "seg.dcm", [TUMOR, EDEMA]))
    headers = {pydicom.dcmread(name).SOPInstanceUID: pydicom.dcmread(name) for name in files}
    first = next(iter(headers.values()))
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert seg.FrameOfReferenceUID == first.FrameOfReferenceUID
    np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, OBLIQUE, atol=1e-6)
    assert shared.PixelMeasuresSequence[0].PixelSpacing == first.PixelSpacing
    assert len(seg.PerFrameFunctionalGroupsSequence) == 3
    for groups in seg.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, headers[source].ImagePositionPatient, atol=1e-5)


def test_segments_patient_and_study_are_told(tmp_path: Path) -> None:
    files = series(tmp_path / "s", StudyDate="20200102", AccessionNumber="A7", SeriesNumber=4)
    path = write_dicom_seg(planted(files), files, tmp_path / "seg.dcm", [TUMOR, EDEMA], series_description="Tumor")
    seg, source = hd.seg.segread(path), pydicom.dcmread(files[0])
    assert (seg.SegmentationType, seg.Modality, seg.SeriesDescription) == ("BINARY", "SEG", "Tumor")
    assert (seg.PatientName, seg.PatientID, seg.StudyDate, seg.AccessionNumber) == (
        PATIENT_NAME,
        PATIENT_ID,
        "20200102",
        "A7",
    )
    assert seg.StudyInstanceUID == source.StudyInstanceUID
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.SeriesNumber == 1004
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
    for number, segment in enumerate((TUMOR, EDEMA), start=1):
        told = seg.get_segment_description(number)
        assert told.segment_label == segment.name
        assert told.algorithm_type == hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC
        assert told.algorithm_identification.name == "monai-ahm"
        assert told.algorithm_identification.version
        for concept, code in (
            (told.segmented_property_category, segment.category),
            (told.segmented_property_type, segment.type),
        ):
            assert (concept.value, concept.scheme_designator, concept.meaning) == code


def test_a_class_that_was_not_found_is_described(tmp_path: Path) -> None:
    files = series(tmp_path / "s")
    labels = planted(files)
    labels[labels == 1] = 0
    seg = hd.seg.segread(write_dicom_seg(labels, files, tmp_path / "seg.dcm", [TUMOR, EDEMA]))
    assert [seg.get_segment_description(number).segment_label for number in (1, 2)] == ["tumor", "Ödem"]
    assert seg.NumberOfFrames == 1


def test_nothing_found_is_one_empty_frame_per_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = series(tmp_path / "s")
    with caplog.at_level(logging.WARNING):
        path = write_dicom_seg(np.zeros((20, 16, 6)), files, tmp_path / "seg.dcm", [TUMOR, EDEMA])
    first = str(pydicom.dcmread(files[0]).SOPInstanceUID)
    found = frames_by_source(path)
    assert found.keys() == {(1, first), (2, first)}
    assert not any(frame.any() for frame in found.values())
    assert not caplog.records
    assert hd.seg.segread(path).number_of_segments == 2


@pytest.mark.parametrize("tags", [{}, {"SOPClassUID": ComputedRadiographyImageStorage, "ImagePositionPatient": None}])
def test_a_single_slice_with_or_without_a_position(tmp_path: Path, tags: dict) -> None:
    if tags:
        tags = {**tags, "ImageOrientationPatient": None, "FrameOfReferenceUID": None}
    files = series(tmp_path / "s", slices=1, **tags)
    image = load_image(files)
    path = write_dicom_seg((image > 250).byte(), files, tmp_path / "seg.dcm", [TUMOR])
    np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array, pydicom.dcmread(files[0]).pixel_array > 250)


@pytest.mark.parametrize(
    "tags",
    [
        {"FrameOfReferenceUID": None},
        {"SliceThickness": None},
        {"PatientSex": "UN"},
        {"PatientID": None, "PatientName": None},
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"},
    ],
    ids=lambda tags: next(iter(tags)),
)
def test_headers_as_scanners_and_archives_leave_them(tmp_path: Path, tags: dict) -> None:
    files = series(tmp_path / "s", **tags)
    seg = hd.seg.segread(write_dicom_seg(planted(files), files, tmp_path / "seg.dcm", [TUMOR, EDEMA]))
    assert len(frames_by_source(tmp_path / "seg.dcm")) == 3
    assert seg.FrameOfReferenceUID
    if name := tags.get("PatientName"):
        assert str(seg.PatientName) == name


def test_no_patient_name_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = series(tmp_path / "s", PatientName="Smith")  # not in DICOM's form
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        write_dicom_seg(planted(files), files, tmp_path / "seg.dcm", [TUMOR, EDEMA])
    assert "Smith" not in caplog.text + "".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("shape", [(16, 20, 6), (20, 16, 5), (1, 20, 16, 6)])
def test_another_grid_is_refused(tmp_path: Path, shape: tuple) -> None:
    files = series(tmp_path / "s")
    with pytest.raises(ValueError, match=r"grid of the DICOM series, \(20, 16, 6\) \(columns, rows, slices\), got"):
        write_dicom_seg(np.zeros(shape), files, tmp_path / "seg.dcm", [TUMOR])
    assert not (tmp_path / "seg.dcm").exists()


def test_a_segmentation_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    from monai.transforms import Flip

    files = series(tmp_path / "s")
    image = load_image(files)
    labels = (image > 250).byte()
    write_dicom_seg(labels, files, tmp_path / "seg.dcm", [TUMOR])
    for axis in range(3):
        with pytest.raises(ValueError, match="does not lie where its DICOM series does"):
            write_dicom_seg(Flip(axis)(labels[None])[0], files, tmp_path / "seg.dcm", [TUMOR])
    with pytest.raises(ValueError, match="order in which they were loaded"):
        write_dicom_seg(labels, files[::-1], tmp_path / "seg.dcm", [TUMOR])


@pytest.mark.parametrize("value", [2, 0.4, -1])
def test_what_is_no_class_index_is_refused(tmp_path: Path, value: float) -> None:
    files = series(tmp_path / "s")
    labels = np.zeros((20, 16, 6), np.float32)
    labels[3, 4, 5] = value
    with pytest.raises(ValueError, match="class indices 0 to 1"):
        write_dicom_seg(labels, files, tmp_path / "seg.dcm", [TUMOR])


def test_an_interrupted_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = series(tmp_path / "s")
    path = write_dicom_seg(planted(files), files, tmp_path / "out.dcm", [TUMOR, EDEMA])
    before = path.read_bytes()

    def stop(self: Any, name: Path, *_: Any, **__: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pydicom.Dataset, "save_as", stop)
    with pytest.raises(OSError, match="disk full"):
        write_dicom_seg(planted(files), files, path, [TUMOR, EDEMA])
    assert path.read_bytes() == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["out.dcm", "s"]


def test_highdicom_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = series(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r'pip install "monai-ahm\[dicom\]"'):
        write_dicom_seg(planted(files), files, tmp_path / "seg.dcm", [TUMOR, EDEMA])


def test_transform_writes_for_dicom_and_passes_over_the_rest(tmp_path: Path) -> None:
    files = series(tmp_path / "s")
    write_nifti(tmp_path / "scan.nii.gz")
    save = SaveDicomSegd("pred", tmp_path / "out", [TUMOR, EDEMA])
    pred = torch.from_numpy(planted(files))[None].float()
    data = {"pred": pred, "case_id": "a", "files": files}
    assert save(data) == data
    save({"pred": pred, "case_id": "b", "files": [str(tmp_path / "scan.nii.gz")]})
    assert [path.name for path in (tmp_path / "out").rglob("*.dcm")] == ["a_seg.dcm"]
    assert len(frames_by_source(tmp_path / "out/a/a_seg.dcm")) == 3
    with pytest.raises(ValueError, match=r"pred must be one channel of class indices, got shape \(2"):
        save({**data, "pred": torch.cat([pred, pred])})


def test_transform_passes_over_data_without_an_id_where_that_is_asked_for(tmp_path: Path) -> None:
    """But not over data that have one and lack their files: a segmentation would be lost unseen."""
    data = {"pred": torch.zeros(1, 2, 2, 2)}
    assert SaveDicomSegd("pred", tmp_path, [], allow_missing_keys=True)(data) == data
    with pytest.raises(KeyError, match="files"):
        SaveDicomSegd("pred", tmp_path, [], allow_missing_keys=True)({**data, "case_id": "c1"})
    with pytest.raises(KeyError, match="files"):
        SaveDicomSegd("pred", tmp_path, [])(data)


def metadata(folder: Path, content: Any) -> Path:
    path = folder / "metadata.json"
    path.write_text(json.dumps(content))
    return path


def test_codes_come_from_the_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"tumor": {"category": list(TUMOR.category), "type": list(TUMOR.type)}, "other": {}}
    path = metadata(tmp_path, {"segments": known})
    with caplog.at_level(logging.INFO):
        edema, tumor = read_segments(path, ["peritumoral edema & rim", "tumor"])
    assert tumor == TUMOR
    assert edema.category == Code("85756007", "SCT", "Tissue")
    assert edema.type == Code("PERITUMORAL_EDEM", "99AHM", "peritumoral edema & rim")
    assert "peritumoral edema & rim" in caplog.text
    assert "tumor," not in caplog.text


def test_private_codes_differ_even_where_names_start_alike_or_have_no_latin_letter(tmp_path: Path) -> None:
    names = ["left lung upper lobe", "left lung upper segment", "左", "右"]
    segments = read_segments(metadata(tmp_path, {}), names)
    values = [segment.type.value for segment in segments]
    assert len(set(values)) == 4
    assert all(0 < len(value) <= 16 for value in values)


@pytest.mark.parametrize(
    "entry",
    [
        ["85756007", "SCT", "Tissue"],
        {"category": ["85756007", "SCT", "Tissue"]},
        {"category": ["85756007", "SCT"], "type": ["1", "SCT", "x"]},
        {"category": ["85756007", "SCT", ""], "type": ["1", "SCT", "x"]},
        {"category": ["85756007", "SCT", "Tissue"], "type": [1, "SCT", "x"]},
    ],
)
def test_malformed_codes_are_named(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata\.json: segments, class 'tumor': (category|type) must be"):
        read_segments(metadata(tmp_path, {"segments": {"tumor": entry}}), ["tumor"])


@pytest.mark.parametrize("content", [[1], {"segments": []}])
def test_malformed_metadata_are_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata\.json: "):
        read_segments(metadata(tmp_path, content), ["tumor"])
