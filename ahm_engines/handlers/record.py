# SPDX-License-Identifier: Apache-2.0
"""What a training is, on disk as soon as it is let in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ahm_engines.reports.record import write_record

__all__ = ["RunRecord"]


class RunRecord:
    """Write the record of a run when it starts, on the first process.

    Behind :class:`Checkpoints` in a trainer's handlers, a training that those refuse leaves the record of an earlier
    one, or of one at work in the same folder, as it is.

    Args:
        path: of the JSON file; its folder is made if need be.
        record: of :func:`ahm_engines.reports.describe_run`.

    Raises:
        OSError: on starting, when the file cannot be written.
    """

    def __init__(self, path: str | Path, record: Mapping[str, Any]) -> None:
        self.path = path
        self.record = record

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._write)

    def _write(self) -> None:
        write_record(self.path, self.record)
