# SPDX-License-Identifier: Apache-2.0
"""What a training took: time, steps and memory."""

from __future__ import annotations

from array import array
from pathlib import Path
from statistics import median
from time import perf_counter

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from ahm_engines.files import writable_folder, write_json

__all__ = ["RunCosts"]

STATUS = Path("/proc/self/status")


class RunCosts:
    """Write what a run took to a JSON file at its end, without ever waiting for the device.

    - ``seconds``: wall-clock time of the run, validation included.
    - ``steps``: training steps of this run; those before it was resumed do not count.
    - ``step_seconds``: median time from the start of a step to the start of the next one in the same epoch, loading
      included; ``null`` where no epoch had two steps.
    - ``memory_mib``: most memory that the process has had so far: on CUDA that of tensors on the trainer's device,
      else the resident set without loader workers; ``null`` where the system does not tell.
    - ``device``: name of the GPU, or ``cpu``.

    The first process writes. A run that had nothing left to do leaves the file of an earlier one alone, as does one
    that fails.

    Args:
        path: of the file; its folder is made if need be.

    Raises:
        OSError: when the folder cannot be written to.

    Example:
        >>> import json, tempfile
        >>> from monai.engines import SupervisedTrainer
        >>> network, folder = torch.nn.Linear(1, 1), tempfile.TemporaryDirectory()
        >>> costs = RunCosts(folder.name + "/costs.json")
        >>> batches = [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * 3
        >>> optimizer = torch.optim.SGD(network.parameters(), 0.1)
        >>> SupervisedTrainer("cpu", 2, batches, network, optimizer, torch.nn.MSELoss(), train_handlers=[costs]).run()
        >>> json.loads(costs.path.read_text())["steps"]
        6
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        writable_folder(self.path.parent)
        self._start()

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_step)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self) -> None:
        self._began = perf_counter()
        self._last_step: float | None = None
        self._steps = 0
        self._gaps = array("d")  # 8 bytes a step

    def _start_epoch(self) -> None:
        self._last_step = None

    def _start_step(self) -> None:
        now = perf_counter()
        if self._last_step is not None:
            self._gaps.append(now - self._last_step)
        self._last_step = now
        self._steps += 1

    def _write(self, engine: Engine) -> None:
        if idist.get_rank() != 0 or self._steps == 0:
            return
        device = torch.device(engine.state.device)
        costs = {
            "seconds": perf_counter() - self._began,
            "steps": self._steps,
            "step_seconds": median(self._gaps) if self._gaps else None,
            "memory_mib": _peak_mib(device),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        write_json(self.path, costs)


def _peak_mib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not STATUS.is_file():
        return None
    # not getrusage: its peak starts at what the process that started this one had
    peaks = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return float(peaks[0]) / 1024 if peaks else None
