# SPDX-License-Identifier: Apache-2.0
"""From files on disk to lists of cases: find, check, split, read."""

from ahm_transforms.io._types import BadCasesError, Case, Found, Geometry, LeftOut
from ahm_transforms.io.cache import BoundedCacheDataset
from ahm_transforms.io.cases import Cases, load_cases
from ahm_transforms.io.dicom_seg import SaveDicomSegd, write_dicom_seg
from ahm_transforms.io.download import download_decathlon
from ahm_transforms.io.find import find_cases, find_inputs
from ahm_transforms.io.given import CaseFinder
from ahm_transforms.io.labelled import load_classification_cases, load_segmentation_cases
from ahm_transforms.io.labels import LoadLabeld
from ahm_transforms.io.naming import NameByCased
from ahm_transforms.io.pairs import with_masks
from ahm_transforms.io.reader import CaseReader, LoadCased, load_image
from ahm_transforms.io.segments import Segment, read_segments
from ahm_transforms.io.slices import slice_options, write_slices
from ahm_transforms.io.split import Split, split_by_patient
from ahm_transforms.io.template import template_cases, template_path
from ahm_transforms.io.writer import writer_for

__all__ = [
    "BadCasesError",
    "BoundedCacheDataset",
    "Case",
    "CaseFinder",
    "CaseReader",
    "Cases",
    "Found",
    "Geometry",
    "LeftOut",
    "LoadCased",
    "LoadLabeld",
    "NameByCased",
    "SaveDicomSegd",
    "Segment",
    "Split",
    "download_decathlon",
    "find_cases",
    "find_inputs",
    "load_cases",
    "load_classification_cases",
    "load_image",
    "load_segmentation_cases",
    "read_segments",
    "slice_options",
    "split_by_patient",
    "template_cases",
    "template_path",
    "with_masks",
    "write_dicom_seg",
    "write_slices",
    "writer_for",
]
