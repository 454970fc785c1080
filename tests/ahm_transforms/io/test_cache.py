# SPDX-License-Identifier: Apache-2.0
"""A cache that stops before memory is full."""

from __future__ import annotations

import logging
import pickle
import signal
from collections.abc import Iterator
from threading import Event, Thread, current_thread
from time import sleep
from typing import Any

import pytest
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import Compose, RandSpatialCropd, ScaleIntensityRanged, Transform
from monai.utils import set_determinism

from ahm_transforms.io import BoundedCacheDataset, cache

CASES = [{"image": torch.full((1, 8, 8), float(number)) + torch.arange(8.0)} for number in range(10)]


def chain() -> Compose:
    """A transform that the cache keeps, and a random one."""
    return Compose([ScaleIntensityRanged("image", 0, 100, 0, 1), RandSpatialCropd("image", (4, 4), random_size=False)])


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A hundred bytes, of which each cached case takes ten."""
    left = [100]
    load = CacheDataset._load_cache_item

    def taking(self: Any, idx: int) -> Any:
        left[0] -= 10
        return load(self, idx)

    monkeypatch.setattr(CacheDataset, "_load_cache_item", taking)
    monkeypatch.setattr(cache, "available_memory", lambda: left[0])
    monkeypatch.setattr(cache, "SECONDS", 0.0)
    return left


def drawn(dataset: Dataset) -> Iterator[torch.Tensor]:
    set_determinism(3)
    dataset.transform.set_random_state(3)
    for item in dataset:
        yield item["image"].as_tensor()


@pytest.mark.parametrize(("keep_free", "cached"), [(0.0, 10), (0.5, 6), (0.95, 1), (1.0, 1)])
def test_caches_until_as_much_is_left_as_was_asked_for(memory: list[int], keep_free: float, cached: int) -> None:
    dataset = BoundedCacheDataset(CASES, chain(), keep_free=keep_free, progress=False)
    assert (len(dataset), dataset.cache_num, memory) == (10, cached, [100 - 10 * cached])


def test_share_of_what_is_free_when_it_begins(memory: list[int]) -> None:
    """The second cache, of validation, takes no more than half of what the first has left."""
    first, second = (BoundedCacheDataset(CASES, chain(), progress=False) for _ in range(2))
    assert (first.cache_num, second.cache_num, memory) == (6, 3, [10])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_cases_are_the_same_whether_they_are_cached_or_not(memory: list[int], num_workers: int) -> None:
    options = {"num_workers": num_workers, "progress": False, "copy_cache": False}
    some = BoundedCacheDataset(CASES, chain(), **options)
    assert 0 < some.cache_num < 10
    for one, other in zip(drawn(some), drawn(Dataset(CASES, chain())), strict=True):
        assert torch.equal(one, other)


def test_a_reader_that_is_late_does_not_cost_what_the_others_have_read(memory: list[int]) -> None:
    full = Event()

    class Late(BoundedCacheDataset):
        def _load_cache_item(self, idx: int) -> Any:
            assert idx > 0 or full.wait(60)
            item = super()._load_cache_item(idx)
            if item is None:
                full.set()
            return item

    assert Late(CASES, chain(), num_workers=3, progress=False).cache_num >= 6


def test_says_how_many_fitted_and_what_to_do(memory: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        BoundedCacheDataset(CASES, chain(), progress=False)
    assert "memory holds 6 of 10 case(s)" in caplog.text and "--num_workers" in caplog.text


def test_says_nothing_where_all_that_was_asked_for_fits(memory: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = BoundedCacheDataset(CASES, chain(), cache_rate=0.3, progress=False)
    assert (dataset.cache_num, caplog.text) == (3, "")


@pytest.mark.parametrize("given", [{"cache_rate": 1.5}, {"keep_free": -0.1}])
def test_share_that_is_none(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(given))}: expected a share in \[0, 1\]"):
        BoundedCacheDataset(CASES, chain(), **given)


def test_can_be_sent_to_the_processes_of_a_loader() -> None:
    dataset = BoundedCacheDataset(CASES, ScaleIntensityRanged("image", 0, 100, 0, 1), num_workers=2, progress=False)
    received = pickle.loads(pickle.dumps(dataset))
    assert received.cache_num == 10
    assert torch.equal(received[3]["image"], dataset[3]["image"])


def test_an_error_is_raised_once_no_thread_is_at_work_any_more() -> None:
    begun, ended = [], []

    class Slow(Transform):
        def __call__(self, case: dict[str, int]) -> dict[str, int]:
            begun.append(case["number"])
            if case["number"] == 1:
                raise ValueError("damaged")
            sleep(0.2)
            ended.append(case["number"])
            return case

    with pytest.raises(RuntimeError, match="applying transform") as caught:
        BoundedCacheDataset([{"number": number} for number in range(50)], Slow(), num_workers=3, progress=False)
    assert str(caught.value.__cause__) == "damaged"
    assert len(begun) < 10 and sorted(ended) == sorted(set(begun) - {1})


def test_an_interrupt_waits_for_what_is_being_read_and_reads_no_more() -> None:
    """Threads that read on while the process ends would abort it."""
    readers: list[Thread] = []

    class Interrupting(Transform):
        def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
            readers.append(current_thread())
            if len(readers) == 1:
                signal.raise_signal(signal.SIGINT)
            sleep(0.5)
            return data

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            BoundedCacheDataset(CASES, Interrupting(), num_workers=2, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 <= len(readers) <= 4
    assert not any(reader.is_alive() for reader in readers)
