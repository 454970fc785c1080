# SPDX-License-Identifier: Apache-2.0
"""Run the cells of a study, one after the other or several at a time, and go on where it stopped."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ahm_engines.bundles import bundles_folder
from ahm_engines.files import writable_folder, write_json
from ahm_engines.study.cells import (
    Cell,
    Job,
    check_options,
    labels_of,
    make_job,
    pretrained_by,
    pretraining_of,
    stages,
    warn_of_swaps,
)
from ahm_engines.study.folder import alone_in, check_same_study, make_room, remove_models
from ahm_engines.study.process import read_outcome, run_job
from ahm_engines.study.results import CURVE_COLUMNS, Results, Row, append_row
from ahm_engines.study.settings import Study
from ahm_engines.study.slices import with_slices
from ahm_engines.study.splits import Splits, make_splits

__all__ = ["Progress", "StudyRun", "run_study"]

# imported once, in the server that the cells' processes are forked from
PRELOADED = [
    *("monai.bundle", "ahm_engines.handlers", "ahm_engines.study.process", "ahm_networks", "ahm_transforms.recipes"),
    *("torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator"),
]
PACKAGES = {"ahm": "monai-ahm", "monai": "monai", "torch": "torch"}


@dataclass
class Progress:
    """What `run_study` did.

    Attributes:
        finished: cells that have a result now.
        failed: cells whose run failed, or the run that they build on.
        open: cells that nobody has tried, for want of time.
    """

    finished: int = 0
    failed: list[str] = field(default_factory=list)
    open: int = 0


Listener = Callable[[Cell, Row], None]


def run_study(
    study: Study,
    folder: str | Path,
    *,
    cache_dir: str | Path | None = None,
    bundles_dir: str | Path | None = None,
    devices: Sequence[str] = ("",),
    threads: int = 1,
    minutes: float | None = None,
    keep_models: bool = False,
    listener: Listener | None = None,
) -> Progress:
    """Run every cell that has no result yet.

    Pretrainings come first, then those that are given the time of another arm, then the finetunings. A finished cell
    is a row in ``results.csv``; a cell whose run fails is marked there with its error, and tried again the next time.
    A warning says where flips in finetuning swap what the names of the classes tell apart.

    Args:
        study: what to run.
        folder: where everything is written; the folder of a study that was stopped goes on.
        cache_dir: folder that keeps scans as they are prepared, and remembers which were checked, for all cells.
        bundles_dir: folder of the bundles, by default found.
        devices: one entry for each cell that may run at the same time: the ``CUDA_VISIBLE_DEVICES`` of its process, or
            nothing to leave them as they are.
        threads: CPU threads of each process.
        minutes: time after which running cells are stopped; they go on from their last epoch the next time.
        keep_models: keep the checkpoints of finished finetunings, too.
        listener: told of each cell as it ends.

    Raises:
        BlockingIOError: when another process runs a study there.
        ValueError: when the folder holds another study, or results of another version; nothing is overwritten.
        BadCasesError, FileNotFoundError: as `make_splits`.
    """
    folder = writable_folder(folder).absolute()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with alone_in(folder):
        run = StudyRun(study, folder, bundles_folder(bundles_dir), cache_dir, keep_models, listener)
        for cells in stages(study):
            run.run_all(cells, devices, threads, deadline)
    return run.progress


class StudyRun:
    """A study in its folder: what is done, and what a cell needs in order to run.

    Args:
        study: its settings.
        folder: where it is, or will be.
        bundles: folder of the bundles.
        cache_dir: as in `run_study`.
        keep_models: as in `run_study`.
        listener: as in `run_study`.

    Raises:
        ValueError: when the folder holds another study.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        bundles: Path,
        cache_dir: str | Path | None = None,
        keep_models: bool = False,
        listener: Listener | None = None,
    ) -> None:
        self.folder = folder
        self.bundles = bundles
        self.cache_dir = None if cache_dir is None else Path(cache_dir).absolute()
        self.keep_models = keep_models
        self.listener = listener
        self.progress = Progress()
        self.results = Results(folder / "results.csv", study.metrics)
        check_options(study, bundles)
        warn_of_swaps(study, bundles)
        check_same_study(folder / "study.json", study)
        _check_place(folder, study.data.get("dataset_dir"))
        self.study = with_slices(study, folder)
        self.splits: Splits = make_splits(self.study, folder / "splits", cache_dir=self.cache_dir)
        self._check_finished()
        write_json(folder / "study.json", study.to_json())

    def run_all(self, cells: Iterable[Cell], devices: Sequence[str], threads: int, deadline: float) -> None:
        """Run those that have no result, as many at a time as there are devices."""
        every = list(cells)
        waiting = [cell for cell in every if self.results.done(cell) is None]
        self.progress.finished += len(every) - len(waiting)
        context = _context()
        free = list(devices)
        running: dict[Any, tuple[Job, str]] = {}
        try:
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and free:
                    job = self._next(waiting.pop(0))
                    if job is not None:
                        device = free.pop()
                        running[_start(context, job, device, threads)] = (job, device)
                for process in _ended(list(running), deadline):
                    job, device = running.pop(process)
                    free.append(device)
                    self._finish(job, read_outcome(job.folder, process.exitcode))
        finally:
            for process in running:
                process.terminate()
                process.join()
        self.progress.open += len(waiting) + len(running)

    def _check_finished(self) -> None:
        """What has finished must be what would be run now."""
        for cell in chain.from_iterable(stages(self.study)):
            row = self.results.done(cell)
            if row is not None and self._hash(cell, int(row["epochs"])) != row["config_hash"]:
                raise ValueError(
                    f"{self.results.path}: {cell} was run with other settings, patients or another pretraining; "
                    "nothing was changed. Choose another --output_dir."
                )

    def _hash(self, cell: Cell, epochs: int) -> str | None:
        try:
            return self._job(cell, epochs).config_hash
        except LookupError:  # the pretraining that it needs now has no result
            return None

    def _next(self, cell: Cell) -> Job | None:
        """The job of a cell; ``None`` when it cannot run, which is recorded."""
        try:
            job = self._job(cell, self._epochs(cell))
        except LookupError as error:
            self._record(cell, {"status": "failed", "error": error.args[0]})
            return None
        make_room(job)
        return job

    def _job(self, cell: Cell, epochs: int) -> Job:
        source = pretraining_of(self.study, cell)
        before = None if source is None else self._finished(source)["config_hash"]
        places = (self.folder, self.bundles, self.cache_dir)
        return make_job(cell, self.study, self.splits, *places, epochs=epochs, before=before)

    def _finished(self, cell: Cell) -> Row:
        row = self.results.done(cell)
        if row is None:
            raise LookupError(f"needs {cell}, which has failed.")
        return row

    def _epochs(self, cell: Cell) -> int:
        """Those of the settings; with the time of another arm, what the measured times of steps allow, rounded up.

        Seeds that come later get what the first had: times measured with them would make another arm of it.
        """
        arm = self.study.arms[cell.arm]
        epochs = self.study.epochs(cell.stage, arm)
        if cell.stage == "finetune" or arm.equal_time is None:
            return epochs
        before = [self.results.done(Cell(cell.stage, cell.arm, seed)) for seed in self.study.all_seeds]
        if given := [int(row["epochs"]) for row in before if row is not None]:
            return given[0]
        ratio = self._epoch_seconds(arm.equal_time) / self._epoch_seconds(self.study.timed_by(cell.arm))
        theirs = self.study.epochs(cell.stage, self.study.arms[arm.equal_time])
        return max(min(epochs, theirs), math.ceil(ratio * theirs))

    def _epoch_seconds(self, arm: str) -> float:
        """Of the fastest seed: other work on the machine only makes steps slower, and not those of all arms alike."""
        timed = ("pretrain", pretrained_by(self.study, arm))
        rows = [row for cell, row in self.results.rows.items() if (cell.stage, cell.arm) == timed]
        known = [row for row in rows if row["status"] == "done" and row["step_seconds"]]
        seconds = [float(row["step_seconds"]) * int(row["steps"]) / int(row["epochs"]) for row in known]
        if not seconds:
            raise LookupError(f"arm {arm}: no pretraining has finished, so the time of its steps is not known.")
        return min(seconds)

    def _finish(self, job: Job, outcome: dict[str, Any]) -> None:
        for step, value in outcome.get("curve", []):
            place = {name: str(getattr(job.cell, name)) for name in ("arm", "fraction", "seed", "draw")}
            append_row(self.folder / "curves.csv", CURVE_COLUMNS, {**place, "step": step, "value": value})
        facts = {key: outcome.get(key) for key in ("status", "error", "seconds", "steps", "step_seconds", "memory_mib")}
        facts |= {"device": outcome.get("device"), "config_hash": job.config_hash, "epochs": job.options["max_epochs"]}
        best = max((value for _, value in outcome.get("curve", [])), default=None)
        self._record(job.cell, {**outcome.get("metrics", {}), **facts, "validation": best})
        if outcome["status"] == "done":
            remove_models(job.folder / "models", keep_best=self.keep_models or job.cell.stage == "pretrain")

    def _record(self, cell: Cell, values: dict[str, Any]) -> None:
        labels = labels_of(self.study, cell)
        values |= {
            "evaluated_on": self.study.evaluate_on if cell.stage == "finetune" else "validation",
            "labelled_patients": None if labels is None else self.splits.patients[labels],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **{name: _version(package) for name, package in PACKAGES.items()},
        }
        row = self.results.append(cell, values)
        if row["status"] == "done":
            self.progress.finished += 1
        else:
            self.progress.failed.append(f"{cell}: {row['error']}")
        if self.listener is not None:
            self.listener(cell, row)


def _check_place(folder: Path, dataset_dir: str | None) -> None:
    """Figures of a study would be taken for images when it goes on."""
    if dataset_dir and folder.resolve().is_relative_to(Path(dataset_dir).resolve()):
        raise ValueError(f"output_dir: expected a folder outside of the images in {dataset_dir}, got {folder}.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a folder of sources
        return None


def _context() -> Any:
    """Processes forked from a server that has imported everything and computed nothing; elsewhere, new interpreters."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _start(context: Any, job: Job, device: str, threads: int) -> Any:
    environment = {"CUDA_VISIBLE_DEVICES": device} if device else {}
    process = context.Process(target=run_job, args=(job, environment, threads), name=str(job.cell))
    process.start()
    return process


def _ended(running: Sequence[Any], deadline: float) -> list[Any]:
    """Wait until a process ends, if there is one, but not beyond the deadline."""
    left = deadline - time.monotonic()
    if running:  # wait() would wait for none for ever
        wait([process.sentinel for process in running], timeout=max(left, 0) if math.isfinite(left) else None)
    ended = [process for process in running if not process.is_alive()]
    for process in ended:
        process.join()
    return ended
