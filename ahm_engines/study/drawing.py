# SPDX-License-Identifier: Apache-2.0
"""What the figures of a report have in common: a style per arm, direct labels, files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

from ahm_engines.files import write_atomically
from ahm_engines.study.finished import Finished

__all__ = ["COLUMN", "PAGE", "TEXT", "ArmStyle", "arm_styles", "in_style", "label_ends", "save_figure"]

COLUMN, PAGE = 3.5, 7.2  # inches: width of a column and of a page
DPI = 220
TEXT = 7.5  # points
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#332288")  # Okabe-Ito, Tol
GREYS = ("#000000", "#666666", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
LEADER = {"relpos": (0.0, 0.5), "shrinkA": 1, "shrinkB": 3}  # from the left edge of a label to its point
STYLE = {
    "font.size": TEXT,
    "axes.titlesize": 8,
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # titles may hold dollar signs
    "pdf.fonttype": 42,  # letters stay letters, as journals ask
    "figure.facecolor": "white",
}
in_style = rc_context(STYLE)  # decorates what draws


class ArmStyle(NamedTuple):
    """Looks of an arm, the same in all figures."""

    title: str
    colour: str
    marker: str
    line: Any


class End(NamedTuple):
    """Last point of a line, to be labelled."""

    x: float
    y: float
    style: ArmStyle


def arm_styles(study: Finished) -> dict[str, ArmStyle]:
    """Give baselines shades of grey and dashes, and the others colours.

    A baseline is an arm that others are compared with, and that is compared with none but arms from scratch itself.
    """
    styles: dict[str, ArmStyle] = {}
    greys = colours = 0
    references = {other for arm in study.arms.values() for other in arm.compare_with}
    from_scratch = {name for name, arm in study.arms.items() if arm.pretrain is None}
    for name, arm in study.arms.items():
        if name in references | from_scratch and set(arm.compare_with) <= from_scratch:
            colour, line = GREYS[greys % len(GREYS)], LINES[greys % len(LINES)]
            marker, greys = MARKERS[greys % len(MARKERS)], greys + 1
        else:
            colour, line = COLOURS[colours % len(COLOURS)], LINES[colours // len(COLOURS) % len(LINES)]
            marker, colours = MARKERS[colours % len(MARKERS)], colours + 1
        styles[name] = ArmStyle(arm.title, colour, marker, line)
    return styles


def label_ends(axis: Axes, ends: Sequence[End], *, x: float, height: float) -> None:
    """Write every arm's title at ``x`` beside the end of its line, moved apart where they would overlap.

    Args:
        axis: its limits are final.
        ends: of the lines.
        x: where the titles start, in data.
        height: of the axes in inches, about.
    """
    if not ends:
        return
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end.y)
    places = _apart([end.y for end in ends], gap=(high - low) * 1.25 * TEXT / 72 / height, low=low, high=high)
    for end, place in zip(ends, places, strict=True):
        axis.annotate(
            end.style.title,
            (end.x, end.y),
            (x, place),
            color=end.style.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.style.colour, "lw": 0.5, "alpha": 0.7, **LEADER},
        )


def _apart(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places at least ``gap`` apart, in the order of ``wanted`` (rising), near them and, if there is room, inside."""
    offsets = gap * np.arange(len(wanted))
    places = isotonic_regression(np.asarray(wanted) - offsets).x
    found: list[float] = (np.clip(places, low, max(high - offsets[-1], low)) + offsets).tolist()
    return found


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.pdf``."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    with rc_context(STYLE):
        for path in paths:
            draw = partial(figure.savefig, format=path.suffix[1:], dpi=DPI)
            write_atomically(path, draw)
    return paths
