# SPDX-License-Identifier: Apache-2.0
"""A report as a list of blocks, written as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

__all__ = ["Block", "Bullets", "Heading", "Paragraph", "Picture", "Table", "to_html", "to_markdown"]


class Heading(NamedTuple):
    """Level 1 is the title."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """Plain text."""

    text: str


class Bullets(NamedTuple):
    """One line each."""

    items: Sequence[str]


class Table(NamedTuple):
    """The first column is the name of the row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """PNG file, its path relative to the report; width in inches, as it would be printed."""

    path: str
    caption: str
    width: float


Block = Heading | Paragraph | Bullets | Table | Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto; margin: 1rem 0 }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888 }
figure { margin: 1.5rem 0 }
figure img { max-width: 100%; height: auto }
figcaption { font-size: .875rem; color: #444; max-width: 45rem }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """Write GitHub's Markdown; pictures are linked."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], *, title: str, folder: Path) -> str:
    """Write one page that needs no other file; pictures are read from ``folder``."""
    body = "\n".join(_html(block, folder) for block in blocks)
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(path, caption):
            return f"![{_plain(caption)}]({path})\n\n*{_plain(caption)}*"
        case Table(headings, rows):
            lines = [headings, [":--", *("--:" for _ in headings[1:])], *rows]
            cells = [[_plain(cell) if number != 1 else cell for cell in line] for number, line in enumerate(lines)]
            return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _plain(text: str) -> str:
    """Keep Markdown from reading marks in text: names of data sets and errors hold any character."""
    return re.sub(r"([\\`*_<\[\]|~$])", r"\\\1", " ".join(text.split()))


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Picture(path, caption, width):
            data = base64.b64encode((folder / path).read_bytes()).decode()
            image = (
                f'<img alt="{escape(caption)}" style="width: {1.4 * width:.1f}in" src="data:image/png;base64,{data}">'
            )
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Table(headings, rows):
            head, body = _html_row(headings, "th"), "".join(_html_row(row, "td") for row in rows)
            return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
