# SPDX-License-Identifier: Apache-2.0
"""Compare two pieces of work fairly: interleaved in one process, with an A/A control."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

AA_RANGE = (0.95, 1.05)
"""An A/A control outside this range means that the machine was too noisy to believe the comparison."""


class Paired(NamedTuple):
    """What `paired` measured: times are medians over the rounds, ratios are medians of each round's own ratio."""

    ratio_median: float
    a_ms: float
    b_ms: float
    aa_ratio: float

    @property
    def trusted(self) -> bool:
        """Whether the A/A control lies inside `AA_RANGE`."""
        return AA_RANGE[0] <= self.aa_ratio <= AA_RANGE[1]


def paired(a: Callable[[], object], b: Callable[[], object], *, rounds: int = 20, warmup: int = 3) -> Paired:
    """Time ``a`` (the baseline), ``b`` and ``a`` again in every round.

    Args:
        a: the baseline; it takes nothing and its result is dropped.
        b: what is compared with it.
        rounds: how often the three are timed.
        warmup: how often both run untimed before.

    Returns:
        The time of ``b`` over that of ``a`` (below 1: ``b`` is faster), both in milliseconds, and the second run of
        ``a`` over the first, which reads 1 on a quiet machine.
    """
    for _ in range(warmup):
        a()
        b()
    # The order turns round by round, so that no contender always runs in the other's wake.
    orders = ((0, 1, 2), (2, 1, 0))
    work = (a, b, a)
    times: list[list[float]] = []
    for index in range(rounds):
        row = [0.0, 0.0, 0.0]
        for slot in orders[index % 2]:
            row[slot] = _milliseconds(work[slot])
        times.append(row)
    return Paired(
        ratio_median=median(2 * b_ms / (a_ms + a2_ms) for a_ms, b_ms, a2_ms in times),
        a_ms=median((a_ms + a2_ms) / 2 for a_ms, _, a2_ms in times),
        b_ms=median(b_ms for _, b_ms, _ in times),
        aa_ratio=median(a2_ms / a_ms for a_ms, _, a2_ms in times),
    )


def peak_memory_mb(run: Callable[[], object]) -> float | None:
    """Return by how many MiB the memory of this process rose while ``run`` ran, at its highest.

    On CUDA it is the allocator's peak, on Linux the resident set's; elsewhere None.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not sys.platform.startswith("linux") or not status.is_file():
        return None
    _return_free_memory()
    reset.write_text("5")  # sets the high-water mark back to what is resident now
    before_kib = _status_kib(status, "VmRSS")
    run()
    return (_status_kib(status, "VmHWM") - before_kib) / 1024


def report(rows: Mapping[str, Paired], *, labels: tuple[str, str], extra: Mapping[str, object] | None = None) -> None:
    """Print a table of comparisons and, as the last line, the same as JSON.

    Args:
        rows: what was compared, by name.
        labels: names of the contenders A and B.
        extra: further entries of the JSON line, such as peak memory.
    """
    print(f"{'':32s}{labels[0] + ' ms':>20s}{labels[1] + ' ms':>20s}{'ratio':>9s}{'A/A':>7s}")
    for name, row in rows.items():
        note = "" if row.trusted else "  noisy: discard"
        print(f"{name:32s}{row.a_ms:20.2f}{row.b_ms:20.2f}{row.ratio_median:9.3f}{row.aa_ratio:7.3f}{note}")
    print(json.dumps({"rows": {name: row._asdict() for name, row in rows.items()}, **(extra or {})}))


def _milliseconds(run: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - start) * 1000


def _return_free_memory() -> None:
    """Hand what the C library keeps for later back to the system, or else it would serve ``run`` unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_kib(status: Path, field: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return float(line.split()[1])
