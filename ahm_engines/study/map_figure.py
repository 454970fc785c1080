# SPDX-License-Identifier: Apache-2.0
"""Figure of the masks over pretraining: what each arm's policy looks for, and what it hides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ahm_engines.study.cells import Cell
from ahm_engines.study.drawing import PAGE, in_style
from ahm_engines.study.finished import PRETRAIN, Finished

__all__ = ["draw_mask_maps"]

EPOCHS = 4  # columns at most


class Snapshot(NamedTuple):
    """Images, masks and policy maps of the validation at an epoch, ``[N, H, W]``, row 0 on top."""

    epoch: int
    image: np.ndarray
    mask: np.ndarray
    policy: np.ndarray | None


@in_style
def draw_mask_maps(study: Finished) -> Figure | None:
    """One row per arm: the policy map over one validation image at some epochs, then what was hidden at the last.

    Arms without a policy show their mask instead. The last column is the share of the validation images in which a
    place was hidden. Policy maps have one scale per arm, so that a map which stays flat looks flat. ``None`` without
    any maps.
    """
    arms = {name: snapshots for name in study.arms if (snapshots := _snapshots(study, name))}
    if not arms:
        return None
    columns = max(len(snapshots) for snapshots in arms.values())
    figure = _figure(arms, columns)
    axes = figure.subplots(len(arms), columns + 1, squeeze=False)
    above: list[int] = []
    for (name, snapshots), row in zip(arms.items(), axes, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        if (epochs := [snapshot.epoch for snapshot in snapshots]) != above:
            _name_columns(row, epochs)
            above = epochs
        row[0].set_ylabel(study.arms[name].title, rotation=0, ha="right", va="center", labelpad=4)
        _draw_row(figure, row[:columns], snapshots)
        share = row[-1].imshow(snapshots[-1].mask.mean(0), cmap="magma", vmin=0, vmax=1)
    _bar(figure, share, axes[:, -1].tolist(), ["never", "always"])
    return figure


def _figure(arms: dict[str, list[Snapshot]], columns: int) -> Figure:
    height, width = next(iter(arms.values()))[0].image.shape[1:]
    side = (PAGE - 1.2) / (columns + 1)
    tall = min(max(side * height / width, 0.5 * side), 2 * side)
    return Figure(figsize=(PAGE, len(arms) * tall + 0.4), layout="constrained")


def _name_columns(row: Sequence[Axes], epochs: Sequence[int]) -> None:
    for axis, epoch in zip(row, epochs, strict=False):
        axis.set_title(f"epoch {epoch}")
    row[-1].set_title(f"share hidden,\nepoch {epochs[-1]}")


def _draw_row(figure: Figure, row: Sequence[Axes], snapshots: Sequence[Snapshot]) -> None:
    chosen = int(snapshots[0].image.std((1, 2)).argmax())  # the same for all arms: they see the same images
    policies = [snapshot.policy[chosen] for snapshot in snapshots if snapshot.policy is not None]
    scale = {"vmin": np.nanmin(policies), "vmax": np.nanmax(policies)} if policies else {}
    drawn = None
    for axis, snapshot in zip(row, snapshots, strict=False):
        _draw_grey(axis, snapshot.image[chosen])
        if snapshot.policy is not None:
            drawn = axis.imshow(snapshot.policy[chosen], cmap="viridis", alpha=0.55, interpolation="nearest", **scale)
        else:
            veil = np.ma.masked_equal(snapshot.mask[chosen].astype(float), 0.0)
            axis.imshow(veil, cmap="viridis", vmin=0, vmax=3, alpha=0.8, interpolation="nearest")
    if drawn is not None:
        _bar(figure, drawn, [row[len(snapshots) - 1]], ["low", "high"])


def _draw_grey(axis: Axes, image: np.ndarray) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))


def _bar(figure: Figure, drawn: AxesImage, axes: Sequence[Axes], names: Sequence[str]) -> None:
    bar = figure.colorbar(
        drawn, ax=axes, shrink=0.8 / len(axes), pad=0.02, aspect=18, anchor=(0.0, 1.0 if len(axes) > 1 else 0.5)
    )
    bar.outline.set_visible(False)
    bar.set_ticks(list(drawn.get_clim()), labels=names)
    bar.ax.tick_params(length=0, labelsize=6)


def _snapshots(study: Finished, arm: str) -> list[Snapshot]:
    """Of the first seed that has any: first and last epoch and some between, evenly."""
    for seed in study.all_seeds:
        files = sorted((study.folder / Cell(PRETRAIN, arm, seed).folder / "maps").glob("epoch*.npz"))
        if files:
            places = np.unique(np.linspace(0, len(files) - 1, min(len(files), EPOCHS)).round().astype(int))
            return [_read(files[place]) for place in places]
    return []


def _read(path: Path) -> Snapshot:
    epoch = int("".join(re.findall(r"\d+", path.stem)) or 0)
    with np.load(path) as maps:
        policy = maps["policy"].astype(float) if "policy" in maps else None
        return Snapshot(epoch, maps["image"].astype(float), maps["mask"].astype(float), policy)
