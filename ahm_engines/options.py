# SPDX-License-Identifier: Apache-2.0
"""What the options of commands say: ``--set name=value`` and names with commas."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["entries", "names"]


def entries(texts: Iterable[str]) -> dict[str, Any]:
    """Return names and values, which are JSON or else plain text.

    Raises:
        ValueError: a text is no ``name=value``.
    """
    return dict(map(_entry, texts))


def names(text: str) -> list[str]:
    """Return names that commas separate."""
    return [name.strip() for name in text.split(",")]


def _entry(text: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ValueError(f"expected name=value, got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
