# SPDX-License-Identifier: Apache-2.0
"""A bar for what may take minutes, where there are thousands of scans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

__all__ = ["with_bar"]

Item = TypeVar("Item")
SILENT_S = 5.0  # what is done within these seconds needs no bar


def with_bar(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Hand ``items`` on; after some seconds, a bar says on stderr how many of the ``total`` are done."""
    bar: Iterable[Item] = tqdm(items, desc=what, total=total, delay=SILENT_S)
    return bar
