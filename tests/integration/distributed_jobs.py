# SPDX-License-Identifier: Apache-2.0
"""Run bundle commands one after the other in each process of torchrun, and keep what each process saw.

``torchrun --nproc_per_node=2 tests/integration/distributed_jobs.py jobs.json``: a job holds the arguments of
``monai.bundle.run``. Several jobs in one start save the seconds that it takes to import torch and MONAI. They share one
process group, as torchrun has none for a second: the first job makes it and the last one ends it. The files that each
process opened for writing are listed in ``written<number>.json`` beside the jobs, as far as they are below that folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.bundle import run
from torch import nn

WATCH = "tests.integration.distributed_jobs.watch"


def watched(**modules: str) -> list[Any]:
    """Return the steps of a training that writes ``rank<number>.pt`` at its end; modules by reference, ``@network``."""
    return [
        {"_target_": WATCH, "trainer": "@train#trainer", "folder": "@output_dir", **modules},
        "$@train#trainer.run()",
    ]


def watch(trainer: Engine, folder: str, **modules: nn.Module) -> None:
    """Keep the losses and masks of all iterations, and the weights at the end."""
    seen: dict[str, list[Any]] = {"loss": [], "masker_loss": [], "mask": []}

    def look(engine: Engine) -> None:
        for name, values in seen.items():
            if engine.state.output.get(name) is not None:
                values.append(engine.state.output[name].detach().clone())

    def write() -> None:
        weights = {name: module.state_dict() for name, module in modules.items()}
        torch.save({**seen, **weights}, Path(folder) / f"rank{idist.get_rank()}.pt")

    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    trainer.add_event_handler(Events.COMPLETED, write)


def run_all(jobs: list[dict[str, Any]]) -> None:
    """Run the commands; those in between find the processes connected, and leave them so."""
    for place, job in enumerate(jobs):
        begin = {"initialize": ["$monai.utils.set_determinism(@seed)"]} if place > 0 else {}
        end: dict[str, Any] = {"finalize": []} if place < len(jobs) - 1 else {}
        run(**job, **begin, **end)


class Written:
    """Notice every file below a folder that Python opens for writing in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take in what the interpreter reports."""
        if event != "open" or not isinstance(arguments[0], str) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = Path(arguments[0])
        if path.is_relative_to(self.folder) and not path.is_dir():
            self.paths.append(str(path.relative_to(self.folder)))


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    written = Written(jobs.parent)
    run_all(json.loads(jobs.read_text()))
    (jobs.parent / f"written{os.environ['RANK']}.json").write_text(json.dumps(written.paths))
