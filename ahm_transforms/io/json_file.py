# SPDX-License-Identifier: Apache-2.0
"""Read a JSON file, or say which one cannot be read and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(path: Path, name: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: of the file.
        name: what messages call it, such as the option that named it.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name} {path} does not exist.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows writes a byte order mark
    except ValueError as error:
        raise ValueError(f"{name} {path} is not valid JSON: {error}.") from error
