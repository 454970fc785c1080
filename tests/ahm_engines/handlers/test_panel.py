# SPDX-License-Identifier: Apache-2.0
"""Panels show what they say, the right way up, and end in files that are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.handlers.panel import MaskPanel, draw_panel
from ahm_networks.maskers import ActorCriticMasker, Masker, UniformMasker
from ahm_networks.nets import ReconstructionUNet

COLUMNS = ["image", "policy map", "mask", "visible input", "reconstruction", "error"]
PATIENT = "Doe^Jane"


class Writer:
    """Stands in for TensorBoard's."""

    def __init__(self) -> None:
        self.images: list[tuple[str, Any, int]] = []

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.shape[2] == 3
        self.images.append((tag, image, step))


def case(*size: int, count: int = 2, channels: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, policy map, mask and prediction."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, channels, *size, generator=generator)
    policy_map = torch.rand(count, 1, *size, generator=generator)
    mask = torch.rand(count, 1, *size, generator=generator) > 0.5
    return image, policy_map, mask, torch.rand(image.shape, generator=generator)


def row(figure: Figure, number: int = 0) -> dict[str, Axes]:
    start = number * len(COLUMNS)
    return dict(zip(COLUMNS, figure.axes[start : start + len(COLUMNS)], strict=True))


def shown(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def evaluator(panel: MaskPanel, masker: Masker | None = None) -> MaskedEvaluator:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"image": torch.rand(3, 1, 17, 20, generator=generator), "patient": [PATIENT] * 3},
        {"image": torch.rand(1, 1, 17, 20, generator=generator), "patient": [PATIENT]},
    ]
    network = ReconstructionUNet(2, backbone=nn.Conv2d(1, 1, 3, padding=1))
    return MaskedEvaluator("cpu", batches, network, masker or UniformMasker(2, 8, 0.5), val_handlers=[panel])


def test_columns_are_named_in_the_order_of_the_method() -> None:
    figure = draw_panel(*case(8, 8), title="epoch 3")
    assert [axes.get_title() for axes in figure.axes[:6]] == COLUMNS
    assert figure.get_suptitle() == "epoch 3"


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_has_its_visible_parts_put_back_and_the_error_is_that_of_hidden_ones(channels: int) -> None:
    image, policy_map, mask, pred = case(8, 10, channels=channels)
    axes = row(draw_panel(image, policy_map, mask, pred))
    rebuilt = torch.where(mask, pred, image)[0]
    assert np.allclose(shown(axes["reconstruction"]), rebuilt[0].T)
    assert np.allclose(shown(axes["error"]), (rebuilt - image[0]).abs().mean(0).T)
    veil = axes["visible input"].images[1].get_array()
    assert np.array_equal(~np.ma.getmaskarray(veil), mask[0, 0].T.numpy())


def test_volumes_show_their_middle_slice_with_anterior_up_and_the_first_axis_to_the_right() -> None:
    image = torch.zeros(1, 1, 6, 8, 5)
    image[0, 0, 5, 7, 2] = 1.0  # the last voxel of both axes, in the middle slice
    image[0, 0, 0, 0, 1] = 9.0  # in another slice
    picture = shown(row(draw_panel(image, None, image > 0, image))["image"])
    assert picture.shape == (8, 6)
    assert np.argwhere(picture).tolist() == [[0, 5]]


def test_pictures_count_their_lines_downwards_unless_told_that_y_points_up() -> None:
    image = torch.zeros(1, 1, 6, 8)
    image[0, 0, 5, 0] = 1.0
    assert np.argwhere(shown(row(draw_panel(image, None, image > 0, image))["image"])).tolist() == [[0, 5]]
    upright = draw_panel(image, None, image > 0, image, y_up=True)
    assert np.argwhere(shown(row(upright)["image"])).tolist() == [[7, 5]]


def test_grey_window_is_one_per_row_and_error_scale_one_for_all_rows() -> None:
    image, policy_map, mask, pred = case(8, 8)
    image[1] *= 100.0
    figure = draw_panel(image, policy_map, mask, pred)
    windows = []
    for number in range(2):
        axes = row(figure, number)
        limits = {axes[name].images[0].get_clim() for name in ("image", "visible input", "reconstruction")}
        assert len(limits) == 1
        windows.append(limits.pop())
    assert windows[1][1] > 50 * windows[0][1]
    assert row(figure, 0)["error"].images[0].get_clim() == row(figure, 1)["error"].images[0].get_clim()


def test_no_policy_is_said_in_words_and_needs_no_colour_bar() -> None:
    image, policy_map, mask, pred = case(8, 8)
    with_policy, without = draw_panel(image, policy_map, mask, pred), draw_panel(image, None, mask, pred)
    axes = row(without)["policy map"]
    assert not axes.images and [text.get_text() for text in axes.texts] == ["no policy"]
    assert len(with_policy.axes) == len(without.axes) + 1


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (3, 3), (9, 5)])
def test_rows_are_capped_by_what_is_asked_and_what_is_there(rows: int, expected: int) -> None:
    figure = draw_panel(*case(8, 8, count=5), rows=rows)
    assert len(figure.axes) == expected * len(COLUMNS) + 2  # and two colour bars


@pytest.mark.parametrize("name", ["policy_map", "mask", "pred"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    tensors = dict(zip(("image", "policy_map", "mask", "pred"), case(8, 8), strict=True))
    tensors[name] = tensors[name][..., :2]
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(2, 1, 8, 8\), got \(2, 1, 8, 2\)"):
        draw_panel(**tensors)


def test_constant_and_half_precision_images_are_drawn(tmp_path: Path) -> None:
    image = torch.zeros(1, 1, 8, 8)
    figure = draw_panel(image, image, image.bool(), image.bfloat16())
    figure.savefig(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 0


def test_pyplot_knows_nothing_of_the_figure() -> None:
    backend, open_figures = pyplot.get_backend(), pyplot.get_fignums()
    draw_panel(*case(8, 8))
    assert (pyplot.get_backend(), pyplot.get_fignums()) == (backend, open_figures)


def test_handler_writes_one_whole_picture_per_validation_named_by_the_trainers_epoch(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "panels"
    engine = evaluator(MaskPanel(folder, rows=2))
    for epoch in (5, 10):
        engine.run(epoch)
    assert sorted(path.name for path in folder.iterdir()) == ["panel_epoch0005.png", "panel_epoch0010.png"]
    with Image.open(folder / "panel_epoch0005.png") as picture:
        picture.load()
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 50
        assert PATIENT not in str(picture.info)


def test_handler_spreads_the_policy_map_as_the_masker_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(MaskPanel, "_write", lambda self, figure, epoch: figures.append(figure))
    masker = ActorCriticMasker(2, 8, 0.5)  # patches of 8 on 17 x 20 voxels: the last cells are partial
    evaluator(MaskPanel(tmp_path), masker).run()
    picture = shown(row(figures[0])["policy map"])
    assert picture.shape == (20, 17)
    assert np.ptp(picture[:8, :8]) == 0 and np.ptp(picture[16:, 16:]) == 0 < np.ptp(picture)


def test_handler_keeps_to_its_interval(tmp_path: Path) -> None:
    engine = evaluator(MaskPanel(tmp_path, every=2))
    for epoch in range(1, 5):
        engine.run(epoch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["panel_epoch0001.png", "panel_epoch0003.png"]


def test_tensorboard_gets_the_same_picture(tmp_path: Path) -> None:
    writer = Writer()
    evaluator(MaskPanel(tmp_path, summary_writer=writer)).run(7)
    (tag, pixels, step), *others = writer.images
    assert (tag, step, others) == ("masking/panel", 7, [])  # this masker has no policy map
    with Image.open(tmp_path / "panel_epoch0007.png") as picture:
        assert np.array_equal(pixels, np.asarray(picture.convert("RGB")))


def test_tensorboard_gets_the_policy_maps_of_the_rows_side_by_side_in_one_scale(tmp_path: Path) -> None:
    writer = Writer()
    masker = ActorCriticMasker(2, 8, 0.5)
    panel = MaskPanel(tmp_path, rows=2, summary_writer=writer, maps_dir=tmp_path)
    evaluator(panel, masker).run(7)
    (tag, pixels, step) = next(image for image in writer.images if image[0] != "masking/panel")
    assert (tag, step) == ("masking/policy_map", 7)
    maps = np.load(tmp_path / "epoch0007.npz")["policy"][:2]
    assert pixels.shape == (maps.shape[1], 2 * maps.shape[2], 3)
    values, colours = np.concatenate(list(maps), axis=1), pixels.astype(int).sum(-1)
    high, low = (np.unravel_index(place, values.shape) for place in (values.argmax(), values.argmin()))
    assert pixels[high].tolist() == [253, 231, 36]  # viridis ends in yellow
    assert colours[low] == colours.min()


def test_further_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = MaskPanel(tmp_path / "panels", maps_dir=tmp_path / "maps")
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    evaluator(panel).run()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_failing_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        evaluator(MaskPanel(tmp_path)).run()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_to_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        MaskPanel(tmp_path / "file" / "panels")


def maps(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return dict(content)


def test_maps_are_the_pages_of_the_picture_for_every_image_of_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(MaskPanel, "_write", lambda self, figure, epoch: figures.append(figure))
    panel = MaskPanel(tmp_path / "panels", rows=2, y_up=True, maps_dir=tmp_path / "new" / "maps")
    evaluator(panel, ActorCriticMasker(2, 8, 0.5)).run(5)
    content = maps(tmp_path / "new/maps/epoch0005.npz")
    kinds = {name: (values.shape, values.dtype) for name, values in content.items()}
    assert kinds == dict.fromkeys(("image", "policy"), ((3, 20, 17), np.float32)) | {"mask": ((3, 20, 17), np.bool_)}
    for number in range(2):
        axes = row(figures[0], number)
        for name, column in (("image", "image"), ("mask", "mask"), ("policy", "policy map")):
            assert np.array_equal(content[name][number], shown(axes[column])), name
    assert 0 < content["mask"][2].mean() < 1 and np.ptp(content["image"][2]) > 0


def test_maps_of_volumes_are_their_middle_slices_with_anterior_up(tmp_path: Path) -> None:
    image = torch.zeros(2, 2, 8, 10, 7)
    image[1, 0, 7, 9, 3] = 1.0  # the last voxel of both axes, in the first channel's middle slice
    network = ReconstructionUNet(3, in_channels=2, backbone=nn.Conv3d(2, 2, 3, padding=1))
    panel = MaskPanel(tmp_path, maps_dir=tmp_path)
    MaskedEvaluator("cpu", [{"image": image}], network, UniformMasker(3, 2, 0.5), val_handlers=[panel]).run(1)
    content = maps(tmp_path / "epoch0001.npz")
    assert np.argwhere(content["image"]).tolist() == [[1, 0, 7]]
    assert content["image"].shape == content["mask"].shape == (2, 10, 8)


def test_maps_hold_no_policy_where_there_is_none(tmp_path: Path) -> None:
    evaluator(MaskPanel(tmp_path / "panels", maps_dir=tmp_path / "maps")).run(1)
    assert maps(tmp_path / "maps/epoch0001.npz").keys() == {"image", "mask"}


def test_maps_keep_to_the_interval_of_the_pictures(tmp_path: Path) -> None:
    engine = evaluator(MaskPanel(tmp_path / "panels", every=2, maps_dir=tmp_path / "maps"))
    for epoch in range(1, 5):
        engine.run(epoch)
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["epoch0001.npz", "epoch0003.npz"]


@pytest.mark.parametrize("options", [{"rows": 0}, {"every": 0}])
def test_numbers_below_1_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        MaskPanel(tmp_path, **options)
