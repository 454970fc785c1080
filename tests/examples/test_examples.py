# SPDX-License-Identifier: Apache-2.0
"""The examples as users start them, each in a process of its own: what they print must mean something."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ahm_transforms import RandPatchMask
from tests.bundles.running import ROOT, finish, start, train
from tests.fixtures_data import write_nifti

EXAMPLES = ROOT / "examples"
TORCHIO = "the second part of this example needs TorchIO: pip install torchio"


def run(name: str, *words: object) -> str:
    return finish(start([sys.executable, str(EXAMPLES / name), *map(str, words)]), timeout=600)


def accuracies(text: str) -> list[tuple[str, float, float]]:
    """Masks in training, accuracy on whole images, and on images of which half is hidden."""
    found = re.findall(r"trained with (.+?) +accuracy ([\d.]+), with half of the image hidden ([\d.]+)", text)
    return [(masks, float(whole), float(hidden)) for masks, whole, hidden in found]


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def write_pictures(folder: Path, *, colour: bool) -> Path:
    """Write pictures of two classes, not of the network's shape, and a hidden file that is none."""
    random = np.random.default_rng(0)
    for name, low in (("bright", 100), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        (folder / name / ".hidden").write_text("no picture")
        for index in range(8):
            values = random.integers(low, low + 100, (40, 52, 3)[: 2 + colour], dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{name}{index}.png")
    return folder


def test_a_classifier_trained_with_masks_loses_less_when_half_of_the_image_is_hidden() -> None:
    text = run("monai_classification.py")
    assert "150 training, 50 test images of large, small" in text
    without, patches = accuracies(text)
    assert (without[0], patches[0]) == ("no masks", "patches")
    assert min(without[1], patches[1]) > 0.8  # both have learned the task
    assert patches[2] > without[2] + 0.05


def test_boxes_hidden_in_pictures_of_ones_own(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path, colour=True)
    text = run("monai_classification.py", "--dataset_dir", pictures, "--masks", "boxes", "--epochs", 1)
    assert "12 training, 4 test images of bright, dark" in text
    assert [masks for masks, _, _ in accuracies(text)] == ["no masks", "boxes"]


def test_learned_masks_come_from_a_checkpoint_of_the_bundle(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", colour=False)
    train(pictures, tmp_path, modality="image2d", spatial_dims=2, max_epochs=1)
    options = ("--dataset_dir", pictures, "--epochs", 1, "--masks", "learned", "--checkpoint")
    text = run("monai_classification.py", *options, tmp_path / "models/model.pt")
    assert [masks for masks, _, _ in accuracies(text)] == ["no masks", "learned"]
    with pytest.raises(AssertionError, match=r"ended with 2.*(?s:.*)got .*nowhere\.pt"):
        run("monai_classification.py", *options, tmp_path / "nowhere.pt")


def test_a_masker_in_a_loop_of_ones_own_finds_planted_noise() -> None:
    text = run("own_training_loop.py", "--steps", 300)
    found, entropy = numbers(r"noise hidden ([\d.]+) times chance", text), numbers(r"entropy ([\d.]+)", text)
    assert len(found) == len(entropy) == 3
    assert numbers(r"noise is hidden ([\d.]+) times as often as by chance", text) == found[-1:]
    assert found[-1] > 1.5
    assert 0.6 < entropy[-1] < 0.97 < entropy[0]  # learned, and has not collapsed


def test_the_same_masker_does_not_find_it_when_frozen() -> None:
    text = run("own_training_loop.py", "--steps", 300, "--frozen")
    assert numbers(r"noise is hidden ([\d.]+) times", text) == [pytest.approx(1.0, abs=0.3)]


def test_the_loop_takes_volumes_and_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, colour=True) / "dark"
    write_nifti(folder / "scan.nii.gz")
    text = run("own_training_loop.py", "--steps", 2, "--dataset_dir", folder)
    assert "In 2 held-out images" in text


def check_rows(text: str, shape: tuple[int, ...]) -> list[tuple[float, float]]:
    """Return the shares of body and air that each transform hides."""
    rows = re.findall(r"float32 (\(.+?\)): ([\d.]+) of the body, ([\d.]+) of the air hidden; rest kept", text)
    assert [row[0] for row in rows] == [str(shape)] * 3
    shares = [(float(body), float(air)) for _, body, air in rows]
    assert shares[0][0] == pytest.approx(0.6, abs=0.03)  # of the cells; those at the border have fewer voxels
    assert 0.02 < shares[1][0] < 0.5 and 0.4 < shares[2][0] < 0.7
    return shares


def test_arrays_of_ones_own_come_back_with_the_share_hidden_that_was_asked_for(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", (24, 30, 22))
    check_rows(run("numpy_and_torchio.py", "--dataset_dir", tmp_path), (24, 30, 22))


def test_without_torchio_the_example_shows_the_rest_and_says_so() -> None:
    path = str(EXAMPLES / "numpy_and_torchio.py")
    code = f"import sys, runpy; sys.modules['torchio'] = None; runpy.run_path({path!r}, run_name='__main__')"
    text = finish(start([sys.executable, "-c", code]), timeout=600)
    patches, _, function = check_rows(text, (40, 48, 44))
    assert 0 < patches[1] < 0.2 and function[1] == 0  # air is hidden only in cells that hold some of the body
    assert "pip install torchio" in text


def test_the_mask_follows_a_flip_of_torchio() -> None:
    pytest.importorskip("torchio", reason=TORCHIO)
    text = run("numpy_and_torchio.py")
    assert numbers(r"([\d.]+) of the volume hidden", text) == [pytest.approx(0.6, abs=0.03)]
    assert "mask overlaps by 1.00" in text


def test_a_subject_of_torchio_is_masked_alike_in_all_images_and_anew_each_time() -> None:
    tio: Any = pytest.importorskip("torchio", reason=TORCHIO)
    step = runpy.run_path(str(EXAMPLES / "numpy_and_torchio.py"))["HideInSubject"](RandPatchMask(4, 0.5, fill=-1.0))
    volume = torch.rand(1, 16, 16, 16)
    subject = tio.Subject(
        t1=tio.ScalarImage(tensor=volume),
        t2=tio.ScalarImage(tensor=1 - volume),
        truth=tio.LabelMap(tensor=volume > 0.5),
    )
    torch.manual_seed(0)
    first, second = step(subject), step(subject)
    torch.manual_seed(0)
    assert torch.equal(step(subject).t1.data, first.t1.data)
    assert torch.equal(first.t1.data == -1, first.t2.data == -1)
    assert torch.equal(first.t1.data == -1, first.mask.data.bool())
    assert not torch.equal(first.mask.data, second.mask.data)
    assert torch.equal(first.truth.data, subject.truth.data) and torch.equal(subject.t1.data, volume)
    assert type(first.t1.data) is torch.Tensor
