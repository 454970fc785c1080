# SPDX-License-Identifier: Apache-2.0
"""From files on disk to lists of cases: find, check, split, read."""

from ahm_transforms.io._types import BadCasesError, Case, Geometry, LeftOut
from ahm_transforms.io.cases import Cases, load_cases
from ahm_transforms.io.download import download_decathlon
from ahm_transforms.io.find import find_cases
from ahm_transforms.io.naming import NameByCased
from ahm_transforms.io.reader import CaseReader, LoadCased, load_image
from ahm_transforms.io.split import split_by_patient
from ahm_transforms.io.template import template_cases, template_path

__all__ = [
    "BadCasesError",
    "Case",
    "CaseReader",
    "Cases",
    "Geometry",
    "LeftOut",
    "LoadCased",
    "NameByCased",
    "download_decathlon",
    "find_cases",
    "load_cases",
    "load_image",
    "split_by_patient",
    "template_cases",
    "template_path",
]
