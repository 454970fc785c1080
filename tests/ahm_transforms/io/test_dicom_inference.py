# SPDX-License-Identifier: Apache-2.0
"""Whole way from DICOM files to a DICOM SEG and a NIfTI file, with a network that only compares with two numbers."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import DataLoader
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted, Compose, Invertd, SaveImaged
from pydicom.encaps import encapsulate
from pydicom.misc import is_dicom
from pydicom.uid import HTJ2KLossless, ImplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from torch import nn

from ahm_engines.case_inference import CaseInference, IncompleteInferenceError, TolerantDataset
from ahm_engines.handlers.quick_look import QuickLookd
from ahm_transforms.io import NameByCased
from ahm_transforms.io.dicom_seg import SaveDicomSegd
from ahm_transforms.io.find import find_inputs
from ahm_transforms.io.segments import Code, Segment
from ahm_transforms.recipes import deterministic
from tests.fixtures_data import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    PATIENT_ID,
    PATIENT_NAME,
    assert_same_marks,
    real_data,
    write_nifti,
    write_series,
)

WINDOW = (0.0, 501.0)  # write_series plants 0 to 499
LEVELS = (250.5, 400.8)  # of classes 1 and 2, in the units of the window
SEGMENTS = [Segment(name, Code("85756007", "SCT", "Tissue"), Code(name, "99AHM", name)) for name in ("grey", "white")]


class TwoLevels(nn.Module):
    """Scores of background and two classes that depend on a voxel's own value alone."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        low, high = (image > level / WINDOW[1] for level in LEVELS)
        return torch.cat([~low, low & ~high, high], dim=1).float()


def segment(source: Path, out: Path, window: tuple[float, float] = WINDOW, spatial_dims: int = 3) -> CaseInference:
    """Prepare what the bundle's inference.json does, with windows in HU so that thresholds are numbers in the file."""
    found = find_inputs(source)
    chain = deterministic("ct", spatial_dims=spatial_dims, window_hu=window)
    after = Compose(
        [
            QuickLookd(out, ["grey", "white"]),
            Invertd("pred", chain, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True),
            NameByCased("pred"),
            SaveImaged("pred", output_dir=str(out), output_postfix="seg", output_dtype=np.uint8, resample=False),
            SaveDicomSegd("pred", out, SEGMENTS),
        ]
    )
    loader = DataLoader(TolerantDataset(found.cases, chain), batch_size=1)
    told = {"bad": found.bad, "skipped": found.left_out}
    return CaseInference("cpu", loader, TwoLevels(), out, inferer=SimpleInferer(), postprocessing=after, **told)


def results(out: Path) -> list[tuple[Path, Path]]:
    """Return the DICOM SEG and NIfTI file of every case."""
    pairs = [(path, path.with_name(path.name.replace("_seg.dcm", "_seg.nii.gz"))) for path in out.rglob("*_seg.dcm")]
    for _, picture in pairs:
        assert picture.with_name(picture.name.replace("_seg.nii.gz", "_quicklook.png")).is_file()
    return pairs


def check_against_source(path: Path, source: Path, levels: tuple[float, float] = LEVELS) -> None:
    """Every frame holds what the slice it refers to says, read by pydicom alone; other slices hold nothing."""
    seg = pydicom.dcmread(path)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    slices = {}
    for name in source.rglob("*"):
        if name.is_file() and is_dicom(name):
            header = pydicom.dcmread(name)
            scale, shift = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
            values = header.pixel_array * scale + shift
            classes = (values > levels[0]).astype(int) + (values > levels[1])
            slices |= {(str(header.SOPInstanceUID), number): classes == number for number in (1, 2)}
    for groups, frame in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        wanted = slices.pop((str(uid), groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber))
        np.testing.assert_array_equal(frame, wanted)
    assert not any(missed.any() for missed in slices.values())


def check_against_nifti(path: Path, nifti: Path) -> None:
    """Both files mark the same places in the patient."""
    assert assert_same_marks(hd.seg.segread(path), nib.load(nifti)) > 0


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, OBLIQUE], ids=["axial", "coronal", "oblique"])
@pytest.mark.parametrize("reverse_names", [False, True], ids=["", "reversed"])
def test_seg_and_nifti_mark_the_same_places(tmp_path: Path, orientation: tuple, reverse_names: bool) -> None:
    write_series(tmp_path / "in", orientation=orientation, reverse_names=reverse_names)
    segment(tmp_path / "in", tmp_path / "out").run()
    ((seg, nifti),) = results(tmp_path / "out")
    check_against_source(seg, tmp_path / "in")
    check_against_nifti(seg, nifti)


def test_implicit_vr(tmp_path: Path) -> None:
    write_series(tmp_path / "in", TransferSyntaxUID=ImplicitVRLittleEndian, orientation=OBLIQUE)
    assert pydicom.dcmread(next((tmp_path / "in").iterdir())).original_encoding[0]
    segment(tmp_path / "in", tmp_path / "out").run()
    ((seg, nifti),) = results(tmp_path / "out")
    check_against_source(seg, tmp_path / "in")
    check_against_nifti(seg, nifti)


def test_rescale_slope_and_intercept_count(tmp_path: Path) -> None:
    write_series(tmp_path / "in", RescaleSlope="2", RescaleIntercept="-1024")
    window = (-1024.0, -1024.0 + 2 * WINDOW[1])
    segment(tmp_path / "in", tmp_path / "out", window).run()
    ((seg, nifti),) = results(tmp_path / "out")
    check_against_source(seg, tmp_path / "in", tuple(2 * level - 1024 for level in LEVELS))
    check_against_nifti(seg, nifti)


def test_one_file(tmp_path: Path) -> None:
    write_series(tmp_path / "in", orientation=OBLIQUE)
    shutil.copy(tmp_path / "in/IM0003", tmp_path / "one.dcm")
    segment(tmp_path / "one.dcm", tmp_path / "out", spatial_dims=2).run()
    ((seg, nifti),) = results(tmp_path / "out")
    (tmp_path / "alone").mkdir()
    (tmp_path / "one.dcm").rename(tmp_path / "alone/one.dcm")
    check_against_source(seg, tmp_path / "alone")
    image = nib.load(nifti)
    header = pydicom.dcmread(tmp_path / "alone/one.dcm")
    np.testing.assert_allclose(image.affine[:3, 3], np.array(header.ImagePositionPatient) * [-1, -1, 1], atol=1e-3)
    frames = {
        number: frame for number, frame in enumerate(pydicom.dcmread(seg).pixel_array.reshape(-1, 16, 20), start=1)
    }
    np.testing.assert_array_equal(np.asarray(image.dataobj).squeeze(), (frames[1] + 2 * frames[2]).T)


def test_nested_studies_of_all_kinds(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / PATIENT_ID / "first/t1", slices=4, orientation=CORONAL)
    write_series(tmp_path / "in" / PATIENT_ID / "first/t2", slices=5, size=(9, 12))
    write_series(tmp_path / "in" / PATIENT_ID / "second", slices=3, orientation=OBLIQUE)
    write_series(tmp_path / "in" / PATIENT_ID / "second/scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for path in (tmp_path / "in" / PATIENT_ID / "first/t2").iterdir():  # two series in one folder
        path.rename(path.parents[1] / "t1" / f"{path.name}.dcm")
    write_nifti(tmp_path / "in/other.nii.gz")
    (tmp_path / "in/README.txt").write_text("notes")
    segment(tmp_path / "in", tmp_path / "out").run()

    pairs = results(tmp_path / "out")
    assert len(pairs) == 3
    for seg, nifti in pairs:
        check_against_nifti(seg, nifti)
    assert (tmp_path / "out/other/other_seg.nii.gz").is_file()
    names = " ".join(str(path) for path in (tmp_path / "out").rglob("*"))
    assert PATIENT_ID not in names
    assert PATIENT_NAME not in names


def test_a_series_with_a_gap_fails_and_the_others_go_on(tmp_path: Path) -> None:
    write_series(tmp_path / "in/bad", skip=(2,), SeriesNumber=9)
    write_series(tmp_path / "in/good")
    with pytest.raises(
        IncompleteInferenceError, match=r"1 of 2 .*\n.*\n  series 9 in bad  failed .* slices are missing"
    ):
        segment(tmp_path / "in", tmp_path / "out").run()
    assert len(results(tmp_path / "out")) == 1
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert (report["done"], report["failed"]) == (1, 1)


def test_what_is_not_used_is_told_without_the_patient_s_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ahm_engines")
    folder = tmp_path / "in" / PATIENT_NAME
    write_series(folder / "good")
    write_series(folder / "enhanced", slices=1, NumberOfFrames=8)
    write_series(folder / "echoes", gap_mm=0.0)
    write_series(folder / "scout", slices=1)
    write_nifti(folder / "masks/scan.nii.gz")
    segment(tmp_path / "in", tmp_path / "out").run()
    assert "1 case(s) done, 0 failed, 4 skipped:" in caplog.text
    write_series(folder / "gap", skip=(2,))
    (folder / "broken").write_bytes((folder / "good/IM0001").read_bytes().replace(b"0.8\\1.1", b"0.x\\1.1"))
    with pytest.raises(IncompleteInferenceError, match=r"2 of 3 case\(s\) failed") as caught:
        segment(tmp_path / "in", tmp_path / "out").run()

    text = (tmp_path / "out/results.json").read_text()
    report = json.loads(text)
    assert (report["done"], report["failed"], report["skipped"]) == (1, 2, 4)
    assert PATIENT_NAME not in text
    skipped = [(case["case_id"], case["reason"]) for case in report["cases"] if case["status"] == "skipped"]
    assert sorted((name.split("-")[0], " ".join(reason.split()[:2])) for name, reason in skipped) == [
        ("folder", "a folder"),
        ("series", "a single"),
        ("series", "multi-frame (enhanced)"),
        ("series", "several images"),
    ]
    gap = next(case for case in report["cases"] if case["reason"].startswith("slices are missing"))
    row = f"  series 3 in {PATIENT_NAME}/gap  failed      0.0  {gap['case_id']}: slices are missing"
    assert row in str(caught.value)
    assert f"series 3 in {PATIENT_NAME}/echoes    skipped" in caplog.text
    assert "skipped" not in str(caught.value)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, JPEG2000Lossless], ids=["no decoder", "damaged"])
def test_pixels_that_nothing_decodes_are_named_with_their_transfer_syntax(tmp_path: Path, syntax: Any) -> None:
    data = encapsulate([b"\0" * 64])
    write_series(tmp_path / "in" / PATIENT_NAME, TransferSyntaxUID=syntax, PixelData=data, SeriesInstanceUID="1.2.3")
    write_series(tmp_path / "in/good")
    with pytest.raises(IncompleteInferenceError) as caught:
        segment(tmp_path / "in", tmp_path / "out").run()
    assert f"transfer syntax {syntax.name}: OSError: IM0000 cannot be read" in str(caught.value)
    assert PATIENT_NAME not in str(caught.value)
    assert len(results(tmp_path / "out")) == 1


def test_a_slice_that_goes_missing_after_the_search_is_the_case_s_own_failure(tmp_path: Path) -> None:
    write_series(tmp_path / "in/bad", SeriesInstanceUID=generate_uid(), SeriesNumber=1)
    write_series(tmp_path / "in/good", SeriesNumber=2)
    inference = segment(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/bad/IM0002").unlink()
    with pytest.raises(IncompleteInferenceError, match=r"1 of 2 .*\n.*\n.*failed .* OSError: IM0000 cannot be read"):
        inference.run()
    assert len(results(tmp_path / "out")) == 1


def test_real_series(tmp_path: Path) -> None:
    with tarfile.open(real_data("dicom/mr_t1_mprage_192slices.tgz")) as tar:
        tar.extractall(tmp_path / "in", filter="data")
    segment(tmp_path / "in", tmp_path / "out").run()
    ((seg, nifti),) = results(tmp_path / "out")
    check_against_source(seg, tmp_path / "in")
    check_against_nifti(seg, nifti)
    assert nib.load(nifti).shape == (256, 256, 192)
