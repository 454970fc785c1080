# SPDX-License-Identifier: Apache-2.0
"""The classes that inference found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from ahm_engines.files import writable_folder, write_csv, write_json

__all__ = ["ClassificationResults"]


class ClassificationResults:
    """Write ``predictions.csv`` and ``predictions.json`` with the class and all probabilities of every case.

    Attach it to a :class:`~ahm_engines.case_inference.CaseInference` whose postprocessing makes probabilities; cases
    that failed are in ``results.json`` alone.

    Args:
        output_dir: folder for both files.
        classes: names of the classes.

    Raises:
        OSError: when ``output_dir`` cannot be written to.
        ValueError: while running, when the output is no set of probabilities of these classes.
    """

    def __init__(self, output_dir: str | Path, classes: Sequence[str]) -> None:
        self.folder = writable_folder(output_dir)
        self.classes = list(classes)
        self._rows: list[tuple[str, list[float]]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an engine with decollated outputs."""
        engine.add_event_handler(Events.STARTED, self._rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item in engine.state.output:
            chances = torch.as_tensor(item["pred"]).detach().cpu()
            good = chances.shape == (len(self.classes),) and bool((chances >= 0).all())
            if not good or abs(float(chances.sum()) - 1) > 1e-3:
                raise ValueError(
                    f"pred: expected probabilities of {self.classes}, got {chances.tolist()} for {item['case_id']}; "
                    "put Activationsd(keys='pred', softmax=True) into the postprocessing."
                )
            self._rows.append((str(item["case_id"]), [round(chance, 6) for chance in chances.tolist()]))

    def _write(self) -> None:
        rows = [
            {"case_id": case_id, "predicted": self._best(chances), **dict(zip(self.classes, chances, strict=True))}
            for case_id, chances in self._rows
        ]
        write_csv(self.folder / "predictions.csv", ["case_id", "predicted", *self.classes], rows)
        cases: list[dict[str, Any]] = [
            {
                "case_id": case_id,
                "predicted": self._best(chances),
                "probabilities": dict(zip(self.classes, chances, strict=True)),
            }
            for case_id, chances in self._rows
        ]
        write_json(self.folder / "predictions.json", {"classes": self.classes, "cases": cases})

    def _best(self, chances: Sequence[float]) -> str:
        return self.classes[max(range(len(chances)), key=chances.__getitem__)]
