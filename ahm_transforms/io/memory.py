# SPDX-License-Identifier: Apache-2.0
"""How much memory there is for this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_memory"]

OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Where the second version of control groups, and the first, say what a group may take and what it takes.
VERSIONS = {
    "": (".", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def available_memory() -> int:
    """Return the bytes that can be taken without swapping: of the machine, or of the container or job if that has less.

    Files that the kernel keeps in memory count as free, since it gives them up.
    """
    return min([psutil.virtual_memory().available, *_left_to_groups(OWN_GROUPS, GROUPS)])


def _left_to_groups(own: Path, groups: Path) -> Iterator[int]:
    """What each control group around this process leaves; nothing where there are none (Linux alone has them)."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        folder, *names = VERSIONS.get(controllers, ("none", "", "", ""))
        inner = groups / folder / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(groups / folder):
                yield from _left_to(group, *names)


def _left_to(group: Path, most: str, taken: str, prefix: str) -> Iterator[int]:
    try:
        limit, usage = ((group / name).read_text(encoding="utf-8").strip() for name in (most, taken))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # no limit at this level, or it is none of our business
        return
    if limit != "max":
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield max(int(limit) - int(usage) + files, 0)
