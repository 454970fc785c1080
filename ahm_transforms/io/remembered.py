# SPDX-License-Identifier: Apache-2.0
"""Remember in a folder what was found out about a case, until one of its files changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ahm_transforms.cache_folder import CacheFolder
from ahm_transforms.io._types import Case

__all__ = ["Remembered"]


class Remembered:
    """One small file for each case.

    Args:
        folder: where they are, see `CacheFolder`.
        asked: what was asked about the cases; another question has other answers.

    Raises:
        OSError: when files cannot be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Remembered(folder, "size").write({"image": "a.nii"}, {"size": [3, 4]})
        ...     [Remembered(folder, asked).read({"image": "a.nii"}) for asked in ("size", "spacing")]
        [{'size': [3, 4]}, None]
    """

    def __init__(self, folder: str | Path, *asked: Any) -> None:
        self.kept = CacheFolder(folder, *asked, suffix=".json")

    def read(self, case: Case) -> dict[str, Any] | None:
        """Return what `write` was given for a case; ``None`` if it was not, or its files have changed since."""
        try:
            content: dict[str, Any] = json.loads(self._path(case).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged file counts as none
            return None
        return content

    def write(self, case: Case, found: Mapping[str, Any]) -> None:
        """Keep what was found out about a case: numbers, texts and lists of them."""
        with self.kept.replacing(self._path(case)) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")

    def _path(self, case: Case) -> Path:
        looked_at = {key: value for key, value in case.items() if key not in ("case_id", "patient_id")}
        return self.kept.path(looked_at)
