# SPDX-License-Identifier: Apache-2.0
"""A picture of each prediction, to see at a glance whether it makes sense."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Transform
from torch import Tensor

from ahm_engines.files import writable_folder, write_atomically

__all__ = ["QuickLookd", "draw_quick_look"]

# Paul Tol's bright scheme, which most colour-blind people can tell apart; further classes start over.
COLOURS = ("#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#4477aa")
HEIGHT, TOP, LEGEND_ROW, LEGEND_COLUMNS = 3.2, 0.36, 0.26, 4  # inches, and entries in one row
VEIL = 0.3  # opacity of the segmentation over the image


class Page(NamedTuple):
    """One slice: the image, the classes in it, and height over width in mm."""

    image: np.ndarray
    classes: np.ndarray
    aspect: float


def draw_quick_look(
    image: Tensor,
    segmentation: Tensor | None,
    classes: Sequence[str],
    *,
    y_up: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one case: three orthogonal slices of a volume, or the picture, with the outlines of what was found.

    Each slice is the one with the largest cross-section of all classes together, or the middle one where nothing was
    found. Of several channels the first is shown; a `MetaTensor` is drawn with its spacing.

    Args:
        image: ``[C, *S]``.
        segmentation: class indices ``[1, *S]``, or scores ``[classes, *S]`` of which the largest counts, background
            first; ``None`` draws the image alone.
        classes: names of classes 1, 2, ...
        y_up: whether the second axis of a slice points up, as in RAS volumes; ``None`` = volumes only.
        title: of the figure.

    Returns:
        A figure of its own; matplotlib's global state is not touched.

    Raises:
        ValueError: when the shapes do not fit each other.

    Example:
        >>> import torch
        >>> image = torch.rand(1, 8, 9, 10)
        >>> figure = draw_quick_look(image, image > 0.9, ["lesion"])
        >>> len(figure.axes)
        3
    """
    if image.ndim not in (3, 4) or (segmentation is not None and segmentation.shape[1:] != image.shape[1:]):
        found = None if segmentation is None else tuple(segmentation.shape)
        raise ValueError(f"expected image and segmentation [C, *S] of one size, got {tuple(image.shape)} and {found}.")
    labels = np.zeros(image.shape[1:], int) if segmentation is None else _labels(segmentation)
    spacing_mm = affine_to_spacing(image.affine, labels.ndim) if isinstance(image, MetaTensor) else [1.0] * labels.ndim
    up = labels.ndim == 3 if y_up is None else y_up
    pages = _pages(image[0].detach().float().cpu().numpy(), labels, [float(mm) for mm in spacing_mm], up)
    present = [number for number in range(1, len(classes) + 1) if (labels == number).any()]
    note = "" if segmentation is None or present else "nothing found"
    return _draw(pages, {number: classes[number - 1] for number in present}, title, note)


class QuickLookd(Transform):
    """Write ``<case_id>/<case_id>_quicklook.png`` for one decollated output of :class:`CaseInference`.

    Put it ahead of ``Invertd``: image and prediction still have one grid there. A prediction with spatial axes is drawn
    as a segmentation, one without, of probabilities, as a title of class and probability.

    Args:
        output_dir: folder of the results.
        classes: names of classes 1, 2, ... of a segmentation, or of all classes of a classification.
        y_up: as in :func:`draw_quick_look`.
        separate_folder: whether each case has a folder of its own there.
        allow_missing_keys: whether data without ``case_id`` are passed over, as a server's are.

    Raises:
        KeyError: on call, without ``case_id``.
        OSError: when the folder cannot be written to.
    """

    def __init__(
        self,
        output_dir: str | Path,
        classes: Sequence[str],
        *,
        y_up: bool | None = None,
        separate_folder: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        self.folder = writable_folder(output_dir)
        self.classes = list(classes)
        self.y_up = y_up
        self.separate_folder = separate_folder
        self.allow_missing_keys = allow_missing_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw, and return ``data`` as it is."""
        if self.allow_missing_keys and "case_id" not in data:
            return dict(data)
        case, image, pred = str(data["case_id"]), data["image"], data["pred"]
        if pred.ndim == 1:
            best = int(pred.argmax())
            title = f"{case}: {self.classes[best]} ({100 * float(pred[best]):.0f} %)"
            figure = draw_quick_look(image, None, [], y_up=self.y_up, title=title)
        else:
            figure = draw_quick_look(image, pred, self.classes, y_up=self.y_up, title=case)
        folder = writable_folder(self.folder / case if self.separate_folder else self.folder)
        write_atomically(folder / f"{case}_quicklook.png", lambda file: figure.savefig(file, format="png"))
        return dict(data)


def _labels(segmentation: Tensor) -> np.ndarray:
    best = segmentation[0] if len(segmentation) == 1 else segmentation.argmax(0)
    labels: np.ndarray = np.asarray(best.detach().cpu()).astype(int)
    return labels


def _pages(image: np.ndarray, labels: np.ndarray, spacing_mm: Sequence[float], y_up: bool) -> list[Page]:
    """First the slice across the last axis; axes of a single voxel make no slice."""
    if image.ndim == 2:
        return [_page(image, labels, spacing_mm, y_up)]
    pages = []
    for axis in reversed(range(3)):
        across = [other for other in range(3) if other != axis]
        if min(image.shape[other] for other in across) > 1:
            sizes = (labels > 0).sum(tuple(across))
            place = int(sizes.argmax()) if sizes.any() else image.shape[axis] // 2
            spacing = [spacing_mm[other] for other in across]
            pages.append(_page(image.take(place, axis), labels.take(place, axis), spacing, y_up))
    return pages


def _page(image: np.ndarray, labels: np.ndarray, spacing_mm: Sequence[float], y_up: bool) -> Page:
    """First axis to the right."""
    aspect = image.shape[1] * spacing_mm[1] / (image.shape[0] * spacing_mm[0])
    if y_up:
        return Page(np.rot90(image), np.rot90(labels), aspect)
    return Page(image.T, labels.T, aspect)


def _draw(pages: Sequence[Page], names: Mapping[int, str], title: str | None, note: str) -> Figure:
    widths = [min(max(HEIGHT / page.aspect, 0.3 * HEIGHT), 1.5 * HEIGHT) for page in pages]
    bottom = LEGEND_ROW * max(1, -(-len(names) // LEGEND_COLUMNS)) + 0.1
    size = (max(sum(widths), 4.5), HEIGHT + TOP + bottom)
    figure = Figure(figsize=size, dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    edges = {"left": 0.01, "right": 0.99, "top": 1 - TOP / size[1], "bottom": bottom / size[1]}
    grid = GridSpec(1, len(pages), figure=figure, wspace=0.03, width_ratios=widths, **edges)
    for number, page in enumerate(pages):
        axis = figure.add_subplot(grid[0, number], xticks=[], yticks=[], box_aspect=page.aspect)
        axis.spines[:].set_color("0.8")
        _draw_page(axis, page)
    if names:
        patches = [Patch(color=_colour(number), label=name) for number, name in names.items()]
        figure.legend(handles=patches, loc="lower center", ncols=LEGEND_COLUMNS, fontsize=9, frameon=False)
    figure.text(0.5, 0.02, note, ha="center", va="bottom", fontsize=10, color="0.4")
    figure.suptitle(title or "", fontsize=11, y=1 - 0.08 / size[1], va="top")
    return figure


def _draw_page(axis: Axes, page: Page) -> None:
    values = np.nan_to_num(page.image)
    low, high = np.percentile(values, (0.5, 99.5))
    axis.imshow(values, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    for number in np.unique(page.classes[page.classes > 0]).tolist():
        inside = page.classes == number
        veil = np.zeros((*inside.shape, 4))
        veil[inside] = to_rgba(_colour(number), VEIL)
        axis.imshow(veil, interpolation="nearest", aspect="auto")
        axis.contour(inside, levels=[0.5], colors=[_colour(number)], linewidths=1.2)


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]
