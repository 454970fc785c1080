# SPDX-License-Identifier: Apache-2.0
"""What the classes of a segmentation are, in the coded terms of DICOM."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LONGEST_TEXT", "Code", "Segment", "read_segments"]

LOGGER = logging.getLogger(__name__)
LONGEST_TEXT, LONGEST_CODE = 64, 16  # characters of DICOM's long and short strings


class Code(NamedTuple):
    """A coded term: its value, the coding scheme it is from, and what it means."""

    value: str
    scheme: str
    meaning: str


class Segment(NamedTuple):
    """What one class is."""

    name: str
    category: Code
    type: Code


TISSUE = Code("85756007", "SCT", "Tissue")


def read_segments(path: str | Path, classes: Sequence[str]) -> list[Segment]:
    """Return the coded properties of the foreground classes, in their order.

    The file's entry ``segments`` has ``{"<class>": {"category": [value, scheme, meaning], "type": [...]}}``. Classes
    that are not in it become a tissue with a private type, which a log line tells.

    Args:
        path: a bundle's ``metadata.json``.
        classes: names of classes 1, 2, ...; without background.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or an entry is not of that form.
    """
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8")).get("segments", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}.") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path}: segments must be an object with one entry per class, got {known!r}.")
    private = [name for name in classes if name not in known]
    if private:
        LOGGER.info("%s has no codes for %s: they are written as tissue of a private type.", path, ", ".join(private))
    codes = _private_codes(private)
    return [
        Segment(name, TISSUE, codes[name])
        if name in codes
        else Segment(name, *(_read_code(path, name, known[name], part) for part in ("category", "type")))
        for name in classes
    ]


def _private_codes(names: Sequence[str]) -> dict[str, Code]:
    codes: dict[str, Code] = {}
    for name in names:
        slug = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")[:LONGEST_CODE]
        if not slug or slug in {code.value for code in codes.values()}:
            slug = f"{slug[: LONGEST_CODE - 4]}_{len(codes) + 1:03d}"
        codes[name] = Code(slug, "99AHM", name[:LONGEST_TEXT])
    return codes


def _read_code(path: str | Path, name: str, entry: Any, part: str) -> Code:
    words = entry.get(part) if isinstance(entry, dict) else None
    if not (isinstance(words, list) and len(words) == 3 and all(isinstance(word, str) and word for word in words)):
        raise ValueError(f"{path}: segments, class {name!r}: {part} must be [value, scheme, meaning], got {entry!r}.")
    return Code(*words)
