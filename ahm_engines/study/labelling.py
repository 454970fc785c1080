# SPDX-License-Identifier: Apache-2.0
"""Arms whose pretraining chooses the patients that get labels, as it would for an annotator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ahm_engines.files import write_json
from ahm_engines.study.cells import Choosing, Job
from ahm_engines.study.settings import LEAST_UNDERSTOOD, TYPICAL

__all__ = ["write_labelled"]

Images = dict[str, list[Any]]  # of each patient


def write_labelled(choosing: Choosing, job: Job) -> None:
    """Write the datalist of a finetuning: of those who can be chosen, the patients that its pretraining chooses.

    A patient with several scans counts as their mean.
    """
    content = json.loads(choosing.pool.read_text(encoding="utf-8"))
    images: Images = {}
    for entry in content["training"]:
        images.setdefault(entry["patient_id"], []).append(entry["image"])
    checkpoint = Path(job.options["pretrained"])
    chosen = CHOICES[choosing.strategy](images, choosing.count, checkpoint, job.bundle.parent / "ahm_pretrain")
    content["training"] = [entry for entry in content["training"] if entry["patient_id"] in chosen]
    write_json(Path(job.options["datalist"]), content)


def _most_typical(images: Images, count: int, checkpoint: Path, bundle: Path) -> list[str]:
    from ahm_engines.selection import ScanFeatures, typical_patients

    return typical_patients(images, count, ScanFeatures(checkpoint, device=_device()))


def _least_understood(images: Images, count: int, checkpoint: Path, bundle: Path) -> list[str]:
    from statistics import fmean

    from ahm_engines.monai_label import ReconstructionError

    error = ReconstructionError(bundle, checkpoint, device=_device())
    errors = {patient: fmean(error(scan) for scan in scans) for patient, scans in images.items()}
    return sorted(errors, key=errors.__getitem__, reverse=True)[:count]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


CHOICES: dict[str, Callable[[Images, int, Path, Path], list[str]]] = {
    TYPICAL: _most_typical,
    LEAST_UNDERSTOOD: _least_understood,
}
