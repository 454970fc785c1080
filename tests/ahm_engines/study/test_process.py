# SPDX-License-Identifier: Apache-2.0
"""One run in a process of its own."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ahm_engines.study import runner
from ahm_engines.study.cells import Cell, Job, make_job
from ahm_engines.study.process import read_outcome, run_job
from ahm_engines.study.splits import make_splits
from tests.fixtures_study_runs import TINY_RUN, TINY_UNET, blobs, study_of, wait_until

ROOT = Path(__file__).parents[3]
HOLD = "import fcntl, time\nfile = open({path!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
STUDY = """
from pathlib import Path
from ahm_engines.study import runner
from ahm_engines.study.cells import Cell, Job
from ahm_engines.study.folder import make_room
runner.PRELOADED.clear()
folder = Path({folder!r})
job = Job(Cell("pretrain", "a", 0), folder / "run", {{}}, folder / "bundle", (), "")
make_room(job)
runner._start(runner._context(), job, "", 1).join()
"""


def own_bundle(folder: Path, *expressions: str) -> Job:
    """A job of a bundle that does nothing but this."""
    config = folder / "bundle" / "configs" / "train.json"
    config.parent.mkdir(parents=True)
    config.write_text(
        json.dumps(
            {"imports": ["$import os", "$import sys", "$import runpy"], "training": [f"${e}" for e in expressions]}
        )
    )
    return Job(Cell("pretrain", "a", 0), folder / "run", {"resume": True}, folder / "bundle", (), "")


def run_alone(job: Job, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a job in a process of its own, as a study does, and return its outcome."""
    job.folder.mkdir(parents=True, exist_ok=True)
    process = runner._context().Process(target=run_job, args=(job, environment or {}, 1))
    process.start()
    process.join(120)
    return read_outcome(job.folder, process.exitcode)


def test_a_pretraining_leaves_its_output_and_what_was_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"backbone_args": TINY_UNET, "crop_size": 16, "patch_size": 4, "samples_per_case": 1, **TINY_RUN}
    study = study_of(blobs(tmp_path / "data"), {"pretrain": options})
    splits = make_splits(study, tmp_path / "splits")
    cell = Cell("pretrain", "random", 0)
    job = make_job(cell, study, splits, tmp_path, ROOT / "bundles", epochs=2, before=None)
    outcome = run_alone(job)
    assert outcome["status"] == "done" and outcome["steps"] == 2 * max(3, TINY_RUN["min_epoch_length"])
    assert outcome["seconds"] > 0 and outcome["step_seconds"] > 0 and outcome["metrics"]["random_psnr"] > 0
    assert "Epoch" in (job.folder / "log.txt").read_text() and "Epoch" not in capfd.readouterr().out
    assert json.loads((job.folder / "options.json").read_text()) == job.options
    command = json.loads((job.folder / "run_record.json").read_text())["config"]
    assert command["masker"] == "uniform" and command["foreground_threshold"] is None


def test_all_output_is_appended_to_the_log(tmp_path: Path) -> None:
    """What Python prints and what other programs write, after what is there; and the environment is that given."""
    job = own_bundle(tmp_path, "print('by Python')", "os.system('echo by a program')", "print(os.environ['AHM_WHERE'])")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("before\n")
    run_alone(job, {"AHM_WHERE": "here"})
    lines = (job.folder / "log.txt").read_text().splitlines()
    assert lines[0] == "before" and {"by Python", "by a program", "here"} <= set(lines)


def test_the_time_of_a_run_that_was_interrupted_counts_until_its_last_checkpoint(tmp_path: Path) -> None:
    job = own_bundle(tmp_path, "None")
    checkpoint = job.folder / "models" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    began = checkpoint.stat().st_mtime - 100
    (job.folder / "seconds.json").write_text(json.dumps({"before": 1000.0, "began": began}))
    assert 1100 < run_alone(job)["seconds"] < 1100 + 60
    # the process before left no checkpoint of its own, so what it did is lost, and its time is not part of the run's
    assert 1100 < run_alone(job)["seconds"] < 1100 + 60


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("open('/nowhere/at/all')", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        ("sys.exit('no more')", "SystemExit: no more"),
        ("sys.exit('2 bad:\\n  a.png\\n\\n  b.png')", "SystemExit: 2 bad: (2 more lines in log.txt)"),
    ],
)
def test_an_error_is_one_line_and_the_traceback_in_the_log(tmp_path: Path, expression: str, error: str) -> None:
    job = own_bundle(tmp_path, expression)
    outcome = run_alone(job)
    assert (outcome["status"], outcome["error"]) == ("failed", error) and outcome["seconds"] > 0
    assert "Traceback" in (job.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("exitcode", "text"),
    [(-9, "signal 9, perhaps for want of memory"), (-11, "signal 11"), (3, "exit code 3"), (0, "exit code 0")],
)
def test_a_process_that_left_no_outcome_has_failed(tmp_path: Path, exitcode: int, text: str) -> None:
    outcome = read_outcome(tmp_path, exitcode)
    assert outcome["status"] == "failed" and f"the process ended with {text}" in outcome["error"]
    assert "log.txt" in outcome["error"] and outcome["seconds"] is None


def test_a_run_ends_with_its_study(tmp_path: Path) -> None:
    """However the study ends; that the run is gone is seen by a lock that it held."""
    lock = tmp_path / "lock"
    (tmp_path / "hold.py").write_text(HOLD.format(path=str(lock)) + "time.sleep(120)\n")
    own_bundle(tmp_path, f"runpy.run_path({str(tmp_path / 'hold.py')!r})")
    log = tmp_path / "run" / "log.txt"
    study = subprocess.Popen([sys.executable, "-c", STUDY.format(folder=str(tmp_path))], cwd=ROOT)
    try:
        assert wait_until(lambda: log.is_file() and "held" in log.read_text())
        assert not can_lock(lock)
        study.send_signal(signal.SIGKILL)
        assert wait_until(lambda: can_lock(lock), seconds=20)
    finally:
        study.kill()
        study.wait()


def can_lock(path: Path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
