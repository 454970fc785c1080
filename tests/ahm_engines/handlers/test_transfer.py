# SPDX-License-Identifier: Apache-2.0
"""Training starts from pretrained weights unless it is resumed, and encoders thaw when they should."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from ahm_engines.handlers import Checkpoints, FrozenEncoder, PretrainedWeights, save_checkpoint
from ahm_networks import ReconstructionUNet
from ahm_networks.nets import backbone_network, encoder_stages

SMALL: dict[str, Any] = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "norm": "batch"}


def network_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backbone_network("unet", 2, 1, 3, **SMALL)


def pretrained(folder: Path) -> Path:
    torch.manual_seed(9)
    network = ReconstructionUNet(2, backbone_args=SMALL)
    return save_checkpoint(folder / "pretrained.pt", {"model": network})


def encoder_of(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for stage in encoder_stages(network) for module in stage for p in module.parameters()]


def trainer_with(network: nn.Module, handlers: list[Any], epochs: int = 1) -> SupervisedTrainer:
    batches = [{"image": torch.rand(2, 1, 8, 8), "label": torch.rand(2, 3, 8, 8)}] * 2
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    return SupervisedTrainer(
        "cpu", epochs, batches, network, optimizer, nn.MSELoss(), train_handlers=handlers, decollate=False
    )


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_starts_from_the_pretrained_encoder_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, network = pretrained(tmp_path), network_of()
    handler = PretrainedWeights(path, network)
    seen: list[list[Tensor]] = []
    trainer = trainer_with(network, [handler])
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(encoder_of(network)))
    with caplog.at_level(logging.INFO):
        trainer.run()
    source = ReconstructionUNet(2, backbone_args=SMALL)
    source.load_state_dict(torch.load(path, weights_only=True)["model"])
    assert same(seen[0], encoder_of(source))
    assert handler.transfer is not None and handler.transfer.matched
    assert handler.transfer.table() in caplog.text and str(path) in caplog.text


def test_all_parts_can_be_asked_for(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "whole.pt", {"model": network_of(3)})
    network = network_of()
    PretrainedWeights(path, network, part="all")()
    assert same(list(network.parameters()), list(network_of(3).parameters()))


def test_a_mask_channel_of_the_pretraining_is_dropped(tmp_path: Path) -> None:
    source = backbone_network("unet", 2, 2, 1, **SMALL)
    network = network_of()
    PretrainedWeights(save_checkpoint(tmp_path / "masked.pt", {"model": source}), network, image_channels=1)()
    assert torch.equal(encoder_of(network)[0], encoder_of(source)[0][:, :1])


def test_the_checkpoint_itself_says_how_many_channels_are_the_images(tmp_path: Path) -> None:
    source = backbone_network("unet", 2, 2, 1, **SMALL)
    for channels, expected in ((1, encoder_of(source)[0][:, :1]), (2, encoder_of(source)[0].mean(1, keepdim=True) * 2)):
        facts = {"provenance": {"settings": {"in_channels": channels}}}
        network = network_of()
        PretrainedWeights(save_checkpoint(tmp_path / "masked.pt", {"model": source}, **facts), network)()
        assert torch.allclose(encoder_of(network)[0], expected)


def test_without_a_path_training_starts_from_scratch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = network_of()
    handler = PretrainedWeights(None, network)
    with caplog.at_level(logging.INFO):
        handler()
    assert same(encoder_of(network), encoder_of(network_of()))
    assert handler.transfer is None and "from scratch" in caplog.text


def test_a_resumed_training_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    path = pretrained(tmp_path)

    def run(epochs: int, *, resume: bool) -> list[list[Tensor]]:
        """The encoder at the start of each epoch, and at the end."""
        network = network_of()
        checkpoints = Checkpoints(tmp_path / "models", {"model": network}, resume=resume)
        trainer = trainer_with(network, [checkpoints, PretrainedWeights(path, network)], epochs)
        seen: list[list[Tensor]] = []
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(encoder_of(network)))
        trainer.run()
        return [*seen, encoder_of(network)]

    first = run(1, resume=False)
    assert not same(first[0], first[-1])
    path.unlink()
    assert same(run(2, resume=True)[0], first[-1])


def test_a_trainer_that_runs_again_keeps_what_it_has(tmp_path: Path) -> None:
    """As in the rounds of federated learning, whose global weights must not be overwritten."""
    path, network = pretrained(tmp_path), network_of()
    trainer = trainer_with(network, [PretrainedWeights(path, network)], 1)
    trainer.run()
    sent = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    network.load_state_dict(sent)
    seen: list[list[Tensor]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(encoder_of(network)))
    trainer.state.max_epochs = 2
    trainer.run()
    assert len(seen) == 1 and all(torch.equal(weight, torch.ones_like(weight)) for weight in seen[0])


def test_weights_of_which_nothing_fits_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "other.pt", {"model": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="nothing fits"):
        trainer_with(network_of(), [PretrainedWeights(path, network_of())]).run()


def frozen_epochs(epochs: int | None, total: int = 4, start: int = 0) -> list[int]:
    """Epochs in which the encoder did not change while the rest did."""
    network = network_of()
    trainer = trainer_with(network, [FrozenEncoder(network, epochs)], total)
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", start))
    states: list[dict[str, Tensor]] = []

    def remember(engine: Engine) -> None:
        states.append({name: value.clone() for name, value in network.state_dict().items()})

    trainer.add_event_handler(Events.STARTED, remember)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, remember)
    trainer.run()
    names = [n for n in states[0] if "model.0" in n or "submodule" in n]  # weights, and statistics of batch norms
    others = [n for n in states[0] if n not in names]
    frozen = []
    for epoch, (a, b) in enumerate(pairwise(states), start + 1):
        assert not all(torch.equal(a[n], b[n]) for n in others)
        if all(torch.equal(a[n], b[n]) for n in names):
            frozen.append(epoch)
    return frozen


@pytest.mark.parametrize(
    ("epochs", "expected"), [(None, []), (0, []), (1, [1]), (2, [1, 2]), (-1, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_encoder_is_frozen_for_so_many_epochs(epochs: int | None, expected: list[int]) -> None:
    assert frozen_epochs(epochs) == expected


@pytest.mark.parametrize(("start", "expected"), [(1, [2]), (2, []), (3, [])])
def test_a_resumed_training_freezes_what_an_unbroken_one_does(start: int, expected: list[int]) -> None:
    assert frozen_epochs(2, start=start) == expected


def test_other_negative_numbers_of_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epochs: expected -1 \(for good\), 0 or more, got -2"):
        FrozenEncoder(network_of(), -2)
