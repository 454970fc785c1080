# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from monai.data import MetaTensor
from PIL import Image

from ahm_engines.handlers.quick_look import COLOURS, QuickLookd, draw_quick_look


def pages(figure: Figure) -> list[np.ndarray]:
    """Return the image of each slice as drawn."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes]


def veils(figure: Figure, number: int) -> list[np.ndarray]:
    """Return where a class is coloured in each slice."""
    found = []
    for axis in figure.axes:
        drawn = [np.asarray(image.get_array()) for image in axis.images[1:]]
        wanted = [veil for veil in drawn if np.allclose(veil[veil[..., 3] > 0][0, :3], to_rgb(COLOURS[number - 1]))]
        found.append(wanted[0][..., 3] > 0 if wanted else np.zeros(pages(figure)[0].shape, bool))
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for entry in figure.legends for text in entry.get_texts()]


def volume() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(1, 8, 9, 10)
    labels = torch.zeros(1, 8, 9, 10)
    labels[0, 1:4, 2:7, 6] = 1  # widest across the last axis at 6, across the first at 1
    labels[0, 1, 5, 3:8] = 2
    return image, labels


def test_volume_is_cut_where_most_was_found() -> None:
    image, labels = volume()
    figure = draw_quick_look(image, labels, ["a", "b"])
    axial, coronal, sagittal = pages(figure)
    np.testing.assert_array_equal(axial, np.rot90(image[0, :, :, 6]))
    np.testing.assert_array_equal(coronal, np.rot90(image[0, :, 5, :]))
    np.testing.assert_array_equal(sagittal, np.rot90(image[0, 1]))
    np.testing.assert_array_equal(veils(figure, 1)[0], np.rot90(labels[0, :, :, 6] == 1))
    np.testing.assert_array_equal(veils(figure, 2)[2], np.rot90(labels[0, 1] == 2))
    assert legend(figure) == ["a", "b"]


def test_scores_are_read_as_their_largest() -> None:
    image, labels = volume()
    scores = torch.nn.functional.one_hot(labels[0].long(), 3).movedim(-1, 0) * 5.0 - 2
    figures = [draw_quick_look(image, found, ["a", "b"]) for found in (scores, labels)]
    for number in (1, 2):
        for one, other in zip(*(veils(figure, number) for figure in figures), strict=True):
            np.testing.assert_array_equal(one, other)


def test_nothing_found_shows_the_middle_and_says_so() -> None:
    image, labels = volume()
    figure = draw_quick_look(image, labels * 0, ["a", "b"], title="case")
    np.testing.assert_array_equal(pages(figure)[0], np.rot90(image[0, :, :, 5]))
    assert "nothing found" in [text.get_text() for text in figure.texts]
    assert figure.get_suptitle() == "case"
    assert legend(figure) == []


@pytest.mark.parametrize("y_up", [None, False, True])
def test_picture_counts_its_lines_downwards(y_up: bool | None) -> None:
    image = torch.rand(3, 8, 5)
    (page,) = pages(draw_quick_look(image, (image[:1] > 0.5), ["lesion"], y_up=y_up))
    np.testing.assert_array_equal(page, np.rot90(image[0]) if y_up else image[0].T)


def test_spacing_sets_the_shape_of_a_slice() -> None:
    image = MetaTensor(torch.rand(1, 10, 10, 10), affine=torch.diag(torch.tensor([1.0, 2.0, 4.0, 1.0])))
    figure = draw_quick_look(image, None, [])
    assert [axis.get_box_aspect() for axis in figure.axes] == [2.0, 4.0, 2.0]


def test_a_single_slice_is_one_page() -> None:
    assert len(draw_quick_look(torch.rand(1, 8, 9, 1), torch.ones(1, 8, 9, 1), ["a"]).axes) == 1


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_constant_images_and_single_nans_keep_a_grey_window(tmp_path: Path, value: float) -> None:
    image = torch.zeros(1, 6, 7)
    image[0, 2, 3] = value
    figure = draw_quick_look(image, None, [])
    low, high = figure.axes[0].images[0].get_clim()
    assert low < high
    figure.savefig(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 8, 9, 1)])
def test_another_grid_is_refused(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"of one size, got \(1, 8, 9\) and"):
        draw_quick_look(torch.rand(1, 8, 9), torch.zeros(shape), ["a"])


def test_transform_writes_one_picture_per_case(tmp_path: Path) -> None:
    image, labels = volume()
    data = {"image": image, "pred": labels, "case_id": "c1"}
    assert QuickLookd(tmp_path, ["a", "b"])(data) == data
    assert [path.name for path in (tmp_path / "c1").iterdir()] == ["c1_quicklook.png"]
    assert Image.open(tmp_path / "c1/c1_quicklook.png").width > 300


def test_pictures_may_lie_in_one_folder(tmp_path: Path) -> None:
    image, labels = volume()
    QuickLookd(tmp_path, ["a", "b"], separate_folder=False)({"image": image, "pred": labels, "case_id": "c1"})
    assert [path.name for path in tmp_path.iterdir()] == ["c1_quicklook.png"]


def test_classes_are_titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: titles.append(self.get_suptitle()))
    data = {"image": torch.rand(1, 8, 9), "pred": torch.tensor([0.1, 0.87, 0.03]), "case_id": "c1"}
    QuickLookd(tmp_path, ["benign", "malignant", "normal"])(data)
    assert titles == ["c1: malignant (87 %)"]


def test_data_without_an_id_are_passed_over_only_where_that_is_asked_for(tmp_path: Path) -> None:
    image, labels = volume()
    data = {"image": image, "pred": labels}
    assert QuickLookd(tmp_path, ["a", "b"], allow_missing_keys=True)(data) == data
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError, match="case_id"):
        QuickLookd(tmp_path, ["a", "b"])(data)
