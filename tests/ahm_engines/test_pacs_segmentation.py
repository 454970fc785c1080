# SPDX-License-Identifier: Apache-2.0
"""The command from a study in a PACS to the DICOM SEG beside it, with a network that finds what is bright."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import torch
from typer.testing import CliRunner

from ahm_engines import cli
from ahm_engines.pacs import Pacs
from ahm_engines.pacs_segmentation import read_segmentation
from tests.bundles.running import CLASSIFICATION, PRETRAIN, SEGMENTATION
from tests.fixtures_data import OBLIQUE, PATIENT_ID, PATIENT_NAME, write_series
from tests.fixtures_pacs import FakePacs, assert_marks, bright, encoded, fake_pacs, find_bright

STUDY, SERIES = "1.2.840.1", "1.2.840.1.5"
UIDS = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, in which nothing may stay."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = signal.getsignal(signal.SIGTERM)
    yield folder
    signal.signal(signal.SIGTERM, before)
    assert list(folder.iterdir()) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakePacs]:
    """A study of one MR series with six slices."""
    write_series(tmp_path / "in", orientation=OBLIQUE, **UIDS)
    with fake_pacs(tmp_path / "in") as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """The options that choose a model for volumes."""
    return find_bright(tmp_path / "model.pt")


def ahm_pacs(server: FakePacs, *words: object, study: str = STUDY) -> Any:
    line = ["pacs", server.url, "--study", study, "--bundle", SEGMENTATION, *words]
    return CliRunner().invoke(cli.app, [str(word) for word in line])


def failure(result: Any) -> str:
    """Return what the command says when it fails: one line, which a list of series may follow, without names."""
    assert result.exit_code == 1, result.output
    assert PATIENT_NAME not in result.output and PATIENT_ID not in result.output
    lines = [line for line in result.output.splitlines() if not line.startswith("series ")]
    assert len(lines) == 1 or all(line.startswith("  ") for line in lines[1:])
    return str(lines[0])


def test_the_segmentation_is_stored_beside_its_series(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    images = list(server.instances)
    result = ahm_pacs(server, *model, "--output_dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (seg,) = server.segmentations
    assert_marks(seg, bright(images))
    count = sum(int(found.sum()) for found in bright(images).values())
    assert result.output.splitlines() == [
        f"series {SERIES} (MR, 6 images)",
        f"voxels: box {count}",
        f"stored: series {seg.SeriesInstanceUID}, instance {seg.SOPInstanceUID}",
    ]
    assert (seg.StudyInstanceUID, seg.PatientID) == (STUDY, PATIENT_ID)
    (kept,) = (tmp_path / "out").rglob("*_seg.dcm")
    assert pydicom.dcmread(kept) == seg
    assert len(list((tmp_path / "out").rglob("*_seg.nii.gz"))) == 1


def test_a_second_run_adds_a_second_segmentation(server: FakePacs, model: list[str]) -> None:
    assert ahm_pacs(server, *model).exit_code == 0
    result = ahm_pacs(server, *model)
    assert "the study had 1 SEG series before; they stay as they are" in result.output
    first, second = server.segmentations
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID


def test_nothing_found_stores_nothing_and_says_so(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["model"]["bias"] = torch.tensor([1000.0, 0.0])
    torch.save(content, tmp_path / "model.pt")
    result = ahm_pacs(server, *model, "--output_dir", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert result.output.splitlines()[1:] == ["voxels: box 0", "nothing was found: no DICOM SEG is stored."]
    assert server.segmentations == [] and "POST studies" not in server.requests
    assert len(list((tmp_path / "out").rglob("*_quicklook.png"))) == 1


def test_a_trial_without_storing(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    result = ahm_pacs(server, *model, "--no-store", "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "stored" not in result.output and "POST studies" not in server.requests
    assert len(list((tmp_path / "out").rglob("*_seg.dcm"))) == 1


def test_the_model_says_which_series_it_takes(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    write_series(tmp_path / "ct", StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.9", Modality="CT")
    server.instances += [pydicom.dcmread(path) for path in (tmp_path / "ct").iterdir()]
    assert ahm_pacs(server, *model, "--no-store").output.startswith(f"series {SERIES} (MR")
    assert ahm_pacs(server, *model, "--no-store", "--modality", "ct").output.startswith("series 1.2.9 (CT")
    line = failure(ahm_pacs(server, *model, "--modality", "PT"))
    assert "expected images of modality PT" in line
    server.instances = server.instances[6:]
    assert "expected images of modality MR, got" in ahm_pacs(server, *model, "--series", "1.2.9").output


def test_several_series_that_fit(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    write_series(tmp_path / "more", slices=4, StudyInstanceUID=STUDY, SeriesInstanceUID="1.2.9")
    server.instances += [pydicom.dcmread(path) for path in (tmp_path / "more").iterdir()]
    result = ahm_pacs(server, *model)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "ValueError: 2 series could be meant; name one with --series:",
        f"  {SERIES} (MR, 6 images)",
        "  1.2.9 (MR, 4 images)",
    ]
    assert "GET files" not in server.requests
    assert ahm_pacs(server, *model, "--series", "1.2.9").exit_code == 0


def test_a_model_for_pictures_takes_a_single_image(server: FakePacs, tmp_path: Path) -> None:
    server.instances = server.instances[2:3]
    images = list(server.instances)
    result = ahm_pacs(server, *find_bright(tmp_path / "model.pt", 2))
    assert result.exit_code == 0, result.output
    assert_marks(server.segmentations[0], bright(images))


def test_a_model_for_volumes_takes_no_single_image(server: FakePacs, model: list[str]) -> None:
    server.instances = server.instances[2:3]
    assert failure(ahm_pacs(server, *model)).endswith("expected a volume, got a single slice.")
    assert server.segmentations == []


def test_a_series_with_a_gap_is_not_segmented(server: FakePacs, model: list[str]) -> None:
    del server.instances[2]
    assert "slices are missing" in failure(ahm_pacs(server, *model))
    assert server.segmentations == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "no such checkpoint"),
        ("task", "a checkpoint of classification, expected one of segmentation"),
        ("damaged", "not a readable checkpoint"),
        ("network", "torch.nn.Conv4d"),
        ("text", "the bundle failed: AttributeError: 'str' object"),
        ("entry", "no entry overlapp"),
        ("bundle", "Cannot find the config file"),
    ],
)
def test_a_model_that_cannot_be_used_fetches_nothing(server: FakePacs, tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "model.pt"
    options = find_bright(path, **({"task": "classification"} if change == "task" else {}))
    if change == "missing":
        path.unlink()
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:500])
    options += {
        "network": ["--set", 'network_def={"_target_": "torch.nn.Conv4d"}'],
        "text": ["--set", "network_def=UNet"],
        "entry": ["--set", "overlapp=0.1"],
        "bundle": ["--bundle", str(tmp_path)],
    }.get(change, [])
    assert words in failure(ahm_pacs(server, *options))
    assert server.requests == []


@pytest.mark.parametrize(("bundle", "task"), [(CLASSIFICATION, "classification"), (PRETRAIN, "pretraining")])
def test_a_bundle_that_does_not_segment_fetches_nothing(
    server: FakePacs, tmp_path: Path, bundle: Path, task: str
) -> None:
    options = [*find_bright(tmp_path / "model.pt", task=task), "--bundle", bundle, "--set", "initialize=[]"]
    assert f"expected a bundle that segments, got one for {task}" in failure(ahm_pacs(server, *options))
    assert server.requests == []


@pytest.mark.parametrize("localizer", [False, True])
def test_a_case_that_fails_is_told_by_its_reason(server: FakePacs, model: list[str], localizer: bool) -> None:
    if localizer:
        server.instances[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    for image in server.instances:
        image.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        image["PixelData"].VR = "OB"
        image.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        image["PixelData"].is_undefined_length = True
    assert "the series cannot be segmented: transfer syntax JPEG 2000" in failure(ahm_pacs(server, *model))
    assert server.segmentations == []


@pytest.mark.parametrize("kind", ["refused", "failed", "dropped"])
def test_a_store_that_does_not_work(server: FakePacs, model: list[str], kind: str) -> None:
    if kind == "refused":
        server.status = {"POST studies": 403}
    server.failure, server.drops = 0xA700 * (kind == "failed"), kind == "dropped"
    words = {"refused": "answered 403", "failed": "failure reason A700H", "dropped": "does not have it"}[kind]
    result = ahm_pacs(server, *model)
    assert result.exit_code == 1
    assert words in result.output and "stored: " not in result.output
    assert server.segmentations == []


def test_an_output_folder_that_cannot_be_written(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "cannot write to this output folder" in failure(ahm_pacs(server, *model, "--output_dir", tmp_path / "out"))
    assert server.requests == []


def test_nothing_stays_after_a_signal(server: FakePacs, model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    retrieve = Pacs.retrieve

    def interrupted(*args: Any) -> Any:
        retrieve(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Pacs, "retrieve", interrupted)
    assert ahm_pacs(server, *model).exit_code == 128 + signal.SIGTERM
    assert server.segmentations == []


def test_the_environment_says_who_asks(server: FakePacs, model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server.tag = "Bearer t0ken"
    assert "answered 401" in failure(ahm_pacs(server, *model))
    monkeypatch.setenv("AHM_PACS_TOKEN", "t0ken")
    assert ahm_pacs(server, *model).exit_code == 0
    server.tag = "Basic d2FyZDpnZWhlaW0="
    monkeypatch.delenv("AHM_PACS_TOKEN")
    monkeypatch.setenv("AHM_PACS_USER", "ward")
    monkeypatch.setenv("AHM_PACS_PASSWORD", "geheim")
    assert ahm_pacs(server, *model).exit_code == 0


def test_a_segmentation_is_read_before_it_is_stored(server: FakePacs, model: list[str], tmp_path: Path) -> None:
    ahm_pacs(server, *model, "--output_dir", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*_seg.dcm")
    assert not read_segmentation(path, STUDY, SERIES).empty
    for study, series in (("1.2.3", SERIES), (STUDY, "1.2.3")):
        with pytest.raises(ValueError, match="is no segmentation of series"):
            read_segmentation(path, study, series)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(encoded(pydicom.dcmread(path))[:-20])
    with pytest.raises(ValueError, match=r"cut\.dcm cannot be read as DICOM SEG"):
        read_segmentation(cut, STUDY, SERIES)
