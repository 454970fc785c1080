# SPDX-License-Identifier: Apache-2.0
"""A run says what it took: counted by a clock that only the test moves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn

from ahm_engines.handlers import RunCosts, costs
from ahm_engines.trainer import MaskedTrainer
from ahm_networks.maskers import UniformMasker
from ahm_networks.nets import ReconstructionUNet

KEYS = ["seconds", "steps", "step_seconds", "memory_mib", "device"]
VALIDATION = 100.0
GPU = torch.device("cuda", 1)


class Clock:
    """Shows the time that it is told has passed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Loader:
    """Batches that take a while to come."""

    def __init__(self, clock: Clock, length: int, seconds: float) -> None:
        self.clock, self.length, self.seconds = clock, length, seconds

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.clock.now += self.seconds
            yield number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(costs, "perf_counter", clock)
    return clock


def trainer(path: Path, clock: Clock, seconds: Sequence[float], *, device: torch.device | None = None) -> Engine:
    """A trainer whose steps take ``seconds`` in turn, with a validation after every epoch."""
    took = iter(seconds)

    def step(engine: Engine, batch: int) -> None:
        clock.now += next(took)

    def validate() -> None:
        clock.now += VALIDATION

    engine = Engine(step)
    engine.state.device = device or torch.device("cpu")
    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    RunCosts(path).attach(engine)
    return engine


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert list(content) == KEYS
    return content


def test_time_of_a_step_counts_loading_and_no_validation(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "new" / "costs.json"
    trainer(path, clock, [1.0, 7.0, 3.0, 7.0]).run(Loader(clock, 2, 0.5), max_epochs=2)
    content = read(path)
    assert content["step_seconds"] == 2.5  # between 1.5 and 3.5
    assert content["seconds"] == 4 * 0.5 + 18.0 + 2 * VALIDATION
    assert (content["steps"], content["device"]) == (4, "cpu")
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_one_slow_step_does_not_change_the_median(tmp_path: Path, clock: Clock) -> None:
    trainer(tmp_path / "costs.json", clock, [60.0, 1.0, 1.0, 1.0]).run(Loader(clock, 4, 0.0))
    assert read(tmp_path / "costs.json")["step_seconds"] == 1.0


def test_epochs_of_one_step_have_no_time_between_steps(tmp_path: Path, clock: Clock) -> None:
    trainer(tmp_path / "costs.json", clock, [1.0] * 3).run(Loader(clock, 1, 0.0), max_epochs=3)
    content = read(tmp_path / "costs.json")
    assert (content["steps"], content["step_seconds"]) == (3, None)


def test_resumed_run_counts_its_own_steps(tmp_path: Path, clock: Clock) -> None:
    engine = trainer(tmp_path / "costs.json", clock, [1.0] * 9)
    engine.load_state_dict({"epoch": 2, "max_epochs": 3, "epoch_length": 3})
    engine.run(Loader(clock, 3, 0.0))
    content = read(tmp_path / "costs.json")
    assert (engine.state.iteration, content["steps"], content["seconds"]) == (9, 3, 3.0 + VALIDATION)


def test_second_run_of_one_trainer_starts_from_nought(tmp_path: Path, clock: Clock) -> None:
    engine = trainer(tmp_path / "costs.json", clock, [8.0] * 3 + [1.0] * 2)
    engine.run(Loader(clock, 3, 0.0), max_epochs=1)
    clock.now += 1000.0
    engine.run(Loader(clock, 2, 0.0), max_epochs=1, epoch_length=2)
    content = read(tmp_path / "costs.json")
    assert [content[key] for key in KEYS[:3]] == [2.0 + VALIDATION, 2, 1.0]


def test_run_with_nothing_left_to_do_leaves_the_file_alone(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "costs.json"
    path.write_text("of an earlier run")
    engine = trainer(path, clock, [])
    engine.add_event_handler(Events.STARTED, lambda: engine.terminate())
    engine.run(Loader(clock, 3, 0.0))
    assert engine.state.iteration == 0 and path.read_text() == "of an earlier run"


def test_run_that_ends_early_is_counted_and_one_that_fails_is_not(tmp_path: Path, clock: Clock) -> None:
    engine = trainer(tmp_path / "costs.json", clock, [1.0] * 9)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: engine.terminate())
    engine.run(Loader(clock, 3, 0.0), max_epochs=3)
    assert read(tmp_path / "costs.json")["steps"] == 6

    failing = trainer(tmp_path / "failed.json", clock, [1.0])
    failing.add_event_handler(Events.ITERATION_COMPLETED, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.run(Loader(clock, 3, 0.0))
    assert not (tmp_path / "failed.json").exists()


def test_first_process_alone_writes(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    trainer(tmp_path / "costs.json", clock, [1.0] * 3).run(Loader(clock, 3, 0.0))
    assert not list(tmp_path.iterdir())


def test_gpu_tells_its_name_and_the_peak_of_its_tensors(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {GPU: 3 * 2**20}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", {GPU: "Some GPU"}.__getitem__)
    trainer(tmp_path / "costs.json", clock, [1.0], device=GPU).run(Loader(clock, 1, 0.0))
    content = read(tmp_path / "costs.json")
    assert (content["memory_mib"], content["device"]) == (3.0, "Some GPU")


@pytest.mark.parametrize(("status", "peak"), [("VmPeak:\t 9216 kB\nVmHWM:\t 2048 kB\n", 2.0), ("Name: a\n", None)])
def test_processor_tells_the_peak_of_the_resident_set_if_the_system_does(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, status: str, peak: float | None
) -> None:
    (tmp_path / "status").write_text(status)
    monkeypatch.setattr(costs, "STATUS", tmp_path / "status")
    trainer(tmp_path / "costs.json", clock, [1.0]).run(Loader(clock, 1, 0.0))
    assert read(tmp_path / "costs.json")["memory_mib"] == peak


def test_system_without_status_gives_no_memory(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "STATUS", tmp_path / "none")
    trainer(tmp_path / "costs.json", clock, [1.0]).run(Loader(clock, 1, 0.0))
    assert read(tmp_path / "costs.json")["memory_mib"] is None


@pytest.mark.parametrize("masked", [True, False])
def test_both_trainers_take_it(tmp_path: Path, masked: bool) -> None:
    batches = [{"image": torch.rand(2, 1, 16, 16), "label": torch.rand(2, 1, 16, 16)}] * 3
    network: nn.Module = nn.Conv2d(1, 1, 3, padding=1)
    handlers = [RunCosts(tmp_path / "costs.json")]
    if masked:
        network = ReconstructionUNet(2, backbone=network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    if masked:
        masker = UniformMasker(2, 4, 0.5)
        MaskedTrainer("cpu", 2, batches, network, optimizer, masker, train_handlers=handlers).run()
    else:
        SupervisedTrainer("cpu", 2, batches, network, optimizer, nn.MSELoss(), train_handlers=handlers).run()
    content = read(tmp_path / "costs.json")
    assert content["steps"] == 6 and 0 < content["step_seconds"] < content["seconds"]
    if sys.platform.startswith("linux"):
        assert 50 < content["memory_mib"] < 2**20


def test_folder_that_cannot_be_written_to_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunCosts(tmp_path / "file" / "costs.json")
