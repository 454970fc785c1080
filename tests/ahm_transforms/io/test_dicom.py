# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from monai.data import ITKReader
from pydicom import dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from ahm_transforms.io import BadCasesError, CaseReader, find_cases, find_inputs, load_cases, load_image, progress
from tests.fixtures_data import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    PATIENT_ID,
    PATIENT_NAME,
    real_data,
    write_radiograph,
    write_series,
    write_slice,
)


def only_case(folder: Path) -> dict:
    (case,) = find_cases(folder).cases
    return case


def test_series_in_one_folder_are_told_apart_and_files_of_one_series_may_lie_in_several(tmp_path: Path) -> None:
    first = write_series(tmp_path / "study/a", slices=4)
    write_series(tmp_path / "study/b", slices=5, size=(8, 9))
    for path in (tmp_path / "study/b").iterdir():  # no suffix, mixed into the other folder
        path.rename(tmp_path / "study/a" / f"{path.name}.other")
    moved = tmp_path / "study/a/IM0002"
    moved.rename(tmp_path / "study/b/anything.xyz")
    (tmp_path / "study/README.txt").write_text("notes")
    cases = sorted(find_cases(tmp_path).cases, key=lambda case: len(case["image"]))
    assert [len(case["image"]) for case in cases] == [4, 5]
    assert Path(cases[0]["image"][2]).name == "anything.xyz"
    np.testing.assert_array_equal(load_image(cases[0]["image"]).numpy(), first.transpose(2, 1, 0))


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, OBLIQUE])
@pytest.mark.parametrize("reverse_names", [False, True])
def test_volume_and_affine_are_those_of_monai(tmp_path: Path, orientation: tuple, reverse_names: bool) -> None:
    write_series(tmp_path, orientation=orientation, reverse_names=reverse_names)
    reader = ITKReader()
    wanted, wanted_meta = reader.get_data(reader.read(str(tmp_path)))
    image = load_image(only_case(tmp_path)["image"])
    np.testing.assert_array_equal(image.numpy(), wanted)
    np.testing.assert_allclose(image.affine.numpy(), wanted_meta["affine"], atol=1e-5)


def test_slices_are_sorted_by_position_whatever_their_names(tmp_path: Path) -> None:
    straight = write_series(tmp_path / "a", orientation=OBLIQUE)
    write_series(tmp_path / "b", orientation=OBLIQUE, reverse_names=True)
    images = [load_image(only_case(tmp_path / name)["image"]) for name in "ab"]
    np.testing.assert_array_equal(images[1].numpy(), straight.transpose(2, 1, 0))
    np.testing.assert_allclose(images[0].affine, images[1].affine)


def test_affine_puts_the_first_voxel_where_the_header_says(tmp_path: Path) -> None:
    write_series(tmp_path, orientation=AXIAL, gap_mm=2.5)
    affine = load_image(only_case(tmp_path)["image"]).affine.numpy()
    # DICOM: row spacing 0.8, column spacing 1.1, position (-30, 12, 5) in LPS
    np.testing.assert_allclose(affine, [[-1.1, 0, 0, 30], [0, -0.8, 0, -12], [0, 0, 2.5, 5], [0, 0, 0, 1]], atol=1e-6)


def test_rescale_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    stored = write_series(tmp_path, RescaleSlope="2", RescaleIntercept="-1024")
    image = load_image(only_case(tmp_path)["image"])
    np.testing.assert_array_equal(image.numpy(), stored.transpose(2, 1, 0) * 2.0 - 1024)


@pytest.mark.parametrize(
    "stored_as",
    [
        [{"RescaleSlope": 1}, {"RescaleSlope": "0.25"}, {"RescaleSlope": "1.5"}],
        [{"PixelRepresentation": 0}, {"RescaleIntercept": -1024}, {"PixelRepresentation": 0, "RescaleIntercept": -9}],
        [{}, {"PixelRepresentation": 0}, {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11}],
        [{"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0}, {}, {"RescaleSlope": "0.5"}],
    ],
    ids=["slope", "intercept", "sign", "bits"],
)
def test_slices_that_are_stored_differently_keep_their_values(tmp_path: Path, stored_as: list) -> None:
    uid, wanted = generate_uid(), []
    for index, tags in enumerate(stored_as):
        unsigned = tags.get("PixelRepresentation") == 0
        kind = np.dtype(f"{'u' if unsigned else 'i'}{tags.get('BitsAllocated', 16) // 8}")
        highest = 2 ** tags.get("BitsStored", 16 if unsigned else 15) - 1
        values = np.linspace(0 if unsigned else -highest, highest, 80).astype(kind).reshape(8, 10)
        place = {"ImagePositionPatient": [0, 0, index], "ImageOrientationPatient": list(AXIAL)}
        pixels = {"SeriesInstanceUID": uid, "PixelData": values.tobytes()}
        write_slice(tmp_path / str(index), values, **(place | pixels | tags))
        slope, intercept = float(tags.get("RescaleSlope", 1)), float(tags.get("RescaleIntercept", 0))
        wanted.append(values.astype(np.float32) * slope + intercept)
    np.testing.assert_array_equal(load_image(only_case(tmp_path)["image"]).numpy(), np.stack(wanted).transpose(2, 1, 0))


def test_reader_works_in_monai_load_image(tmp_path: Path) -> None:
    from monai.transforms import LoadImage

    stored = write_series(tmp_path)
    image = LoadImage(reader=CaseReader())(only_case(tmp_path)["image"])
    np.testing.assert_array_equal(image.numpy(), stored.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"slices": 1}, "single slice"),
        ({"NumberOfFrames": 4}, "multi-frame"),
        ({"gap_mm": 0.0}, "one position"),
        ({"ImagePositionPatient": None}, "without position"),
        ({"Rows": None, "Columns": None, "Modality": "SR"}, "modality SR"),
    ],
)
def test_what_is_no_volume_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tags: dict, reason: str
) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "study/odd", SeriesNumber=9, **({"slices": 3} | tags))
    with caplog.at_level(logging.WARNING):
        cases = load_cases(tmp_path, val_fraction=0)
    assert len(cases.training) == 1
    ((name, why),) = cases.left_out
    assert name == "series 9 in study/odd"
    assert reason in why
    assert "series 9 in study/odd" in caplog.text


def test_mixed_orientations_are_a_localizer(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "good")
    write_series(tmp_path / "scout", slices=3, orientation=AXIAL, SeriesInstanceUID=uid)
    write_series(tmp_path / "scout/more", slices=3, orientation=CORONAL, SeriesInstanceUID=uid)
    (left,) = find_cases(tmp_path).left_out
    assert "mixed slice orientations" in left.reason


def test_a_localizer_within_a_series_is_left_out_alone(tmp_path: Path) -> None:
    stored = write_series(tmp_path / PATIENT_NAME, SeriesInstanceUID="1.2.3")
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": list(CORONAL)}
    position = {"ImagePositionPatient": [0, 0, 0], "SeriesInstanceUID": "1.2.3"}
    write_slice(tmp_path / PATIENT_NAME / "A", np.zeros((30, 30), np.int16), **scout, **position)
    found = find_cases(tmp_path)
    (case,), (left,) = found.cases, found.left_out
    np.testing.assert_array_equal(load_image(case["image"]).numpy(), stored.transpose(2, 1, 0))
    assert left == (f"{PATIENT_NAME}/A", "a localizer within a series")
    assert left.case_id.startswith("image-") and PATIENT_NAME not in left.case_id
    (tmp_path / PATIENT_NAME / "IM0002").unlink()
    assert "slices are missing" in find_cases(tmp_path).bad[0].reason


@pytest.mark.parametrize(("gap", "slices"), [((3,), 7), ((1, 2), 6)])
def test_missing_slices_stop_the_run_and_are_named(tmp_path: Path, gap: tuple, slices: int) -> None:
    write_series(tmp_path / "s", slices=slices, skip=gap, SeriesNumber=12)
    with pytest.raises(BadCasesError, match=r"series 12 in s: slices are missing: gaps of \d+\.00 mm") as caught:
        load_cases(tmp_path)
    assert f"{2 * (len(gap) + 1):.2f} mm after slice {gap[0]}" in str(caught.value)


def test_every_second_slice_missing_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path / "s", slices=12, skip=range(1, 12, 2), SpacingBetweenSlices=-2.0)
    told = r"series 3 in s: slices are missing: they are 4\.00 mm apart, SpacingBetweenSlices says 2\.00 mm"
    with pytest.raises(BadCasesError, match=told):
        load_cases(tmp_path)


@pytest.mark.parametrize(
    "tags",
    [
        {"SpacingBetweenSlices": 3.0, "SliceThickness": 3.0},
        {"SpacingBetweenSlices": 1.0, "SliceThickness": 3.0},  # what lies between two slices
        {"SpacingBetweenSlices": 0.5, "SliceThickness": 0.5, "Modality": "CT"},
        {"SpacingBetweenSlices": 0.5, "SliceThickness": 0.5, "ImageType": ["DERIVED", "SECONDARY", "MPR"]},
        {"SpacingBetweenSlices": 0.5, "SliceThickness": None},
        {"SpacingBetweenSlices": 2.0, "SliceThickness": 8.0, "gap_mm": 2.0},  # slices overlap
    ],
    ids=["usual", "between", "CT", "derived", "no thickness", "overlap"],
)
def test_gaps_by_design_are_none(tmp_path: Path, tags: dict) -> None:
    write_series(tmp_path, **({"gap_mm": 4.0} | tags))
    assert len(find_cases(tmp_path).cases) == 1


def test_a_distance_that_is_no_number_does_not_matter(tmp_path: Path) -> None:
    write_series(tmp_path, SpacingBetweenSlices=2.25)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"2.25", b"2.x5"))
    assert len(find_cases(tmp_path).cases) == 1


@pytest.mark.parametrize("few_close", [True, False], ids=["3 mm mostly", "half and half"])
def test_two_slice_distances_stop_the_run(tmp_path: Path, few_close: bool) -> None:
    close = 11 if few_close else 20  # the head in slices of 1.5 mm, then in slices of 3 mm
    write_series(tmp_path / "s", slices=close + 40, gap_mm=1.5, skip=range(close, close + 40, 2))
    with pytest.raises(BadCasesError, match=r"series 3 in s: uneven slice distances: 1\.50 to 3\.00 mm, .* mm off"):
        load_cases(tmp_path)


def write_at(folder: Path, places: list[list[float]], orientation: tuple) -> None:
    uid = generate_uid()
    for index, place in enumerate(places):
        geometry = {"ImagePositionPatient": place, "ImageOrientationPatient": list(orientation)}
        write_slice(folder / f"IM{index:04d}", np.zeros((8, 8), np.int16), SeriesInstanceUID=uid, **geometry)


TILTED = (1.0, 0.0, 0.0, 0.0, 0.939693, -0.342020)  # by 20 degrees about x, where the table moves along z


@pytest.mark.parametrize(
    ("places", "orientation", "shift"),
    [
        ([[-30.0, 12.0, 5.0 + 5 * index] for index in range(8)], TILTED, 35 * 0.342020),
        ([[100.0 * (index % 2), 0.0, 2.0 * index] for index in range(8)], AXIAL, 100.0),
        ([[0.3 * (index == 2), 0.0, 2.0 * index] for index in range(8)], AXIAL, 0.3),
    ],
    ids=["gantry tilt", "two stacks", "one slice"],
)
def test_slices_shifted_in_their_plane_stop_the_run(
    tmp_path: Path, places: list, orientation: tuple, shift: float
) -> None:
    write_at(tmp_path / "s", places, orientation)
    told = rf"series 3 in s: slices are shifted .* by up to {shift:.1f} mm, as by a tilted gantry; dcm2niix"
    with pytest.raises(BadCasesError, match=told):
        load_cases(tmp_path)


def test_rounding_is_no_shift(tmp_path: Path) -> None:
    turned = tuple(round(value, 4) for value in OBLIQUE)
    normal = np.cross(OBLIQUE[:3], OBLIQUE[3:])
    write_at(tmp_path, [(normal * index).round(2).tolist() for index in range(200)], turned)
    assert len(find_cases(tmp_path).cases) == 1


def test_distances_that_are_rounded_are_even(tmp_path: Path) -> None:
    write_at(tmp_path, [[0, 0, place] for place in np.linspace(0, 20.8, 33).round(1).tolist()], AXIAL)  # 0.6 or 0.7 mm
    assert len(find_cases(tmp_path).cases) == 1


def strip_preamble(path: Path, *, meta: bool) -> None:
    """Leave the data set alone, or with the file's meta information before it."""
    dataset = dcmread(path)
    if meta:
        path.write_bytes(path.read_bytes()[132:])
    else:
        del dataset.file_meta
        dataset.preamble = None
        dcmwrite(path, dataset, implicit_vr=False, little_endian=True, enforce_file_format=False)


@pytest.mark.parametrize("meta", [True, False], ids=["group 2", "group 8"])
def test_files_without_preamble_are_named(tmp_path: Path, meta: bool) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "old")
    for name in ("IM0004", "IM0005"):  # the other slices would pass for a volume
        strip_preamble(tmp_path / "old" / name, meta=meta)
    (tmp_path / "old/notes.txt").write_text("notes")
    (tmp_path / "old/other").write_bytes(b"\x08\x00" + bytes(range(256)))
    found = find_cases(tmp_path)
    assert len(found.cases) == 1
    ((name, reason),) = found.bad
    assert name == "series 3 in old"
    assert reason.startswith("2 of 6 file(s) with no DICOM preamble") and "dcmconv" in reason and "pydicom" in reason
    with pytest.raises(ValueError, match=r"IM0004 cannot be used: no DICOM preamble"):
        find_inputs(tmp_path / "old/IM0004")


@pytest.mark.parametrize("meta", [True, False], ids=["group 2", "group 8"])
def test_the_remedy_for_a_missing_preamble_works(tmp_path: Path, meta: bool) -> None:
    stored = write_series(tmp_path)
    for path in tmp_path.iterdir():
        strip_preamble(path, meta=meta)
        dataset = dcmread(path, force=True)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(load_image(only_case(tmp_path)["image"]).numpy(), stored.transpose(2, 1, 0))


def test_slices_without_series_are_named_and_other_files_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "study", slices=4, SeriesInstanceUID=None)
    write_slice(tmp_path / "DICOMDIR", np.zeros((8, 8), np.int16), SeriesInstanceUID=None, Rows=None)
    found = find_cases(tmp_path)
    assert len(found.cases) == 1 and not found.left_out
    ((name, reason),) = found.bad
    assert name == "series 3 in study"
    assert reason == "4 file(s) without SeriesInstanceUID, which says what belongs together"


def test_what_is_not_used_has_a_pseudonym_that_travels(tmp_path: Path) -> None:
    write_series(tmp_path / PATIENT_NAME / "a")
    good = only_case(tmp_path)["case_id"]
    (tmp_path / PATIENT_NAME / "a/IM0002").unlink()
    write_series(tmp_path / PATIENT_NAME / "b", slices=1)
    path = tmp_path / PATIENT_NAME / "c/broken"
    write_series(path.parent)
    path.write_bytes((path.parent / "IM0001").read_bytes().replace(b"0.8\\1.1", b"0.x\\1.1"))
    found = find_cases(tmp_path)
    broken, gap = pickle.loads(pickle.dumps(found.bad))
    assert (broken.name, gap.name) == (f"{PATIENT_NAME}/c/broken", f"series 3 in {PATIENT_NAME}/a")
    assert gap.case_id == good
    assert broken.case_id.startswith("image-")
    assert found.left_out[0].case_id.startswith("series-")
    assert not any(PATIENT_NAME in item.case_id + item.reason for item in (broken, gap, *found.left_out))


def test_mixed_sizes_stop_the_run(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "a", slices=6, size=(16, 20), skip=(5,), SeriesInstanceUID=uid)
    write_series(tmp_path / "b", slices=6, size=(16, 24), skip=range(5), SeriesInstanceUID=uid)
    with pytest.raises(BadCasesError, match="mixed sizes: 20 x 16, 24 x 16"):
        load_cases(tmp_path)


def test_truncated_slice_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path, size=(64, 64))
    path = tmp_path / "IM0003"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(BadCasesError, match="IM0003"):
        load_cases(tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(4000)], ids=["empty", "short", "zeros"])
@pytest.mark.parametrize("name", ["IM0005", "1.2.840.5", "LAST.DCM", "x/last.ima"])
def test_an_empty_slice_stops_the_run(tmp_path: Path, content: bytes, name: str) -> None:
    write_series(tmp_path / PATIENT_NAME)
    (tmp_path / PATIENT_NAME / "IM0005").unlink()
    path = tmp_path / PATIENT_NAME / name  # the other slices pass for a volume
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(BadCasesError, match=f"{name}: empty, or zeros where DICOM begins"):
        load_cases(tmp_path)
    cases = load_cases(tmp_path, skip_bad=True, val_fraction=0)
    assert len(cases.training) == 1
    (left,) = cases.left_out
    assert left.name == f"{PATIENT_NAME}/{name}"
    assert left.case_id.startswith("image-") and PATIENT_NAME not in left.case_id + left.reason


def test_what_is_called_dicom_and_is_none_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    (tmp_path / "b.dcm").write_text("<html>404 Not Found</html>")
    with pytest.raises(BadCasesError, match=r"b\.dcm: no DICOM, although its name says so"):
        load_cases(tmp_path)


def test_other_files_are_passed_over_empty_or_not(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    write_slice(tmp_path / "DICOMDIR", np.zeros((8, 8), np.int16), SeriesInstanceUID=None, Rows=None)
    for name in ("LOCKFILE", "a/notes.txt", "a/.hidden", "b/SUCCESS", "b/table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/VERSION").write_text("1")
    found = find_cases(tmp_path)
    assert len(found.cases) == 1 and not found.bad and not found.left_out


def test_number_that_is_none_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path)
    path = tmp_path / "IM0002"
    path.write_bytes(path.read_bytes().replace(b"0.8\\1.1", b"0.x\\1.1"))
    with pytest.raises(BadCasesError, match=r"IM0002.*unreadable DICOM header.*0\.x"):
        load_cases(tmp_path)


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_too_few_numbers_stop_the_run(tmp_path: Path, tag: str) -> None:
    write_series(tmp_path)
    dataset = dcmread(tmp_path / "IM0002")
    dataset[tag].value = list(dataset[tag].value)[:-1]
    dataset.save_as(tmp_path / "IM0002")
    with pytest.raises(BadCasesError, match=rf"IM0002.*unreadable DICOM header: {tag}: expected \d numbers, got"):
        load_cases(tmp_path)


def test_a_bar_says_how_far_it_is_where_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "a")
    load_cases(tmp_path, val_fraction=0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    load_cases(tmp_path, val_fraction=0)
    told = capsys.readouterr().err
    assert "Reading DICOM headers: 100%" in told and "6/6" in told
    assert "Checking images: 100%" in told and "1/1" in told


def test_pixels_that_cannot_be_decoded_are_named_with_their_transfer_syntax(tmp_path: Path) -> None:
    garbage = encapsulate([b"\0" * 64])
    write_series(tmp_path, TransferSyntaxUID=JPEG2000Lossless, PixelData=garbage)
    with pytest.raises(BadCasesError, match=r"transfer syntax JPEG 2000.*Lossless"):
        load_cases(tmp_path)


def test_a_series_without_pixel_spacing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path / "with")
    write_series(tmp_path / "scan/without", PixelSpacing=None)
    write_radiograph(tmp_path / "picture.dcm", np.zeros((8, 9), np.int16), PixelSpacing=None)
    with caplog.at_level(logging.WARNING):
        cases = load_cases(tmp_path, val_fraction=0)
    told = [message for message in caplog.messages if "PixelSpacing" in message]
    assert len(told) == 1 and told[0].startswith("series 3 in scan/without has no PixelSpacing: 1 mm is assumed.")
    assert PATIENT_ID not in caplog.text and PATIENT_NAME not in caplog.text
    assert sorted(geometry.spacing_mm for geometry in cases.geometry.values()) == [(1.0, 1.0, 2.0), (1.1, 0.8, 2.0)]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        find_inputs(next((tmp_path / "scan/without").iterdir()))
    assert caplog.messages[0].startswith("IM") and "1 mm is assumed" in caplog.messages[0]


def test_skip_bad_goes_on_and_lists_them(tmp_path: Path) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "bad", skip=(2,))
    cases = load_cases(tmp_path, skip_bad=True, val_fraction=0)
    assert len(cases.training) == 1
    assert [left.name for left in cases.left_out] == ["series 3 in bad"]


def test_a_copy_of_the_study_counts_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert len(only_case(tmp_path)["image"]) == 6


def test_nothing_that_names_the_patient_leaves_the_reader(tmp_path: Path) -> None:
    write_series(tmp_path / "a", StudyDate="20200102")
    write_series(tmp_path / "b", slices=1)
    cases = load_cases(tmp_path)
    image = load_image(cases.training[0]["image"])
    told = json.dumps([cases.summary(), cases.left_out, cases.training[0]["case_id"], cases.training[0]["patient_id"]])
    told += repr(image.meta)
    for secret in (PATIENT_NAME, PATIENT_ID, "20200102"):
        assert secret not in told


def test_series_of_one_patient_stay_together(tmp_path: Path) -> None:
    for index, patient in enumerate(("p1", "p1", "p2", "p3", "p3", "p4")):
        write_series(tmp_path / str(index), PatientID=patient)
    cases = load_cases(tmp_path, val_fraction=0.5)
    training, validation = ({case["patient_id"] for case in part} for part in (cases.training, cases.validation))
    assert len(training) == len(validation) == 2
    assert not training & validation


def write_colour_slice(path: Path, place: float, **tags: object) -> None:
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB", "BitsAllocated": 8}
    colour |= {"BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "PixelData": bytes(8 * 8 * 3)}
    geometry = {"ImagePositionPatient": [0, 0, place], "ImageOrientationPatient": list(AXIAL)}
    write_slice(path, np.zeros((8, 8), np.int16), **(colour | geometry | tags))


@pytest.mark.parametrize("patient", ["p1 ", " p1", "  p1  "])
def test_blanks_around_an_id_make_no_other_patient(tmp_path: Path, patient: str) -> None:
    write_series(tmp_path / "a", PatientID="p1")
    write_series(tmp_path / "b", PatientID=patient)
    assert len({case["patient_id"] for case in find_cases(tmp_path).cases}) == 1


def change(path: Path, **tags: object) -> None:
    dataset = dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def test_a_series_of_two_patients_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path / "s")
    change(tmp_path / "s/IM0002", PatientID="OTHER-1")
    with pytest.raises(BadCasesError, match=r"series 3 in s: slices of 2 patients \(PatientID\) in one") as caught:
        load_cases(tmp_path)
    assert "OTHER-1" not in str(caught.value) and PATIENT_ID not in str(caught.value)


def test_slices_that_lack_the_patient_are_of_the_others(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    patient = only_case(tmp_path)["patient_id"]
    change(tmp_path / "a/IM0000", PatientID="")
    assert only_case(tmp_path)["patient_id"] == patient


def test_colour_slices_are_refused_where_one_channel_is_wanted(tmp_path: Path) -> None:
    uid = generate_uid()
    for index in range(3):
        write_colour_slice(tmp_path / f"{index}", index, SeriesInstanceUID=uid)
    assert load_image(only_case(tmp_path)["image"]).shape == (8, 8, 3, 3)
    with pytest.raises(BadCasesError, match=r"3 channel\(s\), expected 1"):
        load_cases(tmp_path, channels=1)


def test_a_colour_slice_among_grey_ones_stops_the_run(tmp_path: Path) -> None:
    write_series(tmp_path / "s", size=(8, 8), SeriesInstanceUID="1.2.3")
    write_colour_slice(tmp_path / "s/IM0006", 0.0, SeriesInstanceUID="1.2.3", ImagePositionPatient=[-30, 12, 17])
    with pytest.raises(BadCasesError, match="series 3 in s: grey and colour slices in one series"):
        load_cases(tmp_path)


@pytest.mark.parametrize(
    ("archive", "shape", "spacing_mm"),
    [
        ("mr_t1_mprage_192slices.tgz", [192, 256, 256], [0.9, 0.8594, 0.8594]),
        ("ct_head_93slices.tgz", [64, 64, 93], [3.2, 3.2, 1.5]),
    ],
)
def test_real_series(tmp_path: Path, archive: str, shape: list, spacing_mm: list) -> None:
    with tarfile.open(real_data(f"dicom/{archive}")) as tar:
        tar.extractall(tmp_path, filter="data")
    cases = load_cases(tmp_path, min_size=32, channels=1)
    assert len(cases.training) == 1
    assert cases.summary()["images_3d"]["shape_max"] == shape
    assert cases.summary()["images_3d"]["spacing_mm_min"] == spacing_mm
