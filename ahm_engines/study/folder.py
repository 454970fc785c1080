# SPDX-License-Identifier: Apache-2.0
"""The folder of a study: one study, run by one process, with room for each run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ahm_engines.files import lock_folder, unlock_folder
from ahm_engines.study.cells import Job
from ahm_engines.study.process import OUTCOME
from ahm_engines.study.settings import Study

__all__ = ["alone_in", "check_same_study", "make_room", "remove_models"]

GROWING = {"arms", "seeds", "draws", "draw_labels"}  # of these, a study that goes on may have more
HASH = "config_hash.txt"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder as long as this study runs; the lock ends with the process."""
    file = lock_folder(folder)
    try:
        yield
    finally:
        if file is not None:
            unlock_folder(folder, file)


def check_same_study(path: Path, study: Study) -> None:
    """A folder holds one study; more arms, fractions, seeds and draws may come to it."""
    if not path.is_file():
        return
    then, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(study.to_json()))
    if then.get("version") != now["version"]:
        raise ValueError(
            f"{path}: written by another version of ahm ({then.get('version')}, now {now['version']}); nothing was "
            "changed. Choose another --output_dir."
        )
    other = [key for key in sorted(now.keys() - GROWING) if then.get(key) != now[key]]
    if other:
        was = "; ".join(f"{key} was {then.get(key)}, is {now[key]}" for key in other)
        raise ValueError(f"{path} is another study: {was}. Choose another --output_dir.")


def make_room(job: Job) -> None:
    """Empty the folder of a job, unless a run with the same settings and patients can go on there."""
    mark = job.folder / HASH
    if not mark.is_file() or mark.read_text(encoding="utf-8") != job.config_hash:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(job.config_hash, encoding="utf-8")
    (job.folder / OUTCOME).unlink(missing_ok=True)


def remove_models(models: Path, *, keep_best: bool) -> None:
    """Remove checkpoints that nothing needs any more."""
    if keep_best:
        (models / "last.pt").unlink(missing_ok=True)
    else:
        shutil.rmtree(models, ignore_errors=True)
