# SPDX-License-Identifier: Apache-2.0
"""The few types that the steps from files to cases hand to one another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Case = dict[str, Any]
"""``image`` (a path, or the sorted paths of one DICOM series), ``case_id``, ``patient_id`` and, rarely, ``block``.

Cases with labels have ``label``: for segmentation a path, or a list of paths with one map per class; for classification
the index of the class, with ``mask`` (a path) if masks are asked for.
"""

PARTS = ("training", "validation", "test")
NAMES_SHOWN = 5  # of the files that have one reason


class LeftOut(NamedTuple):
    """Something on disk that is not used, and why."""

    name: str
    reason: str


class LeftOutCase(LeftOut):
    """The same with a ``case_id`` for results, where ``name`` may hold a folder that is called after a patient."""

    case_id: str

    def __new__(cls, name: str, reason: str, case_id: str) -> LeftOutCase:
        item = super().__new__(cls, name, reason)
        item.case_id = case_id
        return item

    def __getnewargs__(self) -> tuple[str, str, str]:
        """Keep the id in copies and other processes."""
        return (self.name, self.reason, self.case_id)


class Geometry(NamedTuple):
    """Size and spacing of one image, axes in RAS order where the file says which they are."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]


@dataclass
class Found:
    """What a search brought: usable cases, things that are no images to train on, and damaged ones."""

    cases: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    bad: list[LeftOut] = field(default_factory=list)


class Source(NamedTuple):
    """What a folder, a datalist or the template offers.

    ``listed`` says by case id which cases the source itself keeps for ``validation`` or ``test``. Paths and names are
    relative to ``root``.
    """

    found: Found
    listed: dict[str, str]
    root: Path


def lines_by_reason(items: Sequence[LeftOut]) -> str:
    """Return one line for each item, or one for many that share their reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in items:
        names[reason].append(name)
    lines = []
    for reason, group in names.items():
        if len(group) > NAMES_SHOWN:
            group = [f"{len(group)} such as {', '.join(group[:NAMES_SHOWN])}"]
        lines += [f"\n  {name}: {reason}" for name in group]
    return "".join(lines)


class BadCasesError(ValueError):
    """Raised before training when cases cannot be used; it lists them with their reasons.

    Attributes:
        bad: all cases and reasons.
    """

    def __init__(self, bad: list[LeftOut]) -> None:
        self.bad = bad
        super().__init__(
            f"{len(bad)} case(s) cannot be used:{lines_by_reason(bad)}\n"
            "Repair or remove them, or pass --skip_bad true to leave them out."
        )

    def __reduce__(self) -> tuple[type[BadCasesError], tuple[list[LeftOut]]]:
        """Keep the list when the error crosses a process border."""
        return type(self), (self.bad,)
