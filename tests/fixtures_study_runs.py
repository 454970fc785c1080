# SPDX-License-Identifier: Apache-2.0
"""Small pictures to study, studies of them, and runs that only say that they were there."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ahm_engines.files import write_json
from ahm_engines.study import Study, read_study
from ahm_engines.study.cells import OPTIONS, Cell, Job
from ahm_engines.study.process import OUTCOME
from ahm_engines.study.results import COLUMNS, PRETRAINING_METRICS, Results, read_rows

FOUR_ARMS = ["scratch", "random", "random_equal_time", "a3c"]
TINY_UNET = {"channels": [4, 8], "strides": [2], "num_res_units": 0}
TINY_RUN: dict[str, Any] = {"min_epoch_length": 2, "max_epochs": 1, "val_interval": 1, "cases_per_batch": 2}


def write_blobs(folder: Path, names: Sequence[str], *, unlabelled: Sequence[str] = (), side: int = 24) -> Path:
    """Write noisy pictures of a bright square and, but for the unlabelled, its label map; return the images' folder."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*names, *unlabelled]):
        label = np.zeros((side, side), np.uint8)
        start = 2 + number % 6
        label[start : start + 10, 4:14] = 1
        noise = np.random.default_rng(number).integers(0, 60, label.shape)
        Image.fromarray((noise + 150 * label).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        if name in names:
            Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    return folder / "images"


def blobs(folder: Path, patients: int = 10) -> Path:
    """Write one picture of each patient."""
    return write_blobs(folder, [f"p{number:02d}" for number in range(patients)], side=16)


def study_of(images: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """A study of such pictures with few settings of its own."""
    own = {
        "name": "tiny",
        "data": {"dataset_dir": str(images), "classes": ["square"], "modality": "image2d", "spatial_dims": 2},
        "arms": ["scratch", "random"],
        "seeds": {"1.0": 1},
    }
    return read_study(changes={**own, **(changes or {})})


def patients_of(path: Path, *parts: str) -> set[str]:
    """Patients in the lists of a datalist, in all of them unless some are named."""
    content = json.loads(path.read_text())
    return {entry["patient_id"] for part in parts or content for entry in content[part]}


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Rows of results.csv."""
    return read_rows(folder / "results.csv")


def write_result(folder: Path, study: Study, cell: Cell, **values: Any) -> None:
    """Append one row to results.csv."""
    results = Results(folder / "results.csv", study.metrics)
    results.append(cell, {"status": "done", "epochs": 1, **values})


def header(metrics: Sequence[str]) -> list[str]:
    """Columns of results.csv."""
    return [*COLUMNS, *PRETRAINING_METRICS, *metrics]


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Content of every visible file of a study but those of its runs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path): path.read_bytes() for path in paths if "runs" not in path.relative_to(folder).parts}


def table(path: Path) -> list[list[str]]:
    """Lines of a csv file."""
    with open(path, newline="") as file:
        return list(csv.reader(file))


def wait_until(condition: Callable[[], bool], *, seconds: float = 60) -> bool:
    """Return whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@dataclass
class FakeRuns:
    """Takes the place of ``run_job``: notes in a file that it began and ended, and writes the outcome it was told.

    Attributes:
        notes: file with one line for each begin and end, from whatever process.
        outcomes: more entries of ``outcome.json`` by cell; ``{"error": ...}`` makes it fail.
        dying: cells whose process is killed.
        lasting: cells that take a minute.
        together: cells that wait until all of them have begun.
    """

    notes: Path
    outcomes: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    dying: set[Cell] = field(default_factory=set)
    lasting: set[Cell] = field(default_factory=set)
    together: set[Cell] = field(default_factory=set)

    def __call__(self, job: Job, environment: Mapping[str, str], threads: int) -> None:
        """Do as ``run_job`` would, in the process that it is started in."""
        found = "again" if (job.folder / "models" / "last.pt").is_file() else "begin"
        self._note(f"{found}|{job.cell}|{job.options['max_epochs']}|{environment.get('CUDA_VISIBLE_DEVICES', '')}")
        (job.folder / "models").mkdir(exist_ok=True)
        for name in ("last.pt", "model.pt"):
            (job.folder / "models" / name).write_text("weights")
        write_json(job.folder / OPTIONS, job.options)
        write_json(job.folder / OUTCOME, self._outcome(job.cell))
        self._note(f"end|{job.cell}||")

    def begun(self) -> list[str]:
        """Cells in the order in which they began."""
        return [line[1] for line in self.lines() if line[0] in ("begin", "again")]

    def lines(self) -> list[list[str]]:
        """All notes: begin, again (there was a checkpoint to go on from) or end, cell, epochs, device."""
        return [line.split("|") for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    def _outcome(self, cell: Cell) -> dict[str, Any]:
        if cell in self.dying:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell in self.lasting:
            time.sleep(60)
        if cell in self.together:
            met = wait_until(lambda: self.together <= {each for each in self.together if str(each) in self.begun()})
            return {"status": "done" if met else "failed", "error": None if met else "was alone", "seconds": 1.0}
        outcome = {"status": "done", "seconds": 2.0, "steps": 4, "step_seconds": 0.5, "memory_mib": 10, "device": "cpu"}
        if cell.stage == "finetune":
            outcome |= {"metrics": {"dice": 0.5 + 0.1 * cell.seed}, "curve": [[2, 0.25], [4, 0.75], [6, 0.5]]}
        else:
            outcome |= {"metrics": {"random_psnr": 20.0}}
        own = self.outcomes.get(cell, {})
        return outcome | own | ({"status": "failed"} if "error" in own else {})

    def _note(self, line: str) -> None:
        with open(self.notes, "a") as file:
            file.write(line + "\n")
