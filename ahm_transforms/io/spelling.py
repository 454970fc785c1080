# SPDX-License-Identifier: Apache-2.0
"""Names with accents, which systems store in one character or in two: an archive from macOS brings the latter."""

from __future__ import annotations

import unicodedata
from pathlib import Path

__all__ = ["nfc", "on_disk"]


def nfc(text: str) -> str:
    """Return a name in the form in which names are compared; files keep theirs."""
    return unicodedata.normalize("NFC", text)


def on_disk(path: Path) -> Path:
    """Return how the disk spells a path; what is not there in either form comes back as it was."""
    if str(path).isascii() or path.exists():
        return path
    folder = on_disk(path.parent)
    spellings = (folder / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))
    return next((each for each in spellings if each.exists()), path)
