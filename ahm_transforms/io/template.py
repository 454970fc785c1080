# SPDX-License-Identifier: Apache-2.0
"""Data that need no download: blocks of the MNI152 T1 head that the nilearn wheel ships."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

from ahm_transforms.io._types import Case

_FILE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
_SHAPE = (197, 233, 189)
# The template is its own mirror image, so a split into left and right would put the same voxels on both sides.
# It is cut between bottom and top instead: the last axis, of which the brain fills 7 to 152. Both parts fit 64 slices.
_PARTS = {"training": (7, 88), "validation": (88, 152)}


def template_path() -> Path:
    """Return where the MNI152 T1 template lies (1 mm, 197 x 233 x 189, brain only, zero outside).

    Source: Fonov et al., Unbiased average age-appropriate brain templates, NeuroImage 54 (2011).

    Raises:
        ImportError: nilearn is missing, or its wheel has no template.
    """
    spec = find_spec("nilearn")  # finds the package without importing it, which takes seconds
    folders = [Path(folder) / _FILE for folder in (spec.submodule_search_locations or [] if spec else [])]
    for path in folders:
        if path.is_file():
            return path
    raise ImportError(
        'The default data are the MNI152 template of nilearn, which was not found: pip install "monai-ahm[demo]", '
        "or pass --dataset_dir with images of your own."
    )


def template_cases(*, spatial_dims: int = 3) -> tuple[list[Case], list[Case]]:
    """Return four training and four validation cases: blocks of one head that share no voxel.

    Training blocks come from the lower part, validation blocks from the upper one: quarters of 98 x 116 columns for
    3D crops, whole slices for 2D. One average head shows that the pipeline runs, nothing about other people.
    """
    path = str(template_path())
    counts = (2, 2, 1) if spatial_dims == 3 else (1, 1, 4)
    return tuple(  # type: ignore[return-value]  # exactly two parts
        [
            {"image": path, "case_id": f"mni152-{part}-{index}", "patient_id": "mni152", "block": block}
            for index, block in enumerate(_blocks(low, high, counts))
        ]
        for part, (low, high) in _PARTS.items()
    )


def _blocks(low: int, high: int, counts: tuple[int, int, int]) -> list[list[list[int]]]:
    spans = [(0, _SHAPE[0]), (0, _SHAPE[1]), (low, high)]
    edges = [
        [start + (stop - start) * part // count for part in range(count + 1)]
        for (start, stop), count in zip(spans, counts, strict=True)
    ]
    axes = [[[a, b] for a, b in pairwise(axis)] for axis in edges]
    return [list(block) for block in product(*axes)]
