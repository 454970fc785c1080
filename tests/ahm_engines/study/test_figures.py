# SPDX-License-Identifier: Apache-2.0
"""Figures show the planted numbers, one look per arm, and nothing where there is nothing."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from ahm_engines.study.comparisons import compare_all
from ahm_engines.study.drawing import _apart, arm_styles, save_figure
from ahm_engines.study.figures import draw_differences, draw_label_fractions, draw_learning_curves
from ahm_engines.study.finished import Finished, read_finished
from ahm_engines.study.map_figure import draw_mask_maps
from tests.fixtures_study import ARMS, planted_study, write_maps, write_settings

SEEDS = {"0.25": [0, 1, 2, 3, 4], "1.0": [0, 1, 2]}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    def gain(arm: str, _: float, seed: int) -> float:
        return {"scratch": 0.0, "random": 0.002 * (-1) ** seed, "a3c": 0.05 + 0.002 * seed}[arm]

    return read_finished(planted_study(tmp_path_factory.mktemp("study"), seeds=SEEDS, gain=gain))


def lines_of(axis: Axes, colour: str) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in axis.lines if to_hex(line.get_color()) == colour]


def test_label_fractions_show_seeds_and_means_in_points(study: Finished) -> None:
    figure = draw_label_fractions(study)
    assert figure is not None
    axis = figure.axes[0]
    *seeds, means = lines_of(axis, arm_styles(study)["a3c"].colour)
    expected = [[100 * value for value in study.values("dice", "a3c", f).values()] for f in (0.25, 1.0)]
    assert [sorted(values) for values in seeds] == [pytest.approx(sorted(values)) for values in expected]
    assert means == pytest.approx([np.mean(values) for values in expected])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["25 %\n16 patients", "100 %\n64 patients"]
    assert {text.get_text() for text in axis.texts} == {arm["title"] for arm in ARMS.values()}


def test_learning_curves_have_a_panel_per_fraction_with_the_target(study: Finished) -> None:
    figure = draw_learning_curves(study)
    assert figure is not None and len(figure.axes) == 2
    finals = [list(curve.values())[-3:] for curve in study.finished_curves("scratch", 0.25).values()]
    (target,) = lines_of(figure.axes[0], to_hex("0.55"))
    assert target[0] == pytest.approx(100 * 0.95 * np.mean(finals))
    (curve,) = lines_of(figure.axes[0], arm_styles(study)["scratch"].colour)
    assert curve[-1] == pytest.approx(100 * np.mean(finals))


def test_the_mean_of_a_difference_is_filled_only_where_it_is_shown(study: Finished) -> None:
    figure = draw_differences(study, compare_all(study, "dice"))
    assert figure is not None
    faces = [
        [to_hex(line.get_markerfacecolor()) for line in axis.lines if line.get_marker() == "o"] for axis in figure.axes
    ]
    blue = arm_styles(study)["a3c"].colour
    assert faces == [["#ffffff", blue, blue], ["#ffffff"] * 3]  # three seeds are a hint
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["random masks", "against from scratch", "A3C", "against from scratch", "against random masks"]


def test_many_fractions_take_rows_that_each_name_their_arms(tmp_path: Path) -> None:
    seeds = {str(fraction): [0, 1, 2] for fraction in (0.1, 0.2, 0.3, 0.4, 0.5)}
    study = read_finished(planted_study(tmp_path, seeds=seeds, gain=lambda arm, _, seed: 0.01 * seed * (arm == "a3c")))
    figure = draw_differences(study, compare_all(study, "dice"))
    assert figure is not None and figure.get_supxlabel() == "difference in Dice (points)"
    figure.canvas.draw()
    places = [axis.get_window_extent() for axis in figure.axes]
    assert len(places) == 5 and places[4].y1 < places[0].y0 and places[4].x0 == pytest.approx(places[0].x0)
    assert "A3C" in [label.get_text() for label in figure.axes[4].get_yticklabels()]


def test_the_bar_of_a_difference_is_its_interval_in_points(study: Finished) -> None:
    comparisons = compare_all(study, "dice")
    figure = draw_differences(study, comparisons)
    assert figure is not None
    bars = [line.get_xdata() for line in figure.axes[0].lines if line.get_linewidth() == 1.6]
    intervals = [one.interval for one in comparisons if one.fraction == 0.25]
    assert bars == [pytest.approx([100 * interval.low, 100 * interval.high]) for interval in intervals]


def test_baselines_are_grey_and_no_two_arms_look_alike(tmp_path: Path) -> None:
    learned = {
        f"arm{n}": {"title": f"arm {n}", "pretrain": {}, "compare_with": ["scratch", "random"]} for n in range(12)
    }
    study = read_finished(write_settings(tmp_path, arms=ARMS | learned, seeds=SEEDS))
    styles = arm_styles(study)
    looks = [(style.colour, style.marker, str(style.line)) for style in styles.values()]
    assert len(set(looks)) == len(looks)
    assert [len(set(styles[name].colour[i : i + 2] for i in (1, 3, 5))) for name in ("scratch", "random")] == [1, 1]


def test_labels_keep_their_order_and_a_distance() -> None:
    places = _apart([0.1, 0.5, 0.5, 0.51, 0.99, 1.0], gap=0.1, low=0.0, high=1.0)
    assert (np.diff(places) >= 0.1 - 1e-9).all() and places[0] == pytest.approx(0.1)
    assert places[0] >= 0.0 and places[-1] <= 1.0 + 1e-9


def test_mask_maps_show_first_and_last_epoch_of_every_arm_that_has_maps(study: Finished, tmp_path: Path) -> None:
    folder = write_settings(tmp_path, seeds=SEEDS)
    for epoch in (5, 10, 15, 20, 25, 30):
        last = write_maps(folder, "a3c", epoch)
    write_maps(folder, "random", 10, policy=False, seed=1)
    figure = draw_mask_maps(read_finished(folder))
    assert figure is not None
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [
        "epoch 10",
        "share hidden,\nepoch 10",
        *[f"epoch {n}" for n in (5, 15, 20, 30)],
        "share hidden,\nepoch 30",
    ]
    shares = [axis.images[0].get_array() for axis in figure.axes if "share" in axis.get_title()]
    assert np.allclose(shares[1], np.load(last)["mask"].mean(0))


def test_nothing_finished_draws_nothing(tmp_path: Path) -> None:
    study = read_finished(write_settings(tmp_path, seeds=SEEDS))
    differences = draw_differences(study, compare_all(study, "dice"))
    assert [draw_label_fractions(study), draw_learning_curves(study), differences] == [None] * 3 and draw_mask_maps(
        study
    ) is None


def test_figures_are_files_of_their_width_and_leave_matplotlib_as_it_was(study: Finished, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure = draw_label_fractions(study)
    assert figure is not None
    png, pdf = save_figure(figure, tmp_path, "one")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
    assert dict(matplotlib.rcParams) == before
