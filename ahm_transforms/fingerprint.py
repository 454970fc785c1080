# SPDX-License-Identifier: Apache-2.0
"""Names for what was made of a case, which change with all that decides it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["fingerprint"]

CODE = Path(__file__).parent  # of this package


def fingerprint(case: Mapping[str, Any], *made_by: Any) -> str:
    """Return 64 hexadecimal digits that tell nothing about the case.

    They follow from its entries, the size and the time of change of the files that it names, ``made_by``, this
    package's code, which may change without another version, and the versions of MONAI and torch.
    """
    files = [text for value in case.values() for text in (value if isinstance(value, list) else [value])]
    stats = [os.stat(text) for text in files if isinstance(text, str) and os.path.isfile(text)]
    sizes = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    told = [made_by, *_code(), dict(case), sizes]
    return hashlib.sha256(json.dumps(told, default=_as_text).encode()).hexdigest()


@cache
def _code() -> list[str]:
    """What stands for this package's code, and the versions of the others."""
    files = sorted(CODE.rglob("*.py"))
    own = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return [own, version("monai"), version("torch")]


def _as_text(value: Any) -> Any:
    """For JSON, which knows neither arrays nor paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
