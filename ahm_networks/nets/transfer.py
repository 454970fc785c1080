# SPDX-License-Identifier: Apache-2.0
"""The report of a weight transfer."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Transfer"]

SHOWN = 5
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What :func:`~ahm_networks.nets.weights.transfer_weights` did, by the network's own keys unless said otherwise.

    Attributes:
        part: ``encoder`` or ``all``.
        matched: copied as they were.
        adapted: copied after a change, and which.
        other_shape: left as initialised, with the shapes of the source and of the network.
        missing: left as initialised; the source has nothing of the name.
        unused: the source's keys that nothing asked for.
        share: of the part's numbers, how many were filled.
    """

    part: str
    matched: list[str]
    adapted: dict[str, str]
    other_shape: dict[str, tuple[Shape, Shape]]
    missing: list[str]
    unused: list[str]
    share: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain lists, dictionaries and numbers."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Tell the counts in one line."""
        counts = ", ".join(f"{len(names)} {title}" for title, names in self._rows())
        note = " (fewer than half)" if self.share < 0.5 else ""
        return f"{self.part}: {counts}; {self.share:.1%} of its numbers filled{note}"

    def table(self) -> str:
        """Lay out counts and the first names of each kind as aligned text."""
        lines = [self.summary()]
        for title, names in self._rows():
            shown = names[:SHOWN] + ([f"... {len(names) - SHOWN} more"] if len(names) > SHOWN else [])
            first, *rest = shown or [""]
            lines += [f"{title:<15} {len(names):>4}  {first}".rstrip(), *(f"{'':<22}{name}" for name in rest)]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, list[str]]]:
        return [
            ("matched", self.matched),
            ("adapted", [f"{key}: {how}" for key, how in self.adapted.items()]),
            ("of other shape", [f"{key}: {a} instead of {b}" for key, (a, b) in self.other_shape.items()]),
            ("missing", self.missing),
            ("unused", self.unused),
        ]
