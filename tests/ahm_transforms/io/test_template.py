# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahm_transforms.io import (
    LoadLabeld,
    load_cases,
    load_classification_cases,
    load_image,
    load_segmentation_cases,
    reader,
    template,
    template_cases,
    template_path,
)

needs_nilearn = pytest.mark.skipif(find_spec("nilearn") is None, reason="needs the extra demo: nilearn")


HALVES = ["anterior", "posterior"]
TISSUES = ["gray matter", "white matter"]


def slices(case: dict[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in case["block"])


def used_by(part: list[dict[str, Any]], shape: tuple[int, ...]) -> np.ndarray:
    used = np.zeros(shape, int)
    for case in part:
        used[slices(case)] += 1
    return used


@needs_nilearn
@pytest.mark.parametrize(("kind", "dims"), [("pretraining", 2), ("pretraining", 3), ("classification", 3)])
def test_parts_share_no_voxel_nor_its_mirror_image_and_hold_brain(kind: str, dims: int) -> None:
    image = load_image(template_path()).numpy()
    assert np.array_equal(image, image[::-1]), "symmetric: that is why it is not cut into left and right"
    build = partial(template.template_classification, HALVES) if kind == "classification" else template_cases
    split = build(spatial_dims=dims)
    used = [used_by(part, image.shape) for part in split]
    assert max(part.max() for part in used) == 1
    for one, other in combinations(used, 2):
        assert not (one & other).any() and not (one & other[::-1]).any()
    for case in [case for part in split for case in part]:
        assert (image[slices(case)] > 0).mean() > (0.3 if kind == "classification" else 0.05)
    if kind == "pretraining":
        assert (image[sum(used) > 0] > 0).sum() > 0.99 * (image > 0).sum()


@needs_nilearn
def test_blocks_to_classify_lie_in_the_half_they_are_called_after() -> None:
    split = template.template_classification(HALVES[::-1])
    assert len(split.training) >= 16
    to_ras = load_image(template_path()).affine.numpy()
    for part in split:
        assert {case["label"] for case in part} == {0, 1}
        for case in part:
            middle = to_ras[1, 1] * np.mean(case["block"][1]) + to_ras[1, 3]  # mm towards the front
            assert case["label"] == (HALVES[::-1].index("anterior") if middle > -18 else 0)
    assert len({tuple(np.diff(case["block"]).ravel()) for part in split for case in part}) == 1


@needs_nilearn
def test_default_data_need_no_folder_and_pretraining_leaves_the_test_blocks_alone() -> None:
    cases = load_cases(min_size=16, channels=1, test_fraction=0.2)
    assert (len(cases.training), len(cases.validation), len(cases.test)) == (4, 2, 0)
    assert all(Path(case["image"]).is_file() for case in cases.training)


@needs_nilearn
@pytest.mark.parametrize("dims", [2, 3])
def test_default_labels_are_gray_and_white_matter(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain_read = reader.NibabelReader.read
    monkeypatch.setattr(
        reader.NibabelReader, "read", lambda self, name, **k: read.append(name) or plain_read(self, name, **k)
    )
    cases = load_segmentation_cases(classes=TISSUES, spatial_dims=dims, label_fraction=0.5, channels=1)
    assert len(read) == len(set(read)) == 3, "all blocks share three files"
    assert (len(cases.training), len(cases.validation), len(cases.test)) == (2, 2, 2)
    assert all(set(cases.count_classes(part).values()) == {2} for part in ("training", "validation", "test"))
    label = LoadLabeld("label", num_classes=2)(cases.test[0])["label"].numpy()
    t1 = load_image(template_path()).numpy()
    assert t1[label == 2].mean() > t1[label == 1].mean() > t1[label == 0].mean()  # white matter is bright in T1


@needs_nilearn
def test_default_data_to_classify() -> None:
    cases = load_classification_cases(classes=HALVES)
    assert (len(cases.training), len(cases.validation), len(cases.test)) == (24, 12, 12)
    assert cases.count_classes("training") == {"anterior": 12, "posterior": 12}


@needs_nilearn
def test_default_data_have_their_own_classes() -> None:
    with pytest.raises(ValueError, match="2 classes, gray and white matter, got classes tumour"):
        load_segmentation_cases(classes=["tumour"])
    with pytest.raises(ValueError, match="have the classes anterior, posterior, got a, b"):
        load_classification_cases(classes=["a", "b"])
    with pytest.raises(ValueError, match="volumes for spatial_dims=3, got 2: pass dataset_dir"):
        load_classification_cases(classes=HALVES, spatial_dims=2)
    with pytest.raises(ValueError, match="labels_dir: pass dataset_dir or datalist too"):
        load_segmentation_cases(classes=TISSUES, labels_dir="labels")


@needs_nilearn
def test_template_is_found_without_importing_nilearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nilearn", raising=False)
    assert template_path().is_file()
    assert "nilearn" not in sys.modules


def test_missing_nilearn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "monai-ahm\[demo\]"'):
        load_cases()
