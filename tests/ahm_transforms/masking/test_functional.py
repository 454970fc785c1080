# SPDX-License-Identifier: Apache-2.0
"""The mask maths against values counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ahm_transforms.masking import (
    boxes_to_mask,
    cell_count,
    cells_to_image,
    check_mask_ratio,
    choose_cells,
    grid_shape,
    hidden_fraction,
    image_to_cells,
    patch_shape,
)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), "75%", "0.5", None])
def test_ratio_outside_the_open_interval_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio: expected a number between 0 and 1"):
        check_mask_ratio(ratio)


def test_error_names_the_argument_it_is_told():
    with pytest.raises(ValueError, match=r"^policy_share:"):
        check_mask_ratio(2.0, "policy_share")
    with pytest.raises(ValueError, match=r"^box_size:"):
        patch_shape(0, 2, name="box_size")


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [((32, 32), 8, (4, 4)), ((33, 32), 8, (5, 4)), ((10, 7, 5), (4, 7, 2), (3, 1, 3)), ((5,), 2, (3,))],
)
def test_grid_counts_partial_cells(size, patch, grid):
    assert grid_shape(size, patch) == grid


def test_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"expected at most the image size \(8, 32\), got \(16, 16\)"):
        grid_shape((8, 32), 16)


@pytest.mark.parametrize("size", [0, 8.5, (8, 4.5)])
def test_sizes_that_are_no_whole_voxels_are_refused(size):
    with pytest.raises(ValueError, match="patch_size: expected sizes of at least 1 voxel, in whole voxels"):
        patch_shape(size, 2)


def test_whole_sizes_of_any_type_are_taken():
    assert patch_shape((np.int64(8), 4.0), 2) == (8, 4)


def test_wrong_number_of_patch_sizes_is_refused():
    with pytest.raises(ValueError, match="expected 1 or 3 sizes"):
        grid_shape((32, 32, 32), (8, 8))


def test_cell_count_rounds_half_up_for_numbers_and_tensors():
    assert [cell_count(0.5, n) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert cell_count(0.75, torch.tensor([27, 10])).tolist() == [20, 8]


def test_cell_count_of_a_tensor_is_that_of_its_numbers():
    """In single precision 0.7 of 45 is 32, in double 31."""
    for ratio in (0.05, 0.55, 0.6, 0.7, 0.75, 0.9):
        numbers = range(2000)
        assert cell_count(ratio, torch.tensor(numbers)).tolist() == [cell_count(ratio, n) for n in numbers]


def test_cells_cover_their_voxels_and_partial_border_cells():
    cells = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 2, 2)
    image = cells_to_image(cells, (2, 3), (3, 4))
    assert image[0, 0].tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


def test_cells_to_image_3d_keeps_batch_channels_and_dtype():
    cells = torch.arange(2 * 3 * 2 * 2 * 3, dtype=torch.int16).view(2, 3, 2, 2, 3)
    image = cells_to_image(cells, (2, 4, 1), (3, 5, 3))
    assert image.shape == (2, 3, 3, 5, 3)
    assert image.dtype == torch.int16
    for z, y, x in [(0, 0, 0), (1, 3, 1), (2, 4, 2), (2, 0, 1)]:
        assert torch.equal(image[..., z, y, x], cells[..., z // 2, y // 4, x])


def test_cells_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"expected a grid of \(2, 2\)"):
        cells_to_image(torch.zeros(1, 1, 3, 2), 4, (8, 8))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", [[2.5, 4.5], [7.5, 9.0]]), ("max", [[5.0, 6.0], [8.0, 9.0]])],
)
def test_reductions_count_only_the_voxels_a_cell_has(reduction, expected):
    image = torch.tensor([[1.0, 2.0, 3.0], [2.0, 5.0, 6.0], [7.0, 8.0, 9.0]]).view(1, 1, 3, 3)
    assert image_to_cells(image, 2, reduction=reduction)[0, 0].tolist() == expected


def test_max_of_negative_values_is_not_disturbed_by_padding():
    assert image_to_cells(torch.full((1, 1, 3, 3), -2.0), 2, reduction="max").eq(-2).all()


def test_reduction_3d_with_channels_agrees_with_slices():
    image = torch.rand(2, 3, 5, 4, 7, generator=torch.Generator().manual_seed(0))
    cells = image_to_cells(image, (2, 4, 3))
    assert cells.shape == (2, 3, 3, 1, 3)
    torch.testing.assert_close(cells[..., 2, 0, 2], image[:, :, 4:, :, 6:].mean((2, 3, 4)))
    torch.testing.assert_close(cells[..., 1, 0, 1], image[:, :, 2:4, :, 3:6].mean((2, 3, 4)))


def test_half_precision_sums_do_not_overflow():
    image = torch.full((1, 1, 16, 16), 3000.0, dtype=torch.float16)
    assert image_to_cells(image, 16).item() == 3000.0


def test_reductions_pass_gradients():
    image = torch.ones(1, 1, 3, 3, requires_grad=True)
    image_to_cells(image, 2).sum().backward()
    assert image.grad[0, 0].tolist() == [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.5, 0.5, 1.0]]


@pytest.mark.parametrize("axes", [0, 4])
def test_reductions_of_other_axes_are_refused(axes):
    with pytest.raises(ValueError, match=r"image: expected .* with 1 to 3 spatial axes"):
        image_to_cells(torch.zeros(1, 1, *[4] * axes), 2)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="expected 'mean' or 'max', got 'median'"):
        image_to_cells(torch.ones(1, 1, 4, 4), 2, reduction="median")


SCORES = torch.tensor([[[0.1, 0.9], [0.5, 0.7]], [[4.0, 3.0], [2.0, 1.0]]]).unsqueeze(1)


def test_the_highest_scores_are_chosen():
    hidden = choose_cells(SCORES, 2)
    assert hidden[0, 0].tolist() == [[False, True], [False, True]]
    assert hidden[1, 0].tolist() == [[True, True], [False, False]]


def test_each_image_may_have_its_own_count():
    hidden = choose_cells(SCORES, torch.tensor([3, 0]))
    assert hidden[0, 0].tolist() == [[False, True], [True, True]]
    assert not hidden[1].any()


@pytest.mark.parametrize("count", [0, 1, 7, 27])
def test_count_is_exact_even_with_equal_scores(count):
    scores = torch.zeros(3, 1, 3, 3, 3)
    assert choose_cells(scores, count).flatten(1).sum(1).tolist() == [count] * 3
    assert choose_cells(scores, torch.tensor([count] * 3)).flatten(1).sum(1).tolist() == [count] * 3


def test_only_allowed_cells_are_chosen():
    allowed = torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]]).unsqueeze(1)
    hidden = choose_cells(SCORES, 1, allowed=allowed)
    assert hidden[0, 0].tolist() == [[False, False], [True, False]]
    assert hidden[1, 0].tolist() == [[False, True], [False, False]]


def test_asking_for_more_than_allowed():
    allowed = torch.tensor([[[True, False], [True, False]]] * 2).unsqueeze(1)
    with pytest.raises(ValueError, match="asked to hide 3 cells, but only 2 of 4 cells may be hidden"):
        choose_cells(SCORES, 3, allowed=allowed)
    assert torch.equal(choose_cells(SCORES, torch.tensor([3, 4]), allowed=allowed), allowed)


def test_random_scores_draw_every_cell_equally_often():
    scores = torch.rand(4000, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    often = choose_cells(scores, 3).float().mean(0)
    assert (often - 0.3).abs().max() < 0.04


def test_boxes_are_united_and_cut_at_the_border():
    start, size = torch.tensor([[[0, 0], [1, 2]]]), torch.tensor([[[2, 1], [9, 2]]])
    mask = boxes_to_mask(start, size, (3, 4))
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]


def test_boxes_3d_per_image_with_negative_start_and_empty_box():
    start = torch.tensor([[[-1, 0, 2]], [[0, 0, 0]]])
    size = torch.tensor([[[2, 3, 2]], [[0, 4, 4]]])
    mask = boxes_to_mask(start, size, (2, 3, 4))
    assert mask.shape == (2, 1, 2, 3, 4)
    assert mask[0, 0, 0].int().tolist() == [[0, 0, 1, 1]] * 3
    assert not mask[0, 0, 1].any()
    assert not mask[1].any()


def test_boxes_on_one_axis():
    assert boxes_to_mask(torch.tensor([[[1]]]), torch.tensor([[[2]]]), (4,)).tolist() == [[[False, True, True, False]]]


def test_hidden_fraction_of_all_and_within():
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]]).view(2, 1, 2, 2)
    within = torch.tensor([[True, False, True, False], [False, False, False, False]]).view(2, 1, 2, 2)
    assert hidden_fraction(mask).tolist() == [0.5, 0.25]
    assert hidden_fraction(mask, within).tolist() == [0.5, 0.0]
