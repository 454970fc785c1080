# SPDX-License-Identifier: Apache-2.0
"""Free memory, of the machine and of the control groups around the process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ahm_transforms.io import memory

GIB = 2**30


def group(folder: Path, most: str, taken: int, files: tuple[int, int] = (0, 0), *, first: bool = False) -> None:
    """Write what a control group says of itself, in the words of the first or of the second version."""
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if first else ("memory.max", "memory.current", "")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    stat = f"anon 5\n{names[2]}active_file {files[0]}\n{names[2]}inactive_file {files[1]}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that stands for /sys/fs/cgroup, on a machine with 64 GiB to take."""
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    machine = type("Memory", (), {"available": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return tmp_path / "groups"


def test_machine_without_groups(free: Path) -> None:
    assert memory.available_memory() == 64 * GIB


def test_container_is_at_the_root_of_its_own_groups(free: Path) -> None:
    (free.parent / "own").write_text("0::/\n")
    group(free, str(8 * GIB), 5 * GIB, (1 * GIB, 2 * GIB))
    assert memory.available_memory() == 6 * GIB


def test_limit_of_a_job_holds_for_its_steps(free: Path) -> None:
    (free.parent / "own").write_text("0::/slurm/job_7/step_0\n")
    group(free / "slurm/job_7", str(16 * GIB), 4 * GIB)
    group(free / "slurm/job_7/step_0", "max", 3 * GIB)
    assert memory.available_memory() == 12 * GIB


def test_first_version_of_groups(free: Path) -> None:
    (free.parent / "own").write_text("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/elsewhere\n")
    group(free / "memory", "9223372036854771712", 30 * GIB, first=True)
    group(free / "memory/slurm/job_7", str(16 * GIB), 15 * GIB, (0, 1 * GIB), first=True)
    assert memory.available_memory() == 2 * GIB


def test_overdrawn_group_leaves_nothing(free: Path) -> None:
    (free.parent / "own").write_text("0::/\n")
    group(free, str(8 * GIB), 9 * GIB)
    assert memory.available_memory() == 0


def test_here() -> None:
    assert 0 < memory.available_memory() <= psutil.virtual_memory().total
