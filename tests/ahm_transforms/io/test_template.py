# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from ahm_transforms.io import load_cases, load_image, template, template_cases, template_path

needs_nilearn = pytest.mark.skipif(find_spec("nilearn") is None, reason="needs the extra demo: nilearn")


@needs_nilearn
@pytest.mark.parametrize("dims", [2, 3])
def test_blocks_share_no_voxel_and_hold_brain(dims: int) -> None:
    image = load_image(template_path()).numpy()
    used = np.zeros(image.shape, int)
    training, validation = template_cases(spatial_dims=dims)
    for case in training + validation:
        used[tuple(slice(start, stop) for start, stop in case["block"])] += 1
        assert (image[tuple(slice(start, stop) for start, stop in case["block"])] > 0).mean() > 0.05
    assert used.max() == 1
    assert (image[used > 0] > 0).sum() > 0.99 * (image > 0).sum()


@needs_nilearn
def test_no_training_block_is_the_mirror_image_of_a_validation_block() -> None:
    image = load_image(template_path()).numpy()
    assert np.array_equal(image, image[::-1]), "the template is symmetric: that is why it is cut along the last axis"
    training, validation = template_cases()
    for one, other in product(training, validation):
        (_, stop), (start, _) = one["block"][2], other["block"][2]
        assert stop <= start


@needs_nilearn
def test_default_data_need_no_folder() -> None:
    cases = load_cases(min_size=16, channels=1)
    assert (len(cases.training), len(cases.validation)) == (4, 4)
    assert all(Path(case["image"]).is_file() for case in cases.training)


@needs_nilearn
def test_template_is_found_without_importing_nilearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nilearn", raising=False)
    assert template_path().is_file()
    assert "nilearn" not in sys.modules


def test_missing_nilearn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "monai-ahm\[demo\]"'):
        load_cases()
