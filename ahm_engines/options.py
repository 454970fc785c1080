# SPDX-License-Identifier: Apache-2.0
"""What the options of commands say: ``--set name=value`` and names with commas."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Container, Iterable
from typing import Any

__all__ = ["did_you_mean", "entries", "names", "unknown_entries"]


def entries(texts: Iterable[str]) -> dict[str, Any]:
    """Return names and values, which are JSON or else plain text.

    Raises:
        ValueError: a text is no ``name=value``.
    """
    return dict(map(_entry, texts))


def names(text: str) -> list[str]:
    """Return names that commas separate."""
    return [name.strip() for name in text.split(",")]


def unknown_entries(given: Iterable[str], known: Container[str]) -> list[str]:
    """Return which of the ``given`` entries of a bundle, such as ``train#epoch_length``, begin with none it knows."""
    return sorted(key for key in given if re.split("#|::", key)[0] not in known)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return how to end a sentence about a name that is not known: with the one that is most like it, if any is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "."


def _entry(text: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ValueError(f"expected name=value, got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
