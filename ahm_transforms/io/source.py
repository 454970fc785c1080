# SPDX-License-Identifier: Apache-2.0
"""Where cases come from: a folder, a datalist, or the template that needs no download."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from ahm_transforms.io._types import PARTS, Found, Source
from ahm_transforms.io.datalist import Datalist, datalist_name, read_datalist
from ahm_transforms.io.find import find_cases
from ahm_transforms.io.split import Split
from ahm_transforms.io.template import template_path

LOGGER = logging.getLogger(__name__)


def find_source(
    dataset_dir: str | Path | None,
    datalist: Datalist | None,
    *,
    patient_pattern: str | None,
    pictures: bool | None,
    cache_dir: str | Path | None,
    template: Callable[[], Split],
) -> Source:
    """Return what the datalist lists, else what the folder holds, else the blocks of the template."""
    if datalist is not None:
        source = read_datalist(datalist, dataset_dir=dataset_dir, patient_pattern=patient_pattern, cache_dir=cache_dir)
        _warn_of_shared_patients(source, datalist)
        return source
    if dataset_dir is not None:
        found = find_cases(dataset_dir, patient_pattern=patient_pattern, pictures=bool(pictures), cache_dir=cache_dir)
        return Source(found, {}, Path(dataset_dir))
    split = template()
    listed = {case["case_id"]: part for part in ("validation", "test") for case in getattr(split, part)}
    return Source(Found(split.training + split.validation + split.test), listed, template_path().parent)


def _warn_of_shared_patients(source: Source, datalist: Datalist) -> None:
    patients: dict[str, set[str]] = {part: set() for part in PARTS}
    for case in source.found.cases:
        patients[source.listed.get(case["case_id"], "training")].add(case["patient_id"])
    for one, other in combinations(PARTS, 2):
        if shared := patients[one] & patients[other]:
            LOGGER.warning("%s: %d patient(s) are in both %s and %s.", datalist_name(datalist), len(shared), one, other)
