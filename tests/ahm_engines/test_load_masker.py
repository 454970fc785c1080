# SPDX-License-Identifier: Apache-2.0
"""A pretrained masker is one call away from a mask transform."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ahm_engines import load_masker
from ahm_networks import ActorCriticMasker
from ahm_transforms import AdaptiveHardMaskd
from tests.bundles.running import PRETRAIN, SHELF, train, write_cases

IMAGE = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data"))


def trained(masker: str, cases: Path, folder: Path) -> Path:
    train(cases, folder, max_epochs=1, min_epoch_length=1, spatial_dims=2, masker=masker)
    return folder / "models/model.pt"


@pytest.mark.parametrize("name", SHELF)
def test_every_masker_of_the_bundle_comes_back_as_it_was_saved(name: str, cases: Path, tmp_path: Path) -> None:
    path = trained(name, cases, tmp_path)
    masker, saved = load_masker(path), torch.load(path, weights_only=True)["masker"]
    assert not masker.training and masker.share == 0.5
    assert masker.state_dict().keys() == saved.keys()
    for key, value in masker.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[key])), key
    first, again = masker(IMAGE), pickle.loads(pickle.dumps(load_masker(path)))(IMAGE)
    assert first.mask.float().mean() == pytest.approx(0.6, abs=0.05) and torch.equal(first.mask, again.mask)
    drawn = [masker.train()(IMAGE).mask for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) or not torch.equal(drawn[0], drawn[2])


def test_the_share_that_the_masker_chooses_can_be_given(cases: Path, tmp_path: Path) -> None:
    path = trained("a3c", cases, tmp_path)
    masker = load_masker(path, policy_share=1.0, bundles_dir=PRETRAIN.parent)
    assert masker.share == 1.0 and isinstance(masker.masker, ActorCriticMasker)
    with pytest.raises(ValueError, match=r"policy_share: expected a number in \[0, 1\], got 2"):
        load_masker(path, policy_share=2.0)


def test_in_a_transform_it_needs_one_line(cases: Path, tmp_path: Path) -> None:
    hide = AdaptiveHardMaskd("image", load_masker(trained("a3c", cases, tmp_path)), draw=True).set_random_state(0)
    masks = [hide({"image": IMAGE[0]})["mask"] for _ in range(3)]
    assert all(mask.shape == (1, 32, 32) for mask in masks)
    assert not torch.equal(masks[0], masks[1]) or not torch.equal(masks[0], masks[2])


def test_what_has_no_masker_is_refused(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_masker(tmp_path / "nowhere.pt")
    settings = {"task": "segmentation"}
    torch.save({"model": {}, "provenance": {"settings": settings}}, tmp_path / "finetuned.pt")
    with pytest.raises(ValueError, match=r"finetuned\.pt: a checkpoint of segmentation, expected one of pretraining"):
        load_masker(tmp_path / "finetuned.pt")
    torch.save({"model": {}, "masker": {}}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt: expected a checkpoint with a masker that .* got none; build yours"):
        load_masker(tmp_path / "own.pt")
    path = trained("a3c", cases, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no bundles in .*elsewhere"):
        load_masker(path, bundles_dir=tmp_path / "elsewhere")
