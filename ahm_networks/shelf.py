# SPDX-License-Identifier: Apache-2.0
"""Take one thing from a shelf of recipes by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["from_shelf"]

T = TypeVar("T")


def from_shelf(shelf: Mapping[str, Callable[[], T]], choice: str | Callable[[], T], argument: str) -> T:
    """Build one entry; the others on the shelf are not.

    Args:
        shelf: by name, what builds it: in a bundle, entries with ``"_mode_": "callable"``.
        choice: a name, or an entry itself (``%maskers::a3c`` in a bundle).
        argument: what the choice is called, for the error.

    Raises:
        ValueError: for a name that is not on the shelf.

    Example:
        >>> from functools import partial
        >>> from ahm_networks import UniformMasker
        >>> from_shelf({"uniform": partial(UniformMasker, 2, 8)}, "uniform", "masker").patch_size
        (8, 8)
    """
    if callable(choice):
        return choice()
    if choice not in shelf:
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(shelf))}, got {choice!r}.")
    return shelf[choice]()
