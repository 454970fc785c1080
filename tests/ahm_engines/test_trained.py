# SPDX-License-Identifier: Apache-2.0
"""A network is handed to programs that load weights themselves only if the weights fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ahm_engines import fitting_network, trained_settings


def test_weights_that_fit_are_looked_at_and_not_loaded(tmp_path: Path) -> None:
    network = nn.Conv2d(1, 2, 3)
    before = network.weight.detach().clone()
    torch.save({"model": nn.Conv2d(1, 2, 3).state_dict()}, tmp_path / "model.pt")
    assert fitting_network(network, tmp_path / "model.pt") is network
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("other", [nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)])
def test_weights_of_another_architecture(other: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": other.state_dict()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: 'model' was saved from another architecture"):
        fitting_network(nn.Conv2d(1, 2, 3), tmp_path / "model.pt")


def test_without_a_file_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    network = nn.Conv2d(1, 2, 3)
    assert fitting_network(network, None) is network
    assert fitting_network(network, tmp_path / "nowhere.pt") is network


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_stay_on_the_disk_while_a_checkpoint_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    content = {"model": nn.Conv2d(1, 2, 3).state_dict(), "provenance": {"settings": {"crop_size": 16}}}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    mapped, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: [mapped.append(options["mmap"]), load(*args, **options)][1]
    )
    assert trained_settings(tmp_path / "model.pt") == {"crop_size": 16}
    fitting_network(nn.Conv2d(1, 2, 3), tmp_path / "model.pt")
    assert mapped == [zipped, zipped]
