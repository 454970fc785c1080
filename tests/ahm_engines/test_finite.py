# SPDX-License-Identifier: Apache-2.0
"""Losses are looked at, and nothing waits for the iteration that runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import nn

from ahm_engines.finite import FiniteCheck, check_weights
from ahm_engines.handlers import FiniteLoss

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize(
    ("values", "finite"),
    [([], True), ([1.0], True), ([1.0, -2.0], True), ([math.nan], False), ([1.0, math.inf], False)],
)
def test_all_losses_have_to_be_finite(values: list[float], finite: bool) -> None:
    check = FiniteCheck()
    check.note([torch.tensor(value) for value in values])
    assert check.finite() is finite
    assert check.finite() is finite  # as often as it is asked
    assert str([float(loss) for loss in check.losses]) == str(values)


def test_only_the_last_losses_count() -> None:
    check = FiniteCheck()
    assert check.finite()
    check.note([torch.tensor(math.nan)])
    check.note([torch.tensor(1.0)])
    assert check.finite()


def test_losses_are_kept_without_their_graph() -> None:
    check = FiniteCheck()
    check.note([MetaTensor(torch.ones(1, requires_grad=True).sum() * 2)])
    assert type(check.losses[0]) is torch.Tensor and not check.losses[0].requires_grad


@pytest.mark.parametrize(("name", "value"), [("weight", math.nan), ("bias", -math.inf), ("running_var", math.nan)])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    norm = nn.BatchNorm1d(2)
    check_weights({"model": norm})
    getattr(norm, name).data[1] = value
    with pytest.raises(FloatingPointError, match=rf"^model: expected finite weights, 1 are not: 0\.{name};.* rate"):
        check_weights({"other": nn.Linear(1, 1), "model": nn.Sequential(norm)})


def test_buffers_may_be_infinite_as_those_that_hide_are() -> None:
    module = nn.Module()
    module.register_buffer("attention_mask", torch.tensor([0.0, -math.inf]))
    check_weights({"model": module})


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raise where an operation waits for CUDA; an event may."""
    torch.cuda._sleep(1)  # loads what would wait on its first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_the_next_iteration_still_runs_when_the_answer_is_there(value: float, no_waiting: None) -> None:
    check = FiniteCheck()
    loss = torch.ones((), device="cuda") * value
    for _ in range(2):  # the first time, kernels are loaded
        torch.cuda.current_stream().synchronize()
        check.note([loss])
        torch.cuda._sleep(1_000_000_000)  # stands for the next iteration
        finite = check.finite()
        running = not torch.cuda.current_stream().query()
    assert finite is math.isfinite(value)
    assert running


@pytest.mark.gpu
@needs_cuda
def test_the_handler_does_not_wait_either(no_waiting: None) -> None:
    handler, engine = FiniteLoss(), Engine(lambda engine, batch: None)
    for value in (1.0, 2.0, math.nan):
        engine.state.output = {"loss": torch.ones((), device="cuda") * value}
        handler._look(engine)
    torch.cuda.set_sync_debug_mode("default")  # the message reads the loss
    with pytest.raises(FloatingPointError, match="got nan"):
        handler._look(engine)
