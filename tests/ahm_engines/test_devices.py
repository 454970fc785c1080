# SPDX-License-Identifier: Apache-2.0
"""The training step on torch's device ``meta``, whose tensors have shapes and no values.

Whoever mixes devices there fails, as on CUDA, and so does whoever reads a value, for which the host would wait on CUDA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ahm_engines import ErrorReward, MaskedLoss, MaskedTrainer, ProgressReward
from ahm_engines.finite import FiniteCheck
from ahm_networks import Decision, MaskedAutoencoder, Masker, ReconstructionUNet, SimMIM, UniformMasker
from ahm_networks.maskers.borrowed import BorrowedNetwork
from tests.ahm_networks.maskers.test_contract import MASKERS

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}
VIT = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def meta_as_a_device_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = torch.autocast

    def autocast_but_on_meta(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, **options)

    monkeypatch.setattr(torch, "autocast", autocast_but_on_meta)
    # what reads values on purpose: losses of the iteration before, weights once in an epoch
    monkeypatch.setattr(FiniteCheck, "finite", lambda self: True)
    monkeypatch.setattr("ahm_engines.trainer.check_weights", lambda modules: None)


def train(network: nn.Module, masker: Masker, dims: int, **options: Any) -> None:
    for module in masker.modules():
        for borrowed in (value for value in vars(module).values() if isinstance(value, BorrowedNetwork)):
            borrowed.network.to("meta")
    network.to("meta")
    masker.to("meta")
    weights = [weight for weight in masker.parameters() if weight.requires_grad]
    trainer = MaskedTrainer(
        "meta",
        2,
        [{"image": torch.rand(2, 1, *(32,) * dims)}] * 2,
        network,
        torch.optim.AdamW(network.parameters(), 1e-3),
        masker,
        masker_optimizer=torch.optim.Adam(weights, 1e-3) if weights else None,
        gradient_clip=1.0,
        **options,
    )
    trainer.run()
    assert trainer.state.iteration == 4 and trainer.state.output["mask"].is_meta


@pytest.mark.parametrize(("dims", "foreground"), [(2, None), (3, 0.3)])
@pytest.mark.parametrize("name", MASKERS)
def test_maskers(name: str, dims: int, foreground: float | None) -> None:
    masker = MASKERS[name](dims, 8, 0.5, foreground_threshold=foreground)
    train(ReconstructionUNet(dims, backbone_args=SMALL), masker, dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("loss", "reward"),
    [
        (MaskedLoss("l2"), ErrorReward(clip=2.0, energy=0.5)),
        (MaskedLoss(patch_size=8), ProgressReward()),
    ],
)
def test_losses_and_rewards(loss: MaskedLoss, reward: Callable[..., Tensor], dims: int) -> None:
    network = ReconstructionUNet(dims, backbone_args=SMALL, fill="mean")
    train(network, MASKERS["set"](dims, 8, 0.5), dims, loss_function=loss, reward=reward, channels_last=True)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["vit", "swin", "mae"])
def test_networks_of_tokens(kind: str, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network: nn.Module
    if kind == "mae":  # the one that has to know how many tokens are hidden
        monkeypatch.setattr(MaskedAutoencoder, "_count", lambda self, hides, hidden: hidden.shape[1] // 2)
        network = MaskedAutoencoder(dims, img_size=32, patch_size=8, encoder_args=VIT)
    elif kind == "vit":
        network = SimMIM(dims, img_size=32, patch_size=8, backbone="unetr", encoder_args=VIT)
    else:
        network = SimMIM(dims, img_size=32, patch_size=8, backbone="swinunetr", encoder_args={"feature_size": 12})
    train(network, MASKERS["set"](dims, 8, 0.5), dims)


class Reads(UniformMasker):
    def forward(self, image: Tensor, **options: Any) -> Decision:
        return super().forward(image, **options) if image.any() else super().forward(-image, **options)


class Strays(UniformMasker):
    def forward(self, image: Tensor, **options: Any) -> Decision:
        decision = super().forward(image, **options)
        return dataclasses.replace(decision, mask=torch.zeros(decision.mask.shape, dtype=torch.bool))


@pytest.mark.parametrize(("kind", "message"), [(Reads, "meta"), (Strays, "device")])
def test_what_reads_values_or_mixes_devices_fails_here(kind: type[Masker], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        train(ReconstructionUNet(2, backbone_args=SMALL), kind(2, 8, 0.5), 2)
