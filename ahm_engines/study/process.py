# SPDX-License-Identifier: Apache-2.0
"""What runs in the process of a cell: the bundle's commands, and what came of them."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ahm_engines.errors import behind_monai
from ahm_engines.files import write_json
from ahm_engines.handlers.checkpoint import LAST, load_checkpoint
from ahm_engines.study.cells import OPTIONS, Job
from ahm_engines.study.labelling import write_labelled

__all__ = ["OUTCOME", "read_outcome", "run_job"]

OUTCOME, LOG, PIECES = "outcome.json", "log.txt", "seconds.json"
VALIDATED = "validation/"  # what the names of a validation's curves begin with
Points = list[tuple[int, float]]


def run_job(job: Job, environment: Mapping[str, str], threads: int) -> None:
    """Run a job with its output in ``log.txt``, and write ``outcome.json``: what was measured, or the error."""
    _die_with_parent()
    os.environ.update(environment)
    _write_output_to(job.folder / LOG)
    start, before = time.perf_counter(), _seconds_before(job.folder)
    try:
        write_json(job.folder / OPTIONS, job.options)
        outcome = _run(job, threads) | {"status": "done"}
    except BaseException as error:  # whatever it is, the study has to know
        traceback.print_exc()
        outcome = {"status": "failed", "error": _one_line(error)}
    write_json(job.folder / OUTCOME, outcome | {"seconds": before + time.perf_counter() - start})


def _seconds_before(folder: Path) -> float:
    """Note when this process began; return the seconds of those before, each until the checkpoint it left behind."""
    path, checkpoint = folder / PIECES, folder / "models" / LAST
    before, now = 0.0, time.time()
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        saved = checkpoint.stat().st_mtime if checkpoint.is_file() else 0.0
        before = then["before"] + max(saved - then["began"], 0.0)
    write_json(path, {"before": before, "began": now})
    return before


def read_outcome(folder: Path, exitcode: int | None) -> dict[str, Any]:
    """What `run_job` wrote; of a process that died before, that it did."""
    path = folder / OUTCOME
    if path.is_file():
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return outcome
    signal = f"signal {-exitcode}, perhaps for want of memory" if exitcode and exitcode < 0 else f"exit code {exitcode}"
    return {"status": "failed", "error": f"the process ended with {signal}; see {LOG} in its folder.", "seconds": None}


def _run(job: Job, threads: int) -> dict[str, Any]:
    import torch  # only here: the environment has to be set before

    torch.set_num_threads(threads)
    if job.choosing is not None:
        write_labelled(job.choosing, job)
    _bundle("training", job.config_files())
    place = load_checkpoint(job.folder / "models" / LAST)["trainer"]
    outcome = _costs(job.folder) | {"steps": place["iteration"]}  # of the whole training, however often it was resumed
    curves = _scalars(job.folder / "tensorboard")
    if job.cell.stage == "pretrain":
        validated = {name: curve for name, curve in curves.items() if name.startswith(VALIDATED)}
        return outcome | {"metrics": {name.removeprefix(VALIDATED): curve[-1][1] for name, curve in validated.items()}}
    _bundle("evaluating", job.config_files("evaluate.json"))
    points = curves.get(VALIDATED + _key_metric(job), [])
    curve = [(epoch * place["epoch_length"], value) for epoch, value in points]
    return outcome | {"metrics": _scores(job.folder), "curve": curve}


def _bundle(command: str, files: Sequence[str]) -> None:
    """``python -m monai.bundle run <command> --config_file ...``, without a new interpreter."""
    from monai.bundle import run

    run(command, config_file=list(files))


def _costs(folder: Path) -> dict[str, Any]:
    costs: dict[str, Any] = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    return {key: costs[key] for key in ("step_seconds", "memory_mib", "device")}


def _scalars(folder: Path) -> dict[str, Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _key_metric(job: Job) -> str:
    return str(job.options.get("key_metric", "dice"))


def _scores(folder: Path) -> dict[str, float]:
    """Means over the evaluated cases, and how often there was no distance since nothing was found."""
    report = json.loads((folder / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    means = {name: value["mean"] if isinstance(value, dict) else value for name, value in report["scores"].items()}
    return means | ({"hd95_missing": sum(report["hd95_missing"].values())} if "hd95_missing" in report else {})


def _one_line(error: BaseException) -> str:
    """What went wrong, without the errors about configuration files that MONAI wraps it in.

    Further lines are lists of files, and stay in the log: results and reports are handed on.
    """
    error = behind_monai(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = f" ({len(lines) - 1} more lines in {LOG})" if len(lines) > 1 else ""
    return f"{type(error).__name__}: {''.join(lines[:1])}"[:500] + more


def _write_output_to(path: Path) -> None:
    """Append everything that is printed, by libraries too, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    logging.captureWarnings(True)


def _die_with_parent() -> None:
    """A study that is killed takes its runs with it."""
    parent = parent_process()
    if parent is not None:
        watch = threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True)
        watch.start()
