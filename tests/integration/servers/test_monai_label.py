# SPDX-License-Identifier: Apache-2.0
"""The stock app of MONAI Label with our bundles: what it lists, predicts and trains, and what it says when asked amiss.

One server answers all tests; they stand in the order in which a datastore fills with labels.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from PIL import Image

from ahm_engines.monai_label import add_bundle
from ahm_transforms.io import find_cases, load_image
from tests.bundles import running
from tests.bundles.ahm_classification import classifying
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import CLASSIFICATION, OBLIQUE_LIA, ROOT, SEGMENTATION, checkpoint, command, finish
from tests.fixtures_data import real_data
from tests.integration.servers.monai_label_server import MonaiLabel, monai_label, run, stock_app

pytestmark = pytest.mark.servers
BOXES, STRIPES, UNTRAINED, PICTURES = (
    "boxes_segmentation",
    "stripes_classification",
    "untrained_segmentation",
    "pictures_segmentation",
)
MODELS = (BOXES, STRIPES, UNTRAINED, PICTURES)
REAL = ("hippocampus", "mprage")


@dataclass
class Site:
    """The server, its images, the folder of their labels, and what the bundles' own commands say of the images."""

    server: MonaiLabel
    studies: Path
    labels: Path
    expected: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    app = stock_app(folder)
    data = segmenting.write_labelled(folder / "data", 4, OBLIQUE_LIA)
    studies = folder / "studies"
    shutil.copytree(data, studies)
    _write_real(studies)
    _add_models(app, data, folder)
    expected = folder / "expected"
    for name in (BOXES, STRIPES):
        bundle = app / "model" / name
        options = {"dataset_dir": studies, "output_dir": expected / name, "bundle_root": bundle}
        finish(running.start(command(options, run_id="run", files=str(bundle / "configs/inference.json"))))
    with monai_label(app, studies, MODELS) as server:
        yield Site(server, studies, data.parent / "labels", expected)


def _write_real(studies: Path) -> None:
    """One small volume, and a whole MR series, whose axes are oblique, as a NIfTI file."""
    try:
        volume = sorted(real_data("hippocampus_mr/images").glob("*.nii.gz"))[0]
        archive = real_data("dicom/mr_t1_mprage_192slices.tgz")
    except pytest.skip.Exception:
        return
    shutil.copy(volume, studies / "hippocampus.nii.gz")
    with tarfile.open(archive) as series:
        series.extractall(studies.parent / "series", filter="data")
    (case,) = find_cases(studies.parent / "series").cases
    scan = load_image(case["image"])
    nib.save(nib.Nifti1Image(scan.numpy().astype(np.int16), scan.affine.numpy()), studies / "mprage.nii.gz")


def _add_models(app: Path, data: Path, folder: Path) -> None:
    segmenting.train(data, folder / "boxes", crop_size=32, spacing_mm=2.0, samples_per_case=4, max_epochs=2)
    add_bundle(app, SEGMENTATION, checkpoint=folder / "boxes/models/model.pt", name=BOXES)
    classifying.train(classifying.write_volumes(folder / "stripes"), folder / "classes")
    add_bundle(app, CLASSIFICATION, checkpoint=folder / "classes/models/model.pt", name=STRIPES)
    add_bundle(app, SEGMENTATION, classes=["lesion"], name=UNTRAINED)
    flat = {"modality": "image2d", "spatial_dims": 2}
    segmenting.train(_write_pictures(folder / "pictures"), folder / "flat", classes=["square"], **flat)
    add_bundle(app, SEGMENTATION, checkpoint=folder / "flat/models/model.pt", name=PICTURES)


def _write_pictures(folder: Path) -> Path:
    for number in range(4):
        label = np.zeros((24, 30), np.uint8)
        label[4 : 12 + number, 8:20] = 1
        for kind, values in (("images", 200 * label), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / f"picture{number}.png")
    return folder / "images"


def volume_of(answer: requests.Response) -> nib.Nifti1Image:
    assert answer.status_code == 200, answer.text
    return nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))


def assert_same(found: nib.Nifti1Image, expected: nib.Nifti1Image, image: Path) -> None:
    """The same grid as the image, and the same classes as our own command found."""
    grid = nib.load(image)
    assert found.shape == expected.shape == grid.shape
    np.testing.assert_allclose(found.affine, grid.affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


def test_models_are_listed_with_their_labels(site: Site) -> None:
    info = site.server.get("info/")
    assert sorted(info["models"]) == sorted({*MODELS} - {UNTRAINED})
    boxes, stripes = info["models"][BOXES], info["models"][STRIPES]
    assert (boxes["type"], boxes["labels"], boxes["dimension"]) == ("segmentation", {"box": 1, "slab": 2}, 3)
    assert (stripes["type"], stripes["labels"]) == ("classification", {"rows": 0, "columns": 1})
    assert info["models"][PICTURES]["dimension"] == 2
    assert boxes["config"]["model_filename"] == ["model.pt"]
    assert {BOXES, UNTRAINED} <= set(info["trainers"])


@pytest.mark.parametrize("image", ["scan0", *REAL])
def test_inference_by_id_is_that_of_the_bundle(site: Site, image: str) -> None:
    if not (site.studies / f"{image}.nii.gz").is_file():
        pytest.skip("needs the real data: set AHM_DATA to the folder that holds them")
    found = volume_of(site.server.infer(BOXES, image))
    expected = nib.load(site.expected / BOXES / image / f"{image}_seg.nii.gz")
    counts = np.bincount(np.asarray(found.dataobj, int).ravel(), minlength=3)
    print(f"\n{image}: shape {found.shape}, voxels of each class {counts.tolist()}, affine\n{found.affine.round(4)}")
    assert_same(found, expected, site.studies / f"{image}.nii.gz")
    assert counts[1:].any() and counts[0]


def test_inference_by_upload_is_the_same(site: Site) -> None:
    image = site.studies / "scan1.nii.gz"
    found = volume_of(site.server.infer(BOXES, file=image))
    assert_same(found, nib.load(site.expected / BOXES / "scan1/scan1_seg.nii.gz"), image)


def test_classification_answers_with_the_classes(site: Site) -> None:
    answer = site.server.infer(STRIPES, "scan0", output="json").json()
    scores = {item["label"]: item["score"] for item in answer["prediction"]}
    with (site.expected / STRIPES / "predictions.csv").open() as file:
        (expected,) = (row for row in csv.DictReader(file) if row["case_id"] == "scan0")
    assert scores == pytest.approx({name: float(expected[name]) for name in ("rows", "columns")}, abs=1e-5)


def test_a_picture_for_a_model_of_pictures(site: Site, tmp_path: Path) -> None:
    picture = site.labels.parents[1] / "pictures/images/picture0.png"
    answer = site.server.infer(PICTURES, file=picture)
    assert answer.status_code == 200
    segmenting.infer(picture, tmp_path, site.server.app / "model" / PICTURES / "models/model.pt")
    expected = np.squeeze(nib.load(tmp_path / "picture0/picture0_seg.nii.gz").dataobj)
    found = np.asarray(Image.open(BytesIO(answer.content)))
    np.testing.assert_array_equal(found.T, expected)


@pytest.mark.parametrize(
    ("model", "image", "said"),
    [
        (BOXES, "nobody", "expected the path of an image, got an empty one: is the id of the image right?"),
        (UNTRAINED, "scan0", "as neither model.pt nor model.ts exists"),
        ("liver_segmentation", "scan0", "There is no model 'liver_segmentation' available"),
    ],
)
def test_what_is_not_there(site: Site, model: str, image: str, said: str) -> None:
    assert site.server.infer(model, image).status_code == 500
    assert site.server.said(said)


def test_a_picture_for_a_model_of_volumes(site: Site) -> None:
    picture = site.labels.parents[1] / "pictures/images/picture0.png"
    assert site.server.infer(BOXES, file=picture).status_code == 500
    assert site.server.said("expected a volume for modality mr or ct: pass --modality image2d")


def test_the_stock_strategies_choose_scans_without_a_label(site: Site) -> None:
    save_label(site, "scan0")
    for strategy in ("first", "random"):
        chosen = site.server.post(f"activelearning/{strategy}").json()["id"]
        assert chosen in {path.name.removesuffix(".nii.gz") for path in site.studies.glob("*.nii.gz")} - {"scan0"}


def save_label(site: Site, image: str, *, only: int | None = None) -> None:
    """Hand in a label as 3D Slicer does, with all classes or one of them."""
    path = site.labels / f"{image}.nii.gz"
    if only is not None:
        label = nib.load(path)
        path = site.labels.parent / f"{image}.nii.gz"
        nib.save(nib.Nifti1Image(only * (np.asarray(label.dataobj) == only).astype(np.uint8), label.affine), path)
    with path.open("rb") as stream:
        answer = requests.put(
            f"{site.server.url}/datastore/label",
            params={"image": image, "tag": "final"},
            files={"label": (path.name, stream)},
            timeout=60,
        )
    assert answer.status_code == 200, answer.text


def test_a_class_that_nobody_labelled(site: Site) -> None:
    save_label(site, "scan0", only=1)
    path = site.server.app / "model" / BOXES / "models/model.pt"
    before = path.read_bytes()
    assert site.server.train(BOXES, max_epochs=1)["status"] == "ERROR"
    told = "class 'slab' (label value 2) occurs in none of the 1 training case(s)"
    assert site.server.said(told)
    assert path.read_bytes() == before


def test_training_goes_on_from_the_model_and_replaces_it(site: Site, tmp_path: Path) -> None:
    for image in ("scan0", "scan1", "scan2"):
        save_label(site, image)
    path = site.server.app / "model" / BOXES / "models/model.pt"
    before = checkpoint(path)
    started = volume_of(site.server.infer(BOXES, "scan3"))
    state = site.server.train(BOXES, max_epochs=2)
    assert state["status"] == "DONE", "\n".join(state["details"])
    assert site.server.said(f"Restored all variables from {path}")

    after = checkpoint(path)
    assert not all(torch.equal(before["model"][name], value) for name, value in after["model"].items())
    data = after["provenance"]["data"]
    assert (data["training_cases"], data["validation_cases"]) == (2, 1)
    assert after["provenance"]["settings"]["classes"] == ["box", "slab"] and after["best"]["name"] == "dice"

    ended = volume_of(site.server.infer(BOXES, "scan3"))
    assert np.any(np.asarray(started.dataobj) != np.asarray(ended.dataobj))
    segmenting.infer(site.studies / "scan3.nii.gz", tmp_path / "now", path)
    assert_same(ended, nib.load(tmp_path / "now/scan3/scan3_seg.nii.gz"), site.studies / "scan3.nii.gz")


def test_a_port_in_use(site: Site) -> None:
    port = site.server.url.rpartition(":")[2]
    done = run(site.server.app, site.studies, [BOXES], "--port", port)
    assert done.returncode != 0
    assert "address already in use" in done.stdout + done.stderr


def test_a_model_of_pretraining_in_the_place_of_one_that_segments(tmp_path: Path) -> None:
    """Put there by hand, past `add_bundle`."""
    app = stock_app(tmp_path)
    running.train(running.write_cases(tmp_path / "data", 2), tmp_path / "run", max_epochs=1, min_epoch_length=1)
    bundle = shutil.copytree(ROOT / "bundles/ahm_segmentation", app / "model/ahm_segmentation")
    (bundle / "models").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "run/models/model.pt", bundle / "models/model.pt")
    done = run(app, tmp_path / "data", ["ahm_segmentation"])
    assert done.returncode != 0
    assert "model.pt: a checkpoint of pretraining, expected one of segmentation" in done.stdout + done.stderr
