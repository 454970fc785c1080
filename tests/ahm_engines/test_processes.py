# SPDX-License-Identifier: Apache-2.0
"""Two processes: what they make of their shares, and every masker on the bundle's shelf."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ahm_engines import BalancedCrossEntropy, MaskedKeys
from ahm_engines.handlers import Checkpoints, MaskOverlap, validation_sampler
from ahm_networks.maskers import Decision
from ahm_networks.maskers.box_feedback import BoxReward
from ahm_networks.processes import share_of_batch
from ahm_networks.rl.running import RunningMoments
from tests.ahm_engines.test_contract import TRAIN, build


def train_everything(rank: int, folder: str) -> None:
    """Run in one of two processes: train with each masker and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results: dict[str, Any] = {masker: train(masker, rank) for masker in TRAIN["maskers"]}
    results["parts"] = parts(share(rank), Path(folder) / f"machine{rank}")
    results["saved"] = end_training(Path(folder) / "shared")
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def train(name: str, rank: int) -> dict[str, Any]:
    """Two iterations on images of this process's own."""
    trainer = build(name, "u_net", 2, steps=2, wrap=DistributedDataParallel)
    trainer.data_loader[:] = [{"image": batch["image"].roll(rank, -1)} for batch in trainer.data_loader]
    trainer.masker.set_random_state(rank)
    masks: list[torch.Tensor] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: masks.append(e.state.output[MaskedKeys.MASK]))
    trainer.run()
    masker = trainer.masker.state_dict()
    learned = {name: state for name, state in masker.items() if not name.endswith("_extra_state")}  # random numbers
    network = {name: weight.detach() for name, weight in trainer.network.named_parameters()}
    return {"masks": masks, "masker": learned, "network": network}


class SlowlySaved:
    """Takes its time to tell its state, as a large network on a busy disk does."""

    def state_dict(self) -> dict[str, int]:
        time.sleep(1)
        return {"number": 1}


def end_training(folder: Path) -> bool:
    """Whether the checkpoint is there for a process that comes out of the training."""
    trainer = Engine(lambda engine, batch: None)
    Checkpoints(folder, {"model": SlowlySaved()}).attach(trainer)
    trainer.run([0], max_epochs=1)
    return (folder / "last.pt").is_file()


def share(rank: int | None) -> slice:
    """Rows of a process: the first has two, the second four; ``None`` has all six."""
    return {0: slice(0, 2), 1: slice(2, 6), None: slice(0, 6)}[rank]


def parts(own: slice, folder: Path) -> dict[str, Any]:
    """What comes of six rows in one process, or of its own rows in one of two."""
    values, where, pred, label = rows()
    moments, reward = RunningMoments(), BoxReward(1.0, 4)
    for _ in range(2):
        moments.update(values[own], where[own])
        reward.moments.update(values[own], where[own])
    moments.update(values[own], torch.zeros_like(where[own]))
    losses = [BalancedCrossEntropy([1.0, 5.0, 2.0])(pred[own], label[own])]
    losses.append(reward.cell_loss(pred[own], values[own], where[own]))
    gradients = [torch.autograd.grad(loss, pred, retain_graph=True)[0] for loss in losses]
    with torch.no_grad():
        known = BalancedCrossEntropy([1.0, 5.0, 2.0])(pred[own], label[own])
    return {
        "moments": [moments.mean, moments.var, moments.steps],
        "gradients": gradients,
        "without_gradient": known,
        "empty": torch.as_tensor(share_of_batch(torch.zeros(2))),
        "overlap": overlaps(where[own]),
        "resumed": refusal(folder, own),
    }


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six rows of numbers, of which some count, logits for them, and classes."""
    generator = torch.Generator().manual_seed(0)
    values, pred = torch.rand(6, 3, generator=generator) * 10, torch.rand(6, 3, generator=generator)
    where = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    return values, where, pred.requires_grad_(), torch.tensor([0, 0, 1, 1, 0, 1])


def overlaps(cells: torch.Tensor) -> dict[str, float]:
    """Metrics of two validations on the same masks."""
    engine, handler = Engine(lambda engine, batch: {MaskedKeys.DECISION: batch}), MaskOverlap()
    handler.attach(engine)
    cells = cells[:, None, None]
    decision = Decision(mask=cells, cells=cells, allowed=None, policy_map=None)
    engine.run([decision], max_epochs=2)
    return dict(engine.state.metrics)


def refusal(folder: Path, own: slice) -> str:
    """What is said where the first process alone has a state to resume from."""
    engine = Engine(lambda engine, batch: None)
    objects = {"model": nn.Linear(1, 1)}
    if own == share(0):
        folder.mkdir()
        state = {"trainer": {"epoch": 3, "iteration": 3, "epoch_length": 1}, "best": None}
        torch.save({"model": objects["model"].state_dict(), **state}, folder / "last.pt")
    Checkpoints(folder, objects, resume=True).attach(engine)
    try:
        engine.run([0], max_epochs=4)
    except RuntimeError as error:
        return str(error)
    return "resumed"


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in one process."""
    return parts(share(None), tmp_path_factory.mktemp("alone"))


def test_moments_are_those_of_all_processes(results: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    values, where, _, _ = rows()
    assert float(whole["moments"][0]) == pytest.approx(float(values[where].mean()))
    assert float(whole["moments"][1]) == pytest.approx(float(values[where].var(unbiased=False)))
    assert float(whole["moments"][2]) == 2  # nothing to take in is no step
    for result in results:
        torch.testing.assert_close(result["parts"]["moments"], whole["moments"])


def test_average_gradient_is_that_of_the_whole_batch(results: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Though the processes have two and four rows, and weights and marks of their own."""
    for one, *two in zip(whole["gradients"], *(result["parts"]["gradients"] for result in results), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(sum(two) / 2, one)


def test_without_gradient_no_process_waits_for_another(results: list[dict[str, Any]]) -> None:
    _, _, pred, label = rows()
    for rank, result in enumerate(results):
        own = share(rank)
        expected = nn.functional.cross_entropy(pred[own], label[own], torch.tensor([1.0, 5.0, 2.0]))
        torch.testing.assert_close(result["parts"]["without_gradient"], expected.detach())
        assert result["parts"]["empty"] == 0


def test_mask_overlap_takes_in_all_processes(results: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    assert whole["overlap"]["overlap_epochs"] == 1
    assert whole["overlap"]["overlap_images"] < 1
    for result in results:
        assert result["parts"]["overlap"] == pytest.approx(whole["overlap"])


def test_processes_with_another_state_do_not_resume(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "found those of epochs [3, 0]" in result["parts"]["resumed"]


def test_no_process_leaves_a_training_before_its_checkpoint_is_written(results: list[dict[str, Any]]) -> None:
    assert [result["saved"] for result in results] == [True, True]


def test_fewer_cases_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ahm_engines.handlers.processes.number_of_processes", lambda: 3)
    with pytest.raises(ValueError, match="expected at least one for each of 3 processes, got 2"):
        validation_sampler([0, 1])


def fail_on_one(rank: int, folder: str, masker: str, first: int) -> None:
    """Train on images with a number that is none, from the ``first`` step on and in the second process only."""
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meeting", timedelta(seconds=60)  # one that stops alone leaves the other waiting
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    trainer = build(masker, "u_net", 2, steps=9, wrap=DistributedDataParallel)
    Checkpoints(folder, {"model": trainer.network}).attach(trainer)
    if rank == 1:
        spoilt = trainer.data_loader[0]["image"].clone()
        spoilt[0, 0, 0, 0] = torch.nan
        trainer.data_loader[first:] = [{"image": spoilt}] * (9 - first)
    try:
        trainer.run()
    except FloatingPointError as error:
        Path(folder, f"process{rank}.txt").write_text(str(error))
        dist.barrier()  # or the end of one process would cut the other short
        if rank == 1:
            raise


@pytest.mark.parametrize(("masker", "first"), [("a3c", 0), ("uniform", 8)], ids=["from the start", "in the last step"])
def test_loss_that_is_no_number_in_one_process_ends_both(tmp_path: Path, masker: str, first: int) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as error:
        torch.multiprocessing.spawn(fail_on_one, args=(str(tmp_path), masker, first), nprocs=2)
    assert "Process 1 terminated" in str(error.value)
    assert "FloatingPointError: loss: expected finite numbers, got [nan" in str(error.value)
    other = (tmp_path / "process0.txt").read_text()
    assert "loss: expected finite numbers, got [" in other and "nan]" in other
    assert not (tmp_path / "last.pt").exists()
