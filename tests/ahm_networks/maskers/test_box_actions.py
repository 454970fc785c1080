# SPDX-License-Identifier: Apache-2.0
"""Boxes of cells as actions, and the grid in which they are placed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ahm_networks.maskers.box_actions import BoxActions, box_actions, box_sizes
from ahm_networks.maskers.box_environment import BoxEnvironment

CPU = torch.device("cpu")
GRIDS = [
    ((4, 5), ((1, 1), (2, 2), (1, 3))),
    ((3, 2, 4), ((1, 1, 1), (2, 1, 3), (4, 1, 1))),  # the last size does not fit
]
every_grid = pytest.mark.parametrize(("grid", "sizes"), GRIDS, ids=["2d", "3d"])


def cells_by_hand(boxes: BoxActions, number: int) -> Tensor | None:
    """Cells of a box, one by one; ``None`` where it reaches beyond the grid."""
    size_number, first = divmod(number, torch.Size(boxes.grid).numel())
    size = boxes.sizes[size_number]
    start = [int(s) for s in torch.unravel_index(torch.tensor(first), boxes.grid)]
    if any(s + n > g for s, n, g in zip(start, size, boxes.grid, strict=True)):
        return None
    cells = torch.zeros(boxes.grid, dtype=torch.bool)
    for cell in itertools.product(*[range(s, s + n) for s, n in zip(start, size, strict=True)]):
        cells[cell] = True
    return cells.flatten()


@every_grid
class TestBoxActions:
    def test_cells_and_validity_agree_with_enumeration(self, grid: tuple[int, ...], sizes) -> None:
        boxes = box_actions(sizes, grid, CPU)
        generator = torch.Generator().manual_seed(0)
        free = torch.rand(5, torch.Size(grid).numel(), generator=generator) < 0.4
        left = torch.tensor([0, 1, 2, 3, 99])
        valid = boxes.valid(free, left)
        assert valid.shape == (5, boxes.number)
        for number in range(boxes.number):
            cells = cells_by_hand(boxes, number)
            if cells is None:
                assert not valid[:, number].any()
                continue
            assert torch.equal(boxes.cells(torch.tensor([number]))[0], cells)
            new = (cells & free).sum(1)
            assert torch.equal(valid[:, number], (new > 0) & (new <= left))

    def test_each_image_has_its_own_box(self, grid: tuple[int, ...], sizes) -> None:
        boxes = box_actions(sizes, grid, CPU)
        numbers = torch.arange(boxes.number)[boxes.valid(torch.ones(1, boxes.number // len(sizes)).bool(), left(99))[0]]
        for cells, number in zip(boxes.cells(numbers), numbers.tolist(), strict=True):
            assert torch.equal(cells, cells_by_hand(boxes, number))

    def test_the_number_after_the_last_box_hides_nothing(self, grid: tuple[int, ...], sizes) -> None:
        boxes = box_actions(sizes, grid, CPU)
        assert not boxes.cells(torch.tensor([boxes.number])).any()

    def test_cell_map_is_the_best_eligible_box_that_covers_a_cell(self, grid: tuple[int, ...], sizes) -> None:
        boxes = box_actions(sizes, grid, CPU)
        generator = torch.Generator().manual_seed(1)
        number = torch.Size(grid).numel()
        scores = torch.randn(4, boxes.number, generator=generator)
        allowed = torch.rand(4, number, generator=generator) < 0.8
        eligible = boxes.valid(allowed, left(9)) & (torch.rand(scores.shape, generator=generator) < 0.3)
        covers = [(n, cells_by_hand(boxes, n)) for n in range(boxes.number)]
        for row in range(4):
            best = torch.full((number,), float("-inf"))
            for n, cells in covers:
                if eligible[row, n]:
                    best = torch.where(cells, torch.maximum(best, scores[row, n]), best)
            known = torch.isfinite(best) & allowed[row]
            low, high = best[known].min(), best[known].max()
            expected = torch.where(known, (best - low) / (high - low), 0.0)
            torch.testing.assert_close(boxes.cell_map(scores, eligible, allowed)[row], expected)


def left(*cells: int) -> Tensor:
    return torch.tensor(cells)


def test_cell_map_of_equal_scores_and_of_no_box() -> None:
    boxes = box_actions(((1, 1),), (1, 3), CPU)
    eligible = torch.tensor([[True, True, False], [False, False, False]])
    found = boxes.cell_map(torch.ones(2, 3), eligible, torch.ones(2, 3, dtype=torch.bool))
    assert found.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


class TestSizes:
    def test_one_number_serves_all_axes(self) -> None:
        assert box_sizes((1, (2, 3)), 2) == ((1, 1), (2, 3))

    @pytest.mark.parametrize("sizes", [(), (0,), ((2, -1),)])
    def test_sizes_below_one_cell(self, sizes) -> None:
        with pytest.raises(ValueError, match="sizes: expected boxes of at least 1 cell"):
            box_sizes(sizes, 2)

    def test_sizes_of_another_dimension(self) -> None:
        with pytest.raises(ValueError, match="sizes: expected each to be 1 or 3 numbers"):
            box_sizes((1, (2, 2)), 3)

    def test_no_size_fits(self) -> None:
        with pytest.raises(ValueError, match=r"sizes: expected a box .* grid of \(2, 3\) cells, got \(\(3, 1\)"):
            box_actions(((3, 1), (1, 4)), (2, 3), CPU)


class TestEnvironment:
    def episode(self, *, stop: bool = False, budget: int | Tensor = 4) -> BoxEnvironment:
        """Three by three cells, of which the last row is forbidden; boxes of one cell, 0 to 8, and of two by two."""
        free = torch.tensor([[True] * 6 + [False] * 3])
        boxes = box_actions(((1, 1), (2, 2)), (3, 3), CPU)
        return BoxEnvironment(boxes, free, budget, steps=4, stop=stop)

    def test_boxes_overlap_without_counting_twice(self) -> None:
        environment = self.episode(budget=5)
        live, new = environment.step(torch.tensor([9]))  # cells 0, 1, 3, 4
        assert live.item()
        assert new[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
        assert environment.valid[0].nonzero().flatten().tolist() == [2, 5, 9 + 4]  # one cell is left of the budget
        live, new = environment.step(torch.tensor([13]))  # cells 4, 5, 7, 8: only 5 is new and allowed
        assert new[0].nonzero().flatten().tolist() == [5]
        assert not environment.valid.any()
        assert environment.hidden[0].nonzero().flatten().tolist() == [0, 1, 3, 4, 5]

    def test_what_is_asked_of_a_finished_episode_does_nothing(self) -> None:
        environment = self.episode(budget=1)
        environment.step(torch.tensor([0]))
        live, new = environment.step(torch.tensor([1]))
        assert not live.item()
        assert not new.any()
        assert environment.hidden.sum() == 1

    def test_stop_ends_an_episode_after_its_first_box(self) -> None:
        environment = self.episode(stop=True)
        stop = environment.actions - 1
        assert not environment.valid[0, stop]
        environment.step(torch.tensor([0]))
        assert environment.valid[0, stop]
        live, new = environment.step(torch.tensor([stop]))
        assert live.item()  # stopping is a step
        assert not new.any()
        assert not environment.valid.any()

    def test_stopping_is_no_way_out_once_nothing_is_left(self) -> None:
        environment = self.episode(stop=True, budget=1)
        environment.step(torch.tensor([0]))
        assert not environment.valid.any()

    def test_states_by_hand(self) -> None:
        environment = self.episode(budget=torch.tensor([3]))
        first = environment.observe()
        environment.step(torch.tensor([2]))
        second = environment.observe()
        assert not first.hidden.any()
        assert second.hidden[0, 0].nonzero().flatten().tolist() == [2]
        torch.testing.assert_close(first.numbers, torch.tensor([[[0.0, 3 / 9]]]))  # step 0 of 4, 3 of 9 cells left
        torch.testing.assert_close(second.numbers, torch.tensor([[[1 / 4, 2 / 9]]]))
