# SPDX-License-Identifier: Apache-2.0
"""MONAI Label with Orthanc for its datastore: a real MR series in, a DICOM SEG out and back into the PACS."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import highdicom as hd
import numpy as np
import pydicom
import pytest
import requests
import torch
from dicomweb_client import DICOMwebClient

from tests.bundles.ahm_segmentation.segmenting import write_threshold
from tests.bundles.running import SEGMENTATION
from tests.fixtures_data import real_data
from tests.fixtures_pacs import assert_marks, bright
from tests.integration.servers.monai_label_server import MonaiLabel, add_bundle, monai_label, stock_app
from tests.integration.servers.orthanc_server import orthanc

pytestmark = pytest.mark.servers
NAME, EMPTY = SEGMENTATION.name, "nothing_segmentation"
LABEL = {"label_info": [{"name": "bright", "model_name": NAME}]}


class Hospital(NamedTuple):
    """Both servers, and the series that they have."""

    label: MonaiLabel
    pacs: DICOMwebClient
    images: list[pydicom.Dataset]

    @property
    def study(self) -> str:
        return str(self.images[0].StudyInstanceUID)

    @property
    def series(self) -> str:
        return str(self.images[0].SeriesInstanceUID)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("hospital")
    app = stock_app(folder)
    prepare(app, folder / "model.pt", empty=True).rename(app / "model" / EMPTY)
    prepare(app, folder / "model.pt", empty=False)
    env = {
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": json.dumps({"Modality": "MR"}),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
    }
    with orthanc(folder / "orthanc") as url:
        pacs = DICOMwebClient(url)
        images = real_series(folder / "in")
        pacs.store_instances(images)
        with monai_label(app, url, [NAME, EMPTY], env=env) as label:
            yield Hospital(label, pacs, images)


def prepare(app: Path, checkpoint: Path, *, empty: bool) -> Path:
    """Put the bundle into the app, with a network that marks what is bright or nothing at all."""
    network = write_threshold(checkpoint, classes=["bright"], crop_size=96)["network_def"]
    if empty:
        content = torch.load(checkpoint, weights_only=True)
        content["model"]["bias"] = torch.tensor([1000.0, 0.0])
        torch.save(content, checkpoint)
    folder = add_bundle(app, SEGMENTATION, checkpoint)
    config = folder / "configs/inference.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "network_def": network, "overlap": 0}))
    return folder


def real_series(folder: Path) -> list[pydicom.Dataset]:
    with tarfile.open(real_data("dicom/mr_t1_mprage_192slices.tgz")) as archive:
        archive.extractall(folder, filter="data")
    return [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def infer(hospital: Hospital, output: str, model: str = NAME) -> requests.Response:
    return hospital.label.infer(model, hospital.series, output=output, params=LABEL)


def save(hospital: Hospital, label: bytes) -> requests.Response:
    """Hand in a finished label map, as a viewer does; MONAI Label makes a DICOM SEG of it."""
    return requests.put(
        f"{hospital.label.url}/datastore/label",
        params={"image": hospital.series, "tag": "final"},
        data={"params": json.dumps(LABEL)},
        files={"label": ("label.nii.gz", label)},
        timeout=120,
    )


def stored(hospital: Hospital) -> list[pydicom.Dataset]:
    """Fetch what the PACS has of DICOM SEG."""
    study = hospital.study
    found = hospital.pacs.search_for_instances(study, search_filters={"Modality": "SEG"})
    headers = [pydicom.Dataset.from_json(item) for item in found]
    return [hospital.pacs.retrieve_instance(study, item.SeriesInstanceUID, item.SOPInstanceUID) for item in headers]


def test_the_series_is_in_the_datastore(hospital: Hospital) -> None:
    assert hospital.label.post("activelearning/random").json()["id"] == hospital.series
    assert NAME in hospital.label.get("info/")["models"]


def test_nothing_found_stores_nothing(hospital: Hospital) -> None:
    """MONAI Label answers 500 and says why in its log only; the label map itself can be had."""
    assert infer(hospital, "dicom_seg", EMPTY).status_code == 500
    assert "Empty Label provided" in hospital.label.log.read_text()
    answer = infer(hospital, "image", EMPTY)
    assert answer.status_code == 200
    assert save(hospital, answer.content).status_code == 500
    assert stored(hospital) == []


def test_a_series_that_is_not_there(hospital: Hospital) -> None:
    """MONAI Label answers 500, and goes on."""
    assert hospital.label.infer(NAME, "1.2.3", output="dicom_seg", params=LABEL).status_code == 500
    assert NAME in hospital.label.get("info/")["models"]


def test_a_segmentation_comes_as_dicom_and_goes_back(hospital: Hospital) -> None:
    answer = infer(hospital, "dicom_seg")
    assert answer.status_code == 200, answer.text[-2000:]
    seg = hd.seg.Segmentation.from_dataset(pydicom.dcmread(BytesIO(answer.content)))
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["bright"]
    assert_marks(seg, bright(hospital.images), borderline=300)

    saved = save(hospital, infer(hospital, "image").content)
    assert saved.status_code == 200, saved.text[-2000:]
    (kept,) = map(hd.seg.Segmentation.from_dataset, stored(hospital))
    assert kept.ReferencedSeriesSequence[0].SeriesInstanceUID == hospital.series
    volume, again = (item.get_volume(combine_segments=True) for item in (seg, kept))
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_allclose(again.affine, volume.affine)
    print(f"MONAI Label's DICOM SEG: {volume.array.shape}, {np.count_nonzero(volume.array)} voxels; read back the same")
    print(f"affine\n{volume.affine.round(3)}")
