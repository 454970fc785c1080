# SPDX-License-Identifier: Apache-2.0
"""Take a masker from a shelf of recipes by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ahm_networks.maskers.base import Masker

__all__ = ["masker_from_shelf"]


def masker_from_shelf(shelf: Mapping[str, Callable[[], Masker]], choice: str | Callable[[], Masker]) -> Masker:
    """Build one masker; the others on the shelf are not.

    Args:
        shelf: by name, what builds a masker: in a bundle, entries with ``"_mode_": "callable"``.
        choice: a name, or an entry itself (``%maskers::a3c`` in a bundle).

    Raises:
        ValueError: for a name that is not on the shelf.

    Example:
        >>> from functools import partial
        >>> from ahm_networks import UniformMasker
        >>> masker_from_shelf({"uniform": partial(UniformMasker, 2, 8)}, "uniform").patch_size
        (8, 8)
    """
    if callable(choice):
        return choice()
    if choice not in shelf:
        raise ValueError(f"masker: expected one of {', '.join(sorted(shelf))}, got {choice!r}.")
    return shelf[choice]()
