# SPDX-License-Identifier: Apache-2.0
"""Pictures of what is hidden and how it is rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor

from ahm_engines.events import MaskedKeys
from ahm_engines.files import writable_folder, write_atomically
from ahm_engines.metrics import composite

__all__ = ["MaskPanel", "draw_panel"]

COLUMNS = ("image", "policy map", "mask", "visible input", "reconstruction", "error")
HIDDEN = "#4477aa"  # no grey value looks like it: hidden is not the same as dark
MASK_COLOURS = ListedColormap(["#eeeeee", HIDDEN])
VEIL = ListedColormap([HIDDEN])
ERROR_COLOURS = LinearSegmentedColormap.from_list("error", ["white", "#cc3311", "black"])
SIDE, MARGIN, BAR_SPACE = 1.9, 0.32, 0.62  # inches


class Scale(NamedTuple):
    """Colours and the numbers at their ends."""

    colours: str | Colormap
    low: float
    high: float

    def options(self) -> dict[str, Any]:
        """For ``imshow``."""
        return {"cmap": self.colours, "vmin": self.low, "vmax": self.high}


def draw_panel(
    image: Tensor,
    policy_map: Tensor | None,
    mask: Tensor,
    pred: Tensor,
    *,
    rows: int = 4,
    y_up: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Draw image, policy map, mask, visible input, reconstruction and error, one row per image.

    Volumes show their middle slice along the last axis; of several channels the first is shown, and the mean error of
    all. The reconstruction has its visible voxels put back. Image, input and reconstruction of a row share one grey
    window; policy map and error have one scale for all rows.

    Args:
        image: ``[B, C, *S]``.
        policy_map: ``[B, 1, *S]``, spread over the voxels; ``None`` where a masker has none.
        mask: ``[B, 1, *S]`` bool, ``True`` = hidden.
        pred: ``[B, C, *S]``, in the intensities of ``image``.
        rows: images to draw at most.
        y_up: whether the second axis points up, as in RAS volumes and slices of them; ``None`` = volumes only,
            because pictures count their lines downwards.
        title: of the figure.

    Returns:
        A figure of its own; matplotlib's global state is not touched. Save it with ``figure.savefig``.

    Raises:
        ValueError: when the shapes do not fit each other.

    Example:
        >>> import torch
        >>> image = torch.rand(2, 1, 32, 32)
        >>> figure = draw_panel(image, None, image > 0.5, image)
        >>> len(figure.axes) >= 12
        True
    """
    _check_shapes(image, policy_map, mask, pred)
    count = min(rows, image.shape[0])
    image, mask, pred = image[:count], mask[:count], pred[:count]
    rebuilt = composite(image.float(), pred, mask)
    pictures = {
        "image": _pages(image, y_up),
        "mask": _pages(mask, y_up),
        "reconstruction": _pages(rebuilt, y_up),
        "error": _pages((rebuilt - image).abs().mean(1, keepdim=True), y_up),
    }
    if policy_map is not None:
        pictures["policy map"] = _pages(policy_map[:count], y_up)
    return _draw(pictures, title)


class MaskPanel:
    """Write one picture per validation, ``panel_epoch0005.png``, of the first batch.

    Attach it to a :class:`~ahm_engines.evaluator.MaskedEvaluator`; the validation handler tells that the epoch.
    ``maps_dir`` keeps what the first columns show as numbers, of all images of the batch: ``epoch0005.npz`` with
    ``image`` float32, ``mask`` bool and, where the masker has one, ``policy`` float32, each ``[B, height, width]``.

    Args:
        output_dir: folder for the pictures, made if need be.
        rows: images to draw.
        y_up: as in :func:`draw_panel`.
        summary_writer: TensorBoard writer that gets the picture too, as ``masking/panel``, and the policy maps of the
            same rows by themselves, as ``masking/policy_map``.
        every: validations between two pictures.
        maps_dir: folder for the numbers, made if need be; ``None`` keeps none.

    Raises:
        OSError: when a folder cannot be written to.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        rows: int = 4,
        y_up: bool | None = None,
        summary_writer: Any = None,
        every: int = 1,
        maps_dir: str | Path | None = None,
    ) -> None:
        if rows < 1 or every < 1:
            raise ValueError(f"rows and every: expected at least 1, got {rows} and {every}.")
        self.folder = writable_folder(output_dir)
        self.rows = rows
        self.y_up = y_up
        self.summary_writer = summary_writer
        self.every = every
        self.maps_folder = None if maps_dir is None else writable_folder(maps_dir)
        self._validations = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        """Draw what the first iteration left in the output."""
        self._validations += 1
        if idist.get_rank() == 0 and (self._validations - 1) % self.every == 0:
            image, policy_map, mask, pred = _tensors(engine)
            epoch, title = engine.state.epoch, f"epoch {engine.state.epoch}"
            self._write(draw_panel(image, policy_map, mask, pred, rows=self.rows, y_up=self.y_up, title=title), epoch)
            if self.summary_writer is not None and policy_map is not None:
                picture = _policy_picture(_pages(policy_map[: self.rows], self.y_up))
                self.summary_writer.add_image("masking/policy_map", picture, epoch, dataformats="HWC")
            if self.maps_folder is not None:
                _write_maps(self.maps_folder / f"epoch{epoch:04d}.npz", image, policy_map, mask, self.y_up)

    def _write(self, figure: Figure, epoch: int) -> None:
        path = self.folder / f"panel_epoch{epoch:04d}.png"
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
        if self.summary_writer is not None:
            self.summary_writer.add_image("masking/panel", figure_pixels(figure), epoch, dataformats="HWC")


def figure_pixels(figure: Figure) -> np.ndarray:
    """The figure as ``[height, width, 3]`` uint8, for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _policy_picture(pages: list[np.ndarray]) -> np.ndarray:
    """Maps side by side, in the colours of the panel."""
    scale = _policy_scale(pages)
    colours = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    pixels: np.ndarray = colours.to_rgba(np.concatenate(pages, axis=1), bytes=True)[..., :3]
    return pixels


def _tensors(engine: Engine) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Image, policy map spread over the voxels, mask and prediction of an evaluator's last batch."""
    output = engine.state.output
    image, policy_map = output[MaskedKeys.IMAGE], output[MaskedKeys.DECISION].policy_map
    if policy_map is not None:
        policy_map = engine.masker.expand(policy_map, image)
    return image, policy_map, output[MaskedKeys.MASK], output[MaskedKeys.PRED]


def _write_maps(path: Path, image: Tensor, policy_map: Tensor | None, mask: Tensor, y_up: bool | None) -> None:
    maps: dict[str, Any] = {"image": np.stack(_pages(image, y_up)), "mask": np.stack(_pages(mask, y_up)) > 0.5}
    if policy_map is not None:
        maps["policy"] = np.stack(_pages(policy_map, y_up))
    write_atomically(path, lambda file: np.savez_compressed(file, **maps))


def _check_shapes(image: Tensor, policy_map: Tensor | None, mask: Tensor, pred: Tensor) -> None:
    if image.ndim not in (4, 5):
        raise ValueError(f"image: expected [B, C, *S] with 2 or 3 spatial axes, got shape {tuple(image.shape)}.")
    one_channel = (image.shape[0], 1, *image.shape[2:])
    wanted = {"mask": (mask, one_channel), "pred": (pred, tuple(image.shape)), "policy_map": (policy_map, one_channel)}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            hint = " Spread it over the voxels with masker.expand(policy_map, image)." if name == "policy_map" else ""
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.{hint}")


def _pages(images: Tensor, y_up: bool | None) -> list[np.ndarray]:
    """First channel, middle slice, first axis to the right."""
    y_up = images.ndim == 5 if y_up is None else y_up
    pages = images[:, 0] if images.ndim == 4 else images[:, 0, ..., images.shape[-1] // 2]
    arrays = pages.detach().float().cpu().numpy()
    return [np.rot90(page) if y_up else page.T for page in arrays]


def _draw(pictures: dict[str, list[np.ndarray]], title: str | None) -> Figure:
    count = len(pictures["image"])
    height, width = pictures["image"][0].shape
    row = min(max(SIDE * height / width, 0.4 * SIDE), 1.8 * SIDE)
    top = MARGIN + (0.28 if title else 0.0)
    total = count * row + top + BAR_SPACE
    figure = Figure(figsize=(len(COLUMNS) * SIDE, total), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    edges = {"left": 0.01, "right": 0.99, "top": 1 - top / total, "bottom": BAR_SPACE / total}
    grid = GridSpec(count, len(COLUMNS), figure=figure, wspace=0.05, hspace=0.05, **edges)
    scales = _scales(pictures)
    for number in range(count):
        axes = {name: _axes(figure, grid[number, place], height / width) for place, name in enumerate(COLUMNS)}
        _draw_row(axes, {name: pages[number] for name, pages in pictures.items()}, scales)
        if number == 0:
            for name, axis in axes.items():
                axis.set_title(name, fontsize=11)
    for name, scale in scales.items():
        _colour_bar(figure, axes[name], scale, total)
    if title:
        figure.suptitle(title, fontsize=12, y=1 - 0.08 / total, va="top")
    return figure


def _axes(figure: Figure, cell: Any, aspect: float) -> Axes:
    axis = figure.add_subplot(cell, xticks=[], yticks=[], box_aspect=aspect)
    axis.spines[:].set_color("0.8")
    return axis


def _draw_row(axes: dict[str, Axes], row: dict[str, np.ndarray], scales: dict[str, Scale]) -> None:
    low, high = np.percentile(row["image"], (0.5, 99.5))
    grey = Scale("gray", low, max(high, low + 1e-6)).options()
    axes["image"].imshow(row["image"], **grey)
    axes["visible input"].imshow(row["image"], **grey)
    axes["visible input"].imshow(np.ma.masked_equal(row["mask"], 0), cmap=VEIL, interpolation="nearest")
    axes["mask"].imshow(row["mask"], interpolation="nearest", **Scale(MASK_COLOURS, 0.0, 1.0).options())
    axes["reconstruction"].imshow(row["reconstruction"], **grey)
    axes["error"].imshow(row["error"], **scales["error"].options())
    if "policy map" in row:
        axes["policy map"].imshow(row["policy map"], interpolation="nearest", **scales["policy map"].options())
    else:
        axes["policy map"].text(0.5, 0.5, "no policy", ha="center", va="center", fontsize=11, color="0.4")


def _scales(pictures: dict[str, list[np.ndarray]]) -> dict[str, Scale]:
    """One scale for all rows: error from 0, policy map over what it takes."""
    scales = {"error": Scale(ERROR_COLOURS, 0.0, max(float(np.percentile(pictures["error"], 99.5)), 1e-6))}
    if "policy map" in pictures:
        scales["policy map"] = _policy_scale(pictures["policy map"])
    return scales


def _policy_scale(pages: list[np.ndarray]) -> Scale:
    low, high = float(np.min(pages)), float(np.max(pages))
    return Scale("viridis", low, max(high, low + 1e-6))


def _colour_bar(figure: Figure, above: Axes, scale: Scale, total: float) -> None:
    """Put a bar under a column."""
    column = above.get_position(original=True)
    place = (column.x0 + 0.08 * column.width, 0.36 / total, 0.84 * column.width, 0.11 / total)
    colours = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    bar = figure.colorbar(colours, cax=figure.add_axes(place), orientation="horizontal")
    ticks = [scale.low, (scale.low + scale.high) / 2, scale.high]
    bar.set_ticks(ticks, labels=[f"{value:.2g}" for value in ticks], fontsize=9)
