# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

from ahm_transforms.io import load_cases, load_image, template, template_cases, template_path


@pytest.mark.parametrize("dims", [2, 3])
def test_blocks_share_no_voxel_and_hold_brain(dims: int) -> None:
    pytest.importorskip("nilearn")
    image = load_image(template_path()).numpy()
    used = np.zeros(image.shape, int)
    training, validation = template_cases(spatial_dims=dims)
    for case in training + validation:
        used[tuple(slice(start, stop) for start, stop in case["block"])] += 1
        assert (image[tuple(slice(start, stop) for start, stop in case["block"])] > 0).mean() > 0.05
    assert used.max() == 1
    assert (image[used > 0] > 0).sum() > 0.99 * (image > 0).sum()


def test_no_training_block_is_the_mirror_image_of_a_validation_block() -> None:
    pytest.importorskip("nilearn")
    image = load_image(template_path()).numpy()
    assert np.array_equal(image, image[::-1]), "the template is symmetric: that is why it is cut along the last axis"
    training, validation = template_cases()
    for one, other in product(training, validation):
        (_, stop), (start, _) = one["block"][2], other["block"][2]
        assert stop <= start


def test_default_data_need_no_folder() -> None:
    pytest.importorskip("nilearn")
    cases = load_cases(min_size=16, channels=1)
    assert (len(cases.training), len(cases.validation)) == (4, 4)
    assert all(Path(case["image"]).is_file() for case in cases.training)


def test_template_is_found_without_importing_nilearn() -> None:
    pytest.importorskip("nilearn")
    code = "import sys; from ahm_transforms.io import template_path; template_path(); print('nilearn' in sys.modules)"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_missing_nilearn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "monai-ahm\[demo\]"'):
        load_cases()
