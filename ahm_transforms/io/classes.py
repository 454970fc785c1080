# SPDX-License-Identifier: Apache-2.0
"""Find the class of an image: in its path, in a table, or in the datalist."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import Case, LeftOut, Source
from ahm_transforms.io.check import case_names
from ahm_transforms.io.pairs import place_of
from ahm_transforms.io.spelling import nfc

_CLASS = "label"  # the column of the table
_KEYS = ("case_id", "image")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def class_names(classes: Sequence[str]) -> list[str]:
    """Return the names as a list, without blanks around them.

    Raises:
        ValueError: it is empty, one text, names a class twice, or holds an empty name.
    """
    names = [] if isinstance(classes, str) else [nfc(str(name)).strip() for name in classes]
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"classes: expected a list of different names, none of them empty, got {classes!r}.")
    return names


def add_classes(
    source: Source,
    classes: Sequence[str],
    *,
    class_pattern: str | None = None,
    labels_csv: str | Path | None = None,
) -> None:
    """Give every case of ``source`` the index of its class as ``label``; where that fails, the case is bad.

    The class comes from the table or the pattern, if one is given, or else from the datalist, or else from the path: a
    class's name in it, capital letters or not, with no letter beside it. Table, datalist and pattern may give the index
    of the class in place of its name, unless a class is called by a number.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: table and pattern are both given, or one of them makes no sense.
    """
    if labels_csv is not None and class_pattern is not None:
        raise ValueError("pass labels_csv or class_pattern, not both.")
    name_of = _by_table(source, labels_csv) if labels_csv is not None else _by_pattern(source, classes, class_pattern)
    use_own = labels_csv is None and class_pattern is None
    cases: list[Case] = []
    called = case_names(source.found.cases)
    for case in source.found.cases:
        try:
            name = case["label"] if use_own and "label" in case else name_of(case)
            cases.append({**case, "label": _index(name, classes)})
        except ValueError as error:
            source.found.bad.append(LeftOut(called[case["case_id"]], str(error)))
    source.found.cases[:] = cases


def _index(name: Any, classes: Sequence[str]) -> int:
    text = nfc(str(name))
    if text in classes:
        return classes.index(text)
    or_index = ""
    if not any(_NUMBER.fullmatch(each) for each in classes):  # else a number is a name that is not listed
        if re.fullmatch(r"\d+", text) and int(text) < len(classes):
            return int(text)
        or_index = ", or its index"
    raise ValueError(f"is of class {name!r}, expected one of {', '.join(classes)}{or_index}")


def _by_pattern(source: Source, classes: Sequence[str], pattern: str | None) -> Callable[[Case], str]:
    """Return a function that reads the class off a case's path."""
    try:
        expression = re.compile(nfc(pattern)) if pattern is not None else _whole_names(classes)
    except re.error as error:
        raise ValueError(f"class_pattern {pattern!r} is no regular expression: {error}.") from error
    spelled = {name.lower(): name for name in classes} if pattern is None else {}

    def name_of(case: Case) -> str:
        path = _relative(case, source.root)
        matches = list(expression.finditer(path))
        texts = [match.group(1) if expression.groups else match.group(0) for match in matches]
        found = sorted({spelled.get(str(text).lower(), str(text)) for text in texts[: None if pattern is None else 1]})
        if len(found) != 1:
            what = f"the classes {', '.join(found)}" if found else "no class"
            raise ValueError(f"{what} in {path!r}, expected one of {', '.join(classes)}: pass --class_pattern")
        return found[0]

    return name_of


def _whole_names(classes: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for the names where no letter, and no digit after a digit, goes on."""
    longest_first = sorted(classes, key=len, reverse=True)
    names = "|".join(re.escape(name) + (r"(?!\d)" if name[-1].isdigit() else "") for name in longest_first)
    return re.compile(rf"(?<![^\W\d_])(?:{names})(?![^\W\d_])", re.IGNORECASE)


def _by_table(source: Source, path: str | Path) -> Callable[[Case], str]:
    """Return a function that looks a case up by its id or its path."""
    table = _read_table(Path(path))

    def name_of(case: Case) -> str:
        keys = (("case_id", case["case_id"]), ("image", _relative(case, source.root)))
        names = [table[key] for key in keys if key in table]
        if not names:
            raise ValueError(f"has no row in {Path(path).name}, expected its {' or '.join(_KEYS)} there")
        return names[0]

    return name_of


def _read_table(path: Path) -> Mapping[tuple[str, str], str]:
    """Return the class by column and value: ("case_id", "a") or ("image", "folder/a.png")."""
    if not path.is_file():
        raise FileNotFoundError(f"labels_csv {path} does not exist.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        columns = [name for name in _KEYS if name in (rows.fieldnames or [])]
        if not columns or _CLASS not in (rows.fieldnames or []):
            raise ValueError(
                f"labels_csv {path} must start with a line of column names, separated by commas, with {_CLASS!r} and "
                f"{' or '.join(map(repr, _KEYS))}, got {rows.fieldnames}."
            )
        table: dict[tuple[str, str], str] = {}
        for row in rows:
            for key in [(column, nfc((row[column] or "").strip())) for column in columns]:
                name = (row[_CLASS] or "").strip()
                if key[1] and table.setdefault(key, name) != name:
                    raise ValueError(f"labels_csv {path} line {rows.line_num}: {key[1]} has two classes.")
    return table


def _relative(case: Case, root: Path) -> str:
    place = place_of(case)
    below = place.relative_to(root.absolute()).as_posix() if place.is_relative_to(root.absolute()) else place.name
    return nfc(below)
