# SPDX-License-Identifier: Apache-2.0
"""Our own app on the server, from unlabelled scans to a model: pretrain, ask for a scan, label it, train, predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ahm_engines.monai_label import add_bundle
from tests.bundles import running
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import PRETRAIN, SEGMENTATION, checkpoint
from tests.fixtures_data import write_nifti
from tests.integration.servers.monai_label_server import MonaiLabel, monai_label

pytestmark = pytest.mark.servers
PRETRAINED = "model/ahm_pretrain/runs/pretrain/models/model.pt"
WORST = "noise"  # the scan that is unlike the others
SCANS = ("scan0", "scan1", "scan2", "scan3")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MonaiLabel, Path]]:
    """The server and the folder of its images; nothing is trained yet, and nothing labelled."""
    folder = tmp_path_factory.mktemp("site")
    data = segmenting.write_labelled(folder / "data", len(SCANS))
    studies = shutil.copytree(data, folder / "studies")
    write_nifti(studies / f"{WORST}.nii.gz", segmenting.SHAPE)
    running.train(data, folder / "run", max_epochs=1, min_epoch_length=1)
    app = folder / "app"
    settings = {**running.TINY, "masker": "uniform", "mask_ratio": 0.3, "learning_rate": 0.02, "min_epoch_length": 40}
    set_in_training(add_bundle(app, PRETRAIN), **settings)
    segmentation = add_bundle(app, SEGMENTATION, pretrained=folder / "run/models/model.pt", classes=segmenting.CLASSES)
    set_in_training(segmentation, min_epoch_length=1)
    with monai_label(app, studies, [], env={"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}) as server:
        yield server, studies


def set_in_training(bundle: Path, **settings: object) -> None:
    path = bundle / "configs/train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def done(state: dict[str, object], server: MonaiLabel) -> bool:
    assert state["status"] == "DONE", server.log.read_text()[-4000:]
    return True


def test_what_the_app_offers(site: tuple[MonaiLabel, Path]) -> None:
    info = site[0].get("info/")
    assert info["models"] == {}
    assert sorted(info["trainers"]) == ["ahm_pretrain", "ahm_segmentation"]
    assert sorted(info["strategies"]) == ["first", "least_understood", "random"]
    assert list(info["scoring"]) == ["reconstruction_error"]


def test_scoring_before_anything_was_pretrained(site: tuple[MonaiLabel, Path]) -> None:
    server, _ = site
    server.post("scoring/reconstruction_error").raise_for_status()
    assert server.wait("scoring")["status"] == "ERROR"
    assert server.said("no such checkpoint: pretrain first, or put one there")


def test_pretraining_uses_images_without_labels(site: tuple[MonaiLabel, Path]) -> None:
    server, _ = site
    assert done(server.train("ahm_pretrain", max_epochs=2), server)
    data = checkpoint(server.app / PRETRAINED)["provenance"]["data"]
    assert (data["training_cases"], data["validation_cases"]) == (4, 1)


def test_the_scan_least_understood_comes_first(site: tuple[MonaiLabel, Path]) -> None:
    server, _ = site
    server.post("scoring/reconstruction_error", {"device": "cpu"}).raise_for_status()
    assert done(server.wait("scoring"), server)
    errors = {
        name: server.get(f"datastore/image/info?image={name}")["reconstruction_error"] for name in (*SCANS, WORST)
    }
    print(f"\nreconstruction errors {errors}")
    chosen = [server.post("activelearning/least_understood").json() for _ in errors]
    assert [scan["id"] for scan in chosen] == sorted(errors, key=lambda name: -errors[name])
    assert chosen[0]["reconstruction_error"] == max(errors.values())


def test_a_model_starts_from_the_pretraining_and_appears(site: tuple[MonaiLabel, Path]) -> None:
    server, studies = site
    (studies / "labels/final").mkdir(parents=True, exist_ok=True)
    for name in SCANS[:3]:
        shutil.copy(studies.parent / f"data/labels/{name}.nii.gz", studies / "labels/final")
    assert done(server.train("ahm_segmentation", max_epochs=1), server)
    assert server.said("pretrained/model.pt:")  # and then which weights fitted
    info = server.get("info/")
    assert info["models"]["ahm_segmentation"]["labels"] == {"box": 1, "slab": 2}

    answer = server.infer("ahm_segmentation", "scan3")
    assert answer.status_code == 200
    (studies.parent / "answer.nii.gz").write_bytes(answer.content)
    path = server.app / "model/ahm_segmentation/models/model.pt"
    segmenting.infer(studies / "scan3.nii.gz", studies.parent / "out", path)
    found, expected = studies.parent / "answer.nii.gz", studies.parent / "out/scan3/scan3_seg.nii.gz"
    np.testing.assert_array_equal(*(np.asarray(nib.load(image).dataobj) for image in (found, expected)))


@pytest.mark.parametrize(
    ("model", "image", "reason"),
    [
        ("ahm_segmentation", "scan9", "expected the path of an image, got an empty one: is the id of the image right?"),
        ("liver_segmentation", "scan3", "There is no model 'liver_segmentation' available"),
    ],
)
def test_a_prediction_that_fails_is_answered_with_the_reason(
    site: tuple[MonaiLabel, Path], model: str, image: str, reason: str
) -> None:
    answer = site[0].infer(model, image)
    assert answer.status_code == 500
    assert reason in answer.json()["detail"]


def test_the_datastore_is_left_as_labelled(site: tuple[MonaiLabel, Path]) -> None:
    """Pretraining, scoring and training write next to the models, and not among the scans."""
    server, studies = site
    assert server.get("datastore/")["completed"] == 3
    kept = {path.name for path in studies.iterdir() if not path.name.startswith((".", "datastore"))}
    assert kept == {"labels", f"{WORST}.nii.gz", *(f"{name}.nii.gz" for name in SCANS)}
