# SPDX-License-Identifier: Apache-2.0
"""Data that need no download: blocks of the MNI152 head that the nilearn wheel ships."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

from ahm_transforms.io._types import Case
from ahm_transforms.io.split import Split

_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_Span = tuple[int, int]
# The template is its own mirror image, so a split into left and right would put the same voxels on both sides. It is
# cut between bottom and top instead: the last axis, of which the brain fills 7 to 152. Both parts fit 64 slices.
_X, _Y = (0, 197), (0, 233)
_LOWER, _UPPER = (7, 88), (88, 152)
_TISSUES = ("gm", "wm")

# The blocks to classify lie well inside the brain, on both sides of its middle from back to front.
_HALVES = ("anterior", "posterior")
_MIDDLE = 116
_COLUMNS, _ROWS = (44, 152), (_MIDDLE - 72, _MIDDLE + 72)
_SLABS = {"training": [(40, 64), (64, 88)], "validation": [(88, 112)], "test": [(112, 136)]}


def template_path(kind: str = "t1") -> Path:
    """Return where the MNI152 template lies (1 mm, 197 x 233 x 189, brain only, zero outside).

    Source: Fonov et al., Unbiased average age-appropriate brain templates, NeuroImage 54 (2011).

    Args:
        kind: ``t1``, or ``gm`` and ``wm``, the probabilities of gray and white matter times 255.

    Raises:
        ImportError: nilearn is missing, or its wheel has no template.
    """
    spec = find_spec("nilearn")  # finds the package without importing it, which takes seconds
    file = _FILE.format(kind)
    for path in [Path(folder) / file for folder in (spec.submodule_search_locations or [] if spec else [])]:
        if path.is_file():
            return path
    raise ImportError(
        'The default data are the MNI152 template of nilearn, which was not found: pip install "monai-ahm[demo]", '
        "or pass --dataset_dir with images of your own."
    )


def template_cases(*, spatial_dims: int = 3) -> Split:
    """Return four training, two validation and two test cases: blocks of one head that share no voxel.

    Training blocks come from the lower part of the head, the others from the upper one; none is the mirror image of a
    block of another part. For 3D crops they are quarters of 98 x 116 columns, for 2D whole slices. One average head
    shows that the pipeline runs, nothing about other people.
    """
    if spatial_dims == 3:
        columns, back, front = _cut(_X, 2), _cut(_Y, 2)[:1], _cut(_Y, 2)[1:]
        training = product(columns, back + front, [_LOWER])
        validation, test = product(columns, front, [_UPPER]), product(columns, back, [_UPPER])
    else:
        slabs = _cut(_UPPER, 4)
        training = product([_X], [_Y], _cut(_LOWER, 4))
        validation, test = product([_X], [_Y], slabs[:2]), product([_X], [_Y], slabs[2:])
    return Split(_cases("training", training), _cases("validation", validation), _cases("test", test))


def template_segmentation(classes: Sequence[str], *, spatial_dims: int = 3) -> Split:
    """Return the same blocks with the maps of gray and white matter as labels.

    Raises:
        ValueError: there are not two classes.
    """
    if len(classes) != len(_TISSUES):
        raise ValueError(f"the default data have 2 classes, gray and white matter, got classes {', '.join(classes)}.")
    label = [str(template_path(tissue)) for tissue in _TISSUES]
    split = template_cases(spatial_dims=spatial_dims)
    return Split(*([{**case, "label": label} for case in part] for part in split))


def template_classification(classes: Sequence[str], *, spatial_dims: int = 3) -> Split:
    """Return small blocks, 36 x 36 x 24 voxels, to be told apart by whether they lie in the front or the back half.

    There are 24 training blocks, from the lower part of the head, and 12 each for validation and test, from two slabs
    of the upper part.

    Raises:
        ValueError: the classes are others, or the network takes pictures.
    """
    if spatial_dims != 3:
        raise ValueError(f"the default data are volumes for spatial_dims=3, got {spatial_dims}: pass dataset_dir.")
    if sorted(classes) != sorted(_HALVES):
        raise ValueError(f"the default data have the classes {', '.join(_HALVES)}, got {', '.join(classes)}.")
    split = Split(*(_cases(part, product(_cut(_COLUMNS, 3), _cut(_ROWS, 4), slabs)) for part, slabs in _SLABS.items()))
    return Split(*([{**case, "label": classes.index(_half(case))} for case in part] for part in split))


def _half(case: Case) -> str:
    return "anterior" if case["block"][1][0] >= _MIDDLE else "posterior"


def _cut(span: _Span, count: int) -> list[_Span]:
    start, stop = span
    return list(pairwise(start + (stop - start) * part // count for part in range(count + 1)))


def _cases(part: str, blocks: product[tuple[_Span, _Span, _Span]]) -> list[Case]:
    path = str(template_path())
    return [
        {
            "image": path,
            "case_id": f"mni152-{part}-{index}",
            "patient_id": "mni152",
            "block": [list(span) for span in block],
        }
        for index, block in enumerate(blocks)
    ]
