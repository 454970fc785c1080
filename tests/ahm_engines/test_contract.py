# SPDX-License-Identifier: Apache-2.0
"""Every masker on the bundle's shelf trains with every kind of network, in 2D and 3D, in both precisions.

The shelves are read from the bundle, so that a new entry is checked without a new line here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch import Tensor, nn

from ahm_engines import MaskedEvaluator, MaskedKeys, MaskedTrainer
from tests.bundles.running import PRETRAIN

TRAIN = ConfigParser.load_config_file(PRETRAIN / "configs" / "train.json")
SIDE = {2: 32, 3: 24}
PATCH = 8
VIT = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2, "num_layers": 2}
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "u_net": {"backbone_args": {"channels": (4, 8), "strides": (2,), "num_res_units": 0}},
    "mae": {
        "architecture": "mae",
        "backbone_args": VIT,
        "decoder_args": {"decoder_hidden_size": 8, "decoder_num_heads": 2},
    },
    "simmim": {"architecture": "simmim", "backbone_args": VIT},
    "simmim_swin": {"architecture": "simmim", "backbone": "swinunetr", "backbone_args": SWIN},
}
PAIRS = [  # SimMIM takes any mask, as a U-Net does: two maskers tell
    (masker, network)
    for network in NETWORKS
    for masker in TRAIN["maskers"]
    if network in ("u_net", "mae") or masker in ("uniform", "a3c")
]

every_pair = pytest.mark.parametrize(("masker", "network"), PAIRS)
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


@cache
def shared_parser() -> ConfigParser:
    """One for all tests: it looks through all of MONAI when it is first used."""
    return ConfigParser()


def build(
    masker: str,
    network: str,
    dims: int,
    *,
    amp: bool = False,
    steps: int = 3,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> MaskedTrainer:
    """Return a trainer for ``steps`` iterations, made of the bundle's own network, masker and optimisers."""
    side = 32 if network == "simmim_swin" else SIDE[dims]
    parser = shared_parser()
    parser.set(copy.deepcopy(TRAIN))
    parser.update(
        {
            "spatial_dims": dims,
            "device": torch.device("cpu"),
            "masker": masker,
            "crop_size": side,
            "patch_size": PATCH,
            "q_patch_size": PATCH,
            "policy_share": [0.6, 0.6],
            "warm_up": 0.0,
            "seed": 0,
            **NETWORKS[network],
        }
    )
    torch.manual_seed(0)
    image = torch.rand(2, 1, *[side] * dims, generator=torch.Generator().manual_seed(1))
    parser.parse(reset=True)
    parts = ("network", "curriculum", "loss", "masker_optimizer")
    content = {name: parser.get_parsed_content(name) for name in parts}
    return MaskedTrainer(
        "cpu",
        1,
        [{"image": image}] * steps,
        wrap(content["network"]),
        torch.optim.AdamW(content["network"].parameters(), 1e-3),
        content["curriculum"],
        masker_optimizer=content["masker_optimizer"],
        loss_function=content["loss"],
        amp=amp,
        amp_kwargs={"dtype": torch.bfloat16},
    )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}


def learning(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


@two_and_three_d
@every_pair
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_a_few_iterations(masker: str, network: str, dims: int, amp: bool) -> None:
    trainer = build(masker, network, dims, amp=amp)
    masks: list[Tensor] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: masks.append(e.state.output[MaskedKeys.MASK]))
    before = weights_of(trainer.network)
    trainer.run()

    output = trainer.state.output
    image, mask, pred = (output[key] for key in (MaskedKeys.IMAGE, MaskedKeys.MASK, MaskedKeys.PRED))
    assert mask.shape == (2, 1, *image.shape[2:]) and mask.dtype == torch.bool and mask.device == image.device
    assert pred.shape == image.shape and pred.device == image.device
    assert pred.dtype == (torch.bfloat16 if amp and network != "mae" else torch.float32)
    assert torch.isfinite(pred).all() and torch.isfinite(output[MaskedKeys.LOSS])
    assert output[MaskedKeys.LOSS].dtype == torch.float32
    assert moved(trainer.network, before)
    if learning(trainer.masker):
        assert output[MaskedKeys.MASKER_LOSS].dtype == torch.float32
    else:
        assert output[MaskedKeys.MASKER_LOSS] is None

    again: list[Tensor] = []
    trainer = build(masker, network, dims, amp=amp)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: again.append(e.state.output[MaskedKeys.MASK]))
    trainer.run()
    assert all(torch.equal(first, second) for first, second in zip(masks, again, strict=True))
    assert not torch.equal(masks[0], masks[1])


@two_and_three_d
@every_pair
def test_evaluation(masker: str, network: str, dims: int) -> None:
    trainer = build(masker, network, dims, steps=1)
    evaluator = MaskedEvaluator("cpu", trainer.data_loader, trainer.network, trainer.masker)
    counts: list[Tensor] = []
    masks = (MaskedKeys.MASK, MaskedKeys.RANDOM_MASK)
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: counts.extend(e.state.output[key].flatten(1).sum(1) for key in masks),
    )
    evaluator.run()
    assert all(math.isfinite(value) for value in evaluator.state.metrics.values())
    assert "hardness" in evaluator.state.metrics
    assert torch.equal(*counts)  # as much is hidden by the masker as at random, or the comparison would not be fair


@two_and_three_d
@every_pair
def test_each_loss_moves_its_own_weights_only(masker: str, network: str, dims: int) -> None:
    trainer = build(masker, network, dims, steps=1)
    image = torch.rand(2, 1, *trainer.data_loader[0]["image"].shape[2:])
    trainer.network.train()
    decision = trainer.masker.train()(image)
    pred = trainer.network(image, decision.mask)
    error = trainer.loss_function.error(pred, image)
    error[decision.mask].mean().backward()
    assert all(weight.grad is not None for weight in learning(trainer.network).values())
    assert all(weight.grad is None for weight in trainer.masker.parameters())

    trainer.network.zero_grad(set_to_none=True)
    loss = trainer.masker.loss([(decision, error.detach())] * trainer.masker.num_samples)
    assert (loss is None) == (not learning(trainer.masker))
    if loss is not None:
        loss.backward()
    assert all(weight.grad is not None for weight in learning(trainer.masker).values())
    assert all(weight.grad is None for weight in trainer.network.parameters())
