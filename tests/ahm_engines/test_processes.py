# SPDX-License-Identifier: Apache-2.0
"""Every masker on the bundle's shelf in two processes: other masks on each, the same weights on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch.nn.parallel import DistributedDataParallel

from ahm_engines import MaskedKeys
from tests.ahm_engines.test_contract import TRAIN, build


def train_everything(rank: int, folder: str) -> None:
    """Run in one of two processes: train with each masker and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {masker: train(masker, rank) for masker in TRAIN["maskers"]}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def train(masker: str, rank: int) -> dict[str, Any]:
    """Two iterations on images of this process's own."""
    trainer = build(masker, "u_net", 2, steps=2, wrap=DistributedDataParallel)
    trainer.data_loader[:] = [{"image": batch["image"].roll(rank, -1)} for batch in trainer.data_loader]
    trainer.masker.set_random_state(rank)
    masks: list[torch.Tensor] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: masks.append(e.state.output[MaskedKeys.MASK]))
    trainer.run()
    learned = {name: weight.detach() for name, weight in trainer.masker.named_parameters()}
    network = {name: weight.detach() for name, weight in trainer.network.named_parameters()}
    return {"masks": masks, "masker": learned, "network": network}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(train_everything, args=(folder,), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("masker", TRAIN["maskers"])
def test_weights_agree_and_masks_differ(results: list[dict[str, Any]], masker: str) -> None:
    first, second = (result[masker] for result in results)
    for part in ("network", "masker"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(weight, second[part][name]) for name, weight in first[part].items())
    assert not any(torch.equal(*masks) for masks in zip(first["masks"], second["masks"], strict=True))
