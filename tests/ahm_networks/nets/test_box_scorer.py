# SPDX-License-Identifier: Apache-2.0
"""The network that scores boxes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ahm_networks.nets.box_scorer import BoxScorer, BoxState, box_sums
from ahm_networks.nets.policy import StridedFeatures

SIZES = {2: ((1, 1), (2, 2), (1, 3), (9, 1)), 3: ((1, 1, 1), (2, 2, 2), (1, 3, 2), (1, 1, 9))}  # the last never fits
PATCH = {2: (4, 3), 3: (4, 4, 2)}
SHAPE = {2: (17, 12), 3: (12, 11, 8)}  # images are padded
GRID = {2: (5, 4), 3: (3, 3, 4)}
both_dims = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def scorer(dims: int, **options: object) -> BoxScorer:
    torch.manual_seed(0)
    arguments = {"steps": 3} | options
    return BoxScorer(dims, StridedFeatures(dims, 1, PATCH[dims]), PATCH[dims], SIZES[dims], **arguments)


def state(dims: int, steps: int = 3, *, error: bool = False) -> BoxState:
    cells = torch.Size(GRID[dims]).numel()
    hidden = torch.rand(2, steps, cells) < 0.4
    return BoxState(hidden, torch.rand(2, steps, 2), torch.rand(2, steps, cells) if error else None)


def image(dims: int) -> Tensor:
    return torch.rand(2, 1, *SHAPE[dims])


@both_dims
def test_box_sums_agree_with_enumeration(dims: int) -> None:
    sizes, grid = SIZES[dims], GRID[dims]
    maps = torch.randn(2, len(sizes), *grid)
    found = box_sums(maps, sizes)
    for number, size in enumerate(sizes):
        for start in itertools.product(*[range(g) for g in grid]):
            inside = all(s + n <= g for s, n, g in zip(start, size, grid, strict=True))
            box = maps[(slice(None), number, *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]
            expected = box.flatten(1).sum(1) if inside else torch.zeros(2)
            torch.testing.assert_close(found[(slice(None), number, *start)], expected, atol=1e-5, rtol=1e-5)


@both_dims
class TestBoxScorer:
    def test_shapes(self, dims: int) -> None:
        boxes = len(SIZES[dims]) * torch.Size(GRID[dims]).numel()
        for stop, value in itertools.product((False, True), repeat=2):
            net = scorer(dims, stop=stop, with_value=value)
            scores, of_state = net(net.look(image(dims)), state(dims))
            assert scores.shape == (2, 3, boxes + stop)
            assert (of_state is not None) == value
            assert of_state is None or of_state.shape == (2, 3)

    def test_steps_do_not_see_each_other(self, dims: int) -> None:
        net, steps = scorer(dims, with_error=True, stop=True), state(dims, error=True)
        looked = net.look(image(dims))
        scores, value = net(looked, steps)
        for t in range(3):
            alone, value_alone = net(looked, BoxState(*(part[:, t : t + 1] for part in steps)))
            torch.testing.assert_close(alone, scores[:, t : t + 1])
            torch.testing.assert_close(value_alone, value[:, t : t + 1])
        torch.testing.assert_close(net(looked, steps.steps(1))[0], scores[:, 1:])

    def test_every_part_of_the_state_matters(self, dims: int) -> None:
        net, steps = scorer(dims, with_error=True), state(dims, error=True)
        looked = net.look(image(dims))
        before = net(looked, steps)[0]
        for changed in (
            steps._replace(hidden=~steps.hidden),
            steps._replace(numbers=steps.numbers + 1.0),
            steps._replace(error=steps.error + 1.0),
        ):
            assert not torch.allclose(net(looked, changed)[0], before)

    def test_a_single_step_has_no_state(self, dims: int) -> None:
        net = scorer(dims, steps=1)
        looked = net.look(image(dims))
        assert torch.equal(net(looked, state(dims, 1))[0], net(looked, state(dims, 1))[0])
        assert net.from_maps is None

    def test_float32_under_autocast(self, dims: int) -> None:
        net, picture, steps = scorer(dims), image(dims), state(dims)
        expected = net(net.look(picture), steps)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = net(net.look(picture), steps)[0]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_first_scores_are_almost_equal(self, dims: int) -> None:
        net = scorer(dims)
        assert net(net.look(image(dims)), state(dims))[0].abs().max() < 0.2


def test_a_box_scores_the_mean_of_its_cells() -> None:
    """Of one size, two by two: its score is the mean of what a box of one cell scores with the same weights."""
    torch.manual_seed(0)
    features = StridedFeatures(2, 1, (4, 4))
    wide = BoxScorer(2, features, (4, 4), ((2, 2),), steps=1)
    single = BoxScorer(2, features, (4, 4), ((1, 1),), steps=1)
    single.load_state_dict(wide.state_dict())
    nothing = BoxState(torch.zeros(1, 1, 12).bool(), torch.zeros(1, 1, 2))
    picture = torch.rand(1, 1, 12, 16)
    boxes, cells = (net(net.look(picture), nothing)[0].view(3, 4) for net in (wide, single))
    for row, column in itertools.product(range(2), range(3)):
        torch.testing.assert_close(boxes[row, column], cells[row : row + 2, column : column + 2].mean())
