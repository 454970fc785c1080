# SPDX-License-Identifier: Apache-2.0
"""Bundles are packed as the documentation says, downloaded, loaded and run by MONAI's own functions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import monai.bundle
import pytest
import torch

from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import ROOT, SEGMENTATION, checkpoint, command, finish, start

NAME, SECRET = "ahm_segmentation", "Doe_Jane_1970"
PRIVATE = ("eval/Doe/Doe_seg.nii.gz", "evaluation/scores.csv", "tensorboard/events", "runs/x.png", "run_record.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder in which the bundle was trained on a patient's scans and used since."""
    project = tmp_path_factory.mktemp("project")
    bundle = project / "bundles" / NAME
    shutil.copytree(SEGMENTATION, bundle)
    segmenting.train(segmenting.write_labelled(project / SECRET), bundle)
    for name in PRIVATE:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(SECRET)
    return project


@pytest.fixture(scope="module")
def packed(trained: Path) -> Path:
    """The zip that the lines of the documentation make."""
    page = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
    lines = re.findall(r"```bash\n# pack\n(.*?)```", page, re.DOTALL)[0]
    script = lines.replace("python ", f"{sys.executable} ")
    subprocess.run(["bash", "-ec", script], cwd=trained, check=True)
    return next(trained.glob("*.zip"))


@pytest.fixture(scope="module")
def downloaded(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the bundle that MONAI has downloaded from a web server."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(packed.parent))
    hub = tmp_path_factory.mktemp("hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{packed.name}"
        monai.bundle.download(name=NAME, url=url, bundle_dir=hub, progress=False)
        yield hub / NAME
        server.shutdown()


def test_the_zip_has_the_layout_of_hubs_and_nothing_of_patients(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as content:
        names = [name for name in content.namelist() if not name.endswith("/")]
        assert {name.split("/")[1] for name in names} == {"LICENSE", "configs", "docs", "models"}
        assert all(name.startswith(f"{NAME}/") for name in names)
        assert [name for name in names if "/models/" in name] == [f"{NAME}/models/model.pt"]
        content.extractall(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_download_unpacks_a_bundle_with_all_its_configurations(downloaded: Path) -> None:
    wanted = {path.name for path in (SEGMENTATION / "configs").iterdir()}
    assert {path.name for path in (downloaded / "configs").iterdir()} == wanted


def test_load_builds_the_trained_network_from_a_folder_anywhere(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(
        NAME,
        bundle_dir=downloaded.parent,
        workflow_type="inference",
        key_in_ckpt="model",
        args_file={"bundle_root": str(downloaded)},
    )
    saved = checkpoint(downloaded / "models/model.pt")["model"]
    assert network.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())


def test_a_downloaded_bundle_segments(downloaded: Path, trained: Path, tmp_path: Path) -> None:
    options = {"bundle_root": downloaded, "dataset_dir": trained / SECRET / "images", "output_dir": tmp_path / "out"}
    finish(start(command(options, run_id="run", files=str(downloaded / "configs/inference.json"))))
    assert len(list((tmp_path / "out").rglob("*_seg.nii.gz"))) == 6
