# SPDX-License-Identifier: Apache-2.0
"""Arms whose pretraining chooses the patients that get labels, as our app for MONAI Label would."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from ahm_engines.files import write_json
from ahm_engines.study.cells import Choosing, Job

__all__ = ["write_labelled"]


def write_labelled(choosing: Choosing, job: Job) -> None:
    """Write the datalist of a finetuning: of those who can be chosen, the patients that its pretraining rebuilds worst.

    A patient with several scans counts as their mean.
    """
    import torch  # only here: the environment has to be set before

    from ahm_engines.monai_label import ReconstructionError

    device = "cuda" if torch.cuda.is_available() else "cpu"
    error = ReconstructionError(job.bundle.parent / "ahm_pretrain", job.options["pretrained"], device=device)
    content = json.loads(choosing.pool.read_text(encoding="utf-8"))
    errors: dict[Any, list[float]] = {}
    for entry in content["training"]:
        errors.setdefault(entry["patient_id"], []).append(error(entry["image"]))
    worst_first = sorted(errors, key=lambda patient: fmean(errors[patient]), reverse=True)
    chosen = set(worst_first[: choosing.count])
    content["training"] = [entry for entry in content["training"] if entry["patient_id"] in chosen]
    write_json(job.options["datalist"], content)
