# SPDX-License-Identifier: Apache-2.0
"""``ahm pacs`` and a real PACS: Orthanc, with a real MR series in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from typer.testing import CliRunner

from ahm_engines import cli
from tests.bundles.running import SEGMENTATION
from tests.fixtures_data import assert_same_marks, real_data, write_series
from tests.fixtures_pacs import assert_marks, bright, find_bright
from tests.integration.servers.orthanc_server import DROP_SEG, PASSWORD, READ_ONLY, USER, orthanc

pytestmark = pytest.mark.servers
STUDY = "1.2.840.1"


def words(url: str, model: list[str], study: str = STUDY) -> list[str]:
    return ["pacs", url, "--study", study, "--bundle", str(SEGMENTATION), *model]


def ahm(*line: str) -> Any:
    return CliRunner().invoke(cli.app, list(line))


def segmentations(client: DICOMwebClient, study: str = STUDY) -> list[pydicom.Dataset]:
    """Ask for what is there and fetch it."""
    found = client.search_for_instances(study, search_filters={"Modality": "SEG"})
    headers = [pydicom.Dataset.from_json(item) for item in found]
    return [client.retrieve_instance(study, header.SeriesInstanceUID, header.SOPInstanceUID) for header in headers]


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    return find_bright(tmp_path / "model.pt")


@pytest.fixture
def small(tmp_path: Path) -> list[pydicom.Dataset]:
    """A small series; rules are tried on it."""
    write_series(tmp_path / "small", StudyInstanceUID=STUDY)
    return [pydicom.dcmread(path) for path in (tmp_path / "small").iterdir()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DICOMwebClient]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as url:
        yield DICOMwebClient(url)


def test_a_real_series(server: DICOMwebClient, tmp_path: Path) -> None:
    """By the command itself; the stored object holds what the bundle wrote as NIfTI, and what is bright."""
    with tarfile.open(real_data("dicom/mr_t1_mprage_192slices.tgz")) as archive:
        archive.extractall(tmp_path / "in", filter="data")
    images = [pydicom.dcmread(path) for path in sorted((tmp_path / "in").rglob("*.dcm"))]
    study = str(images[0].StudyInstanceUID)
    server.store_instances(images, study)

    model = [*find_bright(tmp_path / "model.pt", crop_size=96), "--set", "overlap=0", "--output_dir", "out"]
    line = [str(Path(sys.executable).with_name("ahm")), *words(server.base_url, model, study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((tmp_path / "tmp").iterdir()) == []

    (stored,) = segmentations(server, study)
    assert result.stdout.endswith(f"stored: series {stored.SeriesInstanceUID}, instance {stored.SOPInstanceUID}\n")
    seg = hd.seg.Segmentation.from_dataset(stored)
    (nifti,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    image = nib.load(nifti)
    count = assert_same_marks(seg, image)
    assert image.shape == (256, 256, 192) and count > 100_000
    assert_marks(seg, bright(images), borderline=300)
    print(f"{result.stdout}read back: {seg.NumberOfFrames} frames of {seg.Rows} x {seg.Columns}, {count} voxels")
    print(f"NIfTI {image.shape}, affine\n{image.affine.round(3)}")


def test_a_study_that_is_not_there(server: DICOMwebClient, model: list[str]) -> None:
    result = ahm(*words(server.base_url, model, "1.2.3"))
    assert (result.exit_code, result.output) == (1, f"ValueError: {server.base_url} has no study 1.2.3.\n")


def test_an_address_that_is_not_that_of_dicomweb(server: DICOMwebClient, model: list[str]) -> None:
    result = ahm(*words(server.base_url.removesuffix("/dicom-web"), model))
    assert result.exit_code == 1
    assert "answered 404" in result.output and "ends in /dicom-web" in result.output


def test_a_picture_for_a_model_of_volumes(
    server: DICOMwebClient, model: list[str], small: list[pydicom.Dataset]
) -> None:
    for image in small:
        image.StudyInstanceUID = "1.2.840.2"
    server.store_instances(small[:1])
    result = ahm(*words(server.base_url, model, "1.2.840.2"))
    assert result.exit_code == 1
    assert "expected a volume, got a single slice." in result.output
    assert segmentations(server, "1.2.840.2") == []


def test_a_password_is_asked_for(
    tmp_path: Path, model: list[str], small: list[pydicom.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    with orthanc(tmp_path / "orthanc", password=True) as url:
        client = DICOMwebClient(url)
        client._session.auth = (USER, PASSWORD)
        client.store_instances(small)
        assert "answered 401 Unauthorized (user and password" in ahm(*words(url, model)).output
        monkeypatch.setenv("AHM_PACS_USER", USER)
        monkeypatch.setenv("AHM_PACS_PASSWORD", "wrong")
        assert ahm(*words(url, model)).exit_code == 1
        assert segmentations(client) == []
        monkeypatch.setenv("AHM_PACS_PASSWORD", PASSWORD)
        result = ahm(*words(url, model))
        assert result.exit_code == 0, result.output
        assert PASSWORD not in result.output
        (seg,) = segmentations(client)
    assert_marks(seg, bright(small))


@pytest.mark.parametrize(
    ("rules", "answer"),
    [(DROP_SEG, "took instance .* and does not have it"), (READ_ONLY, "answered 403 Forbidden .*may not do that")],
    ids=["drops segmentations", "read only"],
)
def test_a_server_that_does_not_store(
    tmp_path: Path, model: list[str], small: list[pydicom.Dataset], rules: str, answer: str
) -> None:
    """Orthanc says 200 and names the instance as stored when a filter of its has dropped it."""
    with orthanc(tmp_path / "orthanc") as url:
        DICOMwebClient(url).store_instances(small)
    with orthanc(tmp_path / "orthanc", lua=rules) as url:
        result = ahm(*words(url, model))
        assert result.exit_code == 1
        (line,) = [line for line in result.output.splitlines() if line.startswith("OSError")]
        assert re.search(answer, line)
        assert segmentations(DICOMwebClient(url)) == []
    result = ahm(*words(url, model))
    assert result.exit_code == 1 and "cannot be reached: ConnectionRefusedError" in result.output
