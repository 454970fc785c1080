# SPDX-License-Identifier: Apache-2.0
"""MONAI Label as a process of its own, with its stock app, and the few requests that tests make."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.bundles.running import ROOT
from tests.integration.processes import free_port, missing, serving

REQUEST_S = 120


@dataclass
class MonaiLabel:
    """A running server: where it is, where its app lies, and what it wrote."""

    url: str
    app: Path
    log: Path

    def get(self, path: str) -> Any:
        answer = requests.get(f"{self.url}/{path}", timeout=REQUEST_S)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, params: Mapping[str, Any] | None = None) -> requests.Response:
        return requests.post(f"{self.url}/{path}", json=dict(params or {}), timeout=REQUEST_S)

    def infer(
        self,
        model: str,
        image: str = "",
        *,
        file: Path | None = None,
        output: str = "image",
        params: Mapping[str, Any] | None = None,
    ) -> requests.Response:
        """Ask for a prediction on an image of the datastore, or on a file that goes along."""
        given = {"device": "cpu", **(params or {})}
        files = {} if file is None else {"file": (file.name, file.read_bytes())}
        return requests.post(
            f"{self.url}/infer/{model}",
            params={"image": image, "output": output},
            data={"params": json.dumps(given)},
            files=files,
            timeout=REQUEST_S,
        )

    def said(self, text: str) -> bool:
        """Whether the server's log holds a text; it may come a little after the answer."""
        end = time.monotonic() + 5
        while text not in self.log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        return text in self.log.read_text()

    def train(self, model: str, **params: Any) -> dict[str, Any]:
        """Train, and return what became of it: ``status`` is DONE or ERROR, ``details`` its last lines."""
        self.post(f"train/{model}", {"device": "cpu", "multi_gpu": False, **params}).raise_for_status()
        return self.wait("train")

    def wait(self, task: str, timeout_s: float = REQUEST_S) -> dict[str, Any]:
        """Wait for the newest task of a kind to end."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            state: dict[str, Any] = self.get(f"{task}/")
            if state["status"] not in ("SUBMITTED", "RUNNING"):
                return state
            time.sleep(0.3)
        raise AssertionError(f"{task} took longer than {timeout_s} s: {state}")


def environment() -> Path:
    """Return the virtual environment of MONAI Label, or skip the test."""
    folder = Path(os.environ.get("AHM_MONAI_LABEL", "nowhere")).absolute()
    if not (folder / "bin/monailabel").is_file():
        missing("MONAI Label (AHM_MONAI_LABEL names its virtual environment)")
    return folder


def stock_app(folder: Path, name: str = "monaibundle") -> Path:
    """Copy the app as ``monailabel apps --download`` does, and return its folder."""
    source = environment() / "monailabel/sample-apps" / name
    return shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("logs", "model", "__pycache__"))


def add_bundle(app: Path, bundle: Path, checkpoint: Path | None, **settings: Any) -> Path:
    """Put a bundle into an app by hand, with ``settings`` in its train.json, and return its folder there."""
    target = shutil.copytree(bundle, app / "model" / bundle.name, ignore=shutil.ignore_patterns("runs", "models"))
    if checkpoint is not None:
        (target / "models").mkdir()
        shutil.copy(checkpoint, target / "models/model.pt")
    train = target / "configs/train.json"
    train.write_text(json.dumps({**json.loads(train.read_text()), **settings}))
    return target


@contextmanager
def monai_label(
    app: Path,
    studies: Path | str,
    models: Sequence[str],
    *,
    conf: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[MonaiLabel]:
    """Run the server with bundles of the app's folder ``model`` on a folder or the address of a DICOMweb server."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    log = app / "server.log"
    with serving(
        [*start_words(app, studies, models, conf), "--host", "127.0.0.1", "--port", str(port)],
        f"{url}/info/",
        log,
        env={**_surroundings(), **(env or {})},
        cwd=app,
    ):
        yield MonaiLabel(url, app, log)


def start_words(app: Path, studies: Path | str, models: Sequence[str], conf: Mapping[str, str] | None) -> list[str]:
    """Return the words that start the server, without host and port."""
    settings = {"zoo_source": "local", "sam2": "false", **(conf or {})}
    if models:
        settings["models"] = ",".join(models)
    words = ["monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    for key, value in settings.items():
        words += ["--conf", key, value]
    return [str(environment() / "bin/python"), "-m", *words]


def run(app: Path, studies: Path, models: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Start a server that is to end by itself, and return what it said."""
    words = [*start_words(app, studies, models, None), "--host", "127.0.0.1", *options]
    surroundings = {**os.environ, **_surroundings()}
    return subprocess.run(words, cwd=app, env=surroundings, capture_output=True, text=True, timeout=REQUEST_S)


def _surroundings() -> dict[str, str]:
    """The environment as ``source FOLDER/bin/activate`` leaves it, on one thread."""
    folder = environment()
    return {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
