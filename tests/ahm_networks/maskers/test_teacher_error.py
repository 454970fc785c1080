# SPDX-License-Identifier: Apache-2.0
"""Masks from the errors of an averaged teacher, with networks whose errors are known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ahm_engines.losses import MaskedLoss
from ahm_networks import CurriculumMasker, ReconstructionUNet
from ahm_networks.maskers import TeacherErrorMasker
from ahm_transforms.masking.functional import cell_count, cells_to_image, image_to_cells

PATCH = 4
GRID = {2: (3, 4), 3: (3, 2, 2)}  # 12 cells in both
SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}

two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


class Level(nn.Module):
    """Predicts one learned number everywhere and keeps the masks and the mode that it was asked in."""

    def __init__(self, level: float = 0.0) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))
        self.norm = nn.BatchNorm1d(1)
        self.masks: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        self.masks.append(mask)
        self.modes.append(self.training)
        return self.level.expand_as(image)


def steps_image(dims: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Every cell has an intensity of its own, a multiple of 1/12 below 1, in another order for every image."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(batch)])
    level = order.view(batch, 1, *GRID[dims]) / 12
    return cells_to_image(level, PATCH, [side * PATCH for side in GRID[dims]]), level


def masker_of(dims: int = 2, ratio: float = 0.25, level: float = 0.0, **options: object) -> TeacherErrorMasker:
    return TeacherErrorMasker(dims, PATCH, ratio, network=Level(level), **options)


def judged_cells(masker: TeacherErrorMasker) -> list[Tensor]:
    """The cells hidden in each of the teacher's passes, as 0 and 1."""
    return [image_to_cells(mask.float(), PATCH) for mask in masker.teacher.masks]


def level_of(masker: TeacherErrorMasker) -> float:
    return float(masker.teacher.level)


def levels_over(masker: TeacherErrorMasker, steps: int) -> list[float]:
    """The teacher's level after each of so many training calls."""
    image, levels = steps_image(2)[0], []
    for _ in range(steps):
        masker(image)
        levels.append(level_of(masker))
    return levels


class TestChoice:
    @two_and_three_d
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_the_largest_errors_are_hidden_whatever_the_split(self, dims: int, training: bool) -> None:
        image, level = steps_image(dims)
        masker = masker_of(dims).train(training)
        for _ in range(5):
            decision = masker(image)
            assert torch.equal(
                decision.cells, level > 8.5 / 12
            )  # 3 of 12: the network predicts 0, the error is the level
            assert torch.allclose(decision.policy_map, level * 12 / 11)

    @two_and_three_d
    def test_the_policy_map_ranks_allowed_cells_only(self, dims: int) -> None:
        image, level = steps_image(dims)
        dark = level < 5.5 / 12
        decision = masker_of(dims, 0.5)(image, foreground=cells_to_image(dark, PATCH, image.shape[2:]))
        assert torch.allclose(decision.policy_map, torch.where(dark, level * 12 / 5, 0.0))
        assert torch.equal(decision.cells, dark & (level > 2.5 / 12))

    def test_the_teacher_judges_not_the_student(self) -> None:
        image, level = steps_image(2)
        masker = masker_of(level=0.0).eval()
        nn.init.ones_(masker.student.network.level)  # to it the darkest cells would be hardest
        assert torch.equal(masker(image).cells, level > 8.5 / 12)

    def test_error_is_measured_as_it_is_told(self) -> None:
        image, level = steps_image(2)
        bright_is_easy = masker_of(error=lambda pred, image: 1.0 - image)
        assert torch.equal(bright_is_easy(image).cells, level < 2.5 / 12)

    def test_normalised_targets_are_judged_as_they_are_trained(self) -> None:
        """A flat bright cell is hard in intensities, and easy once every patch is normalised."""
        image = torch.zeros(1, 1, 8, 8)
        image[..., :4, :4] = 0.9
        image[..., 4:, 4:] = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * 0.2
        flat, textured = (0, 0, 0, 0), (0, 0, 1, 1)
        assert masker_of()(image).cells[flat]
        normalised = masker_of(error=MaskedLoss("l2", patch_size=PATCH).error)
        assert normalised(image).cells[textured]

    def test_only_hidden_cells_are_judged(self) -> None:
        """An error in what the teacher was shown must not count."""
        image, level = steps_image(2)
        masker = masker_of()
        shown_is_wrong = lambda pred, image: torch.where(masker.teacher.masks[-1], image, 5.0 - 5.0 * image)  # noqa: E731
        masker.error = shown_is_wrong
        assert torch.equal(masker(image).cells, level > 8.5 / 12)


class TestPasses:
    @two_and_three_d
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_two_passes_hide_every_cell_once(self, dims: int, training: bool) -> None:
        masker = masker_of(dims).train(training)
        masker(steps_image(dims, batch=4)[0])
        first, second = judged_cells(masker)
        assert torch.equal(first + second, torch.ones(4, 1, *GRID[dims]))
        assert (first.flatten(1).sum(1) == 6).all()  # as many in every image: an MAE asks for it

    def test_two_passes_hide_every_allowed_cell_once(self) -> None:
        image, level = steps_image(2)
        allowed = level < torch.tensor([8.5, 4.5]).view(2, 1, 1, 1) / 12  # 9 and 5 cells
        masker = masker_of()
        masker(image, foreground=cells_to_image(allowed, PATCH, image.shape[2:]))
        first, second = judged_cells(masker)
        assert torch.equal(first + second, allowed.float())
        assert first.flatten(1).sum(1).tolist() == [5, 3]

    def test_splits_are_drawn_anew_in_training_and_fixed_in_eval(self) -> None:
        masker, image = masker_of(), steps_image(2, batch=8)[0]
        for _ in range(2):
            masker(image)
        first, _, again, _ = judged_cells(masker)
        assert not torch.equal(first, again)
        assert not torch.equal(first[0], first[1])
        masker.eval().teacher.masks.clear()
        state = masker.get_extra_state().clone()
        for seed in (1, 2):
            masker.set_random_state(seed)(image)
        first, _, again, _ = judged_cells(masker)
        assert torch.equal(first, again)
        assert (first == first[0]).all()
        masker.set_extra_state(state)
        masker(image)
        assert torch.equal(masker.get_extra_state(), state)  # no random number was drawn

    @two_and_three_d
    def test_one_pass_judges_the_mask_ratio_only(self, dims: int) -> None:
        image, level = steps_image(dims)
        masker = masker_of(dims, 0.75, passes=1)
        decision = masker(image, mask_ratio=0.25)
        (judged,) = judged_cells(masker)
        assert (judged.flatten(1).sum(1) == 9).all()
        among_judged = torch.where(judged > 0, level, -1.0).flatten(1)
        expected = torch.zeros_like(among_judged).scatter(1, among_judged.topk(3).indices, 1.0)
        assert torch.equal(decision.cells.flatten(1).float(), expected)
        assert not decision.policy_map[judged == 0].any()

    def test_one_pass_hides_all_it_judged_before_others_at_random(self) -> None:
        image, _ = steps_image(2, batch=1)
        masker = masker_of(2, 0.5, passes=1)
        others = torch.zeros(1, 1, *GRID[2])
        for _ in range(60):
            cells = masker(image, mask_ratio=0.75).cells
            judged = judged_cells(masker)[-1] > 0
            assert (cells | ~judged).all()
            assert cells.sum() == 9
            others += cells & ~judged
        assert (others > 0).all()

    def test_one_pass_is_for_training_only(self) -> None:
        image, level = steps_image(2)
        masker = masker_of(2, 0.25, passes=1).eval()
        assert torch.equal(masker(image).cells, level > 8.5 / 12)
        assert len(masker.teacher.masks) == 2

    def test_nothing_is_rebuilt_at_ratio_zero_but_the_teacher_moves(self) -> None:
        masker = masker_of()
        decision = masker(steps_image(2)[0], mask_ratio=0.0)
        assert not decision.cells.any() and not decision.policy_map.any()
        assert masker.teacher.masks == []
        assert masker.updates == 1

    def test_in_a_curriculum_the_share_is_hard_and_the_rest_random(self) -> None:
        image, level = steps_image(2)
        masker = CurriculumMasker(masker_of(ratio=0.5), policy_share=(0.0, 0.5), warm_up=0.2)
        masker.set_progress(0.1)
        masker(image)
        assert masker.masker.teacher.masks == []  # warm-up: no pass
        masker.set_progress(1.0)
        drawn = torch.stack([masker(image).cells for _ in range(30)])
        assert (drawn.flatten(2).sum(2) == 6).all()
        assert drawn[:, level > 8.5 / 12].all()
        assert drawn.any(0).all()


class TestTeacher:
    def test_at_the_first_call_it_is_the_student(self) -> None:
        masker = masker_of(level=0.3)
        masker(steps_image(2)[0])
        assert level_of(masker) == pytest.approx(0.3)

    def test_moves_by_hand(self) -> None:
        """The student stands at 1; with a decay of 0.5, the first shares are 9/10, 9/11, 9/12 by the start-up rule."""
        masker = masker_of(decay=(0.5, 0.5))
        nn.init.ones_(masker.student.network.level)
        seen = levels_over(masker, steps=3)
        assert seen == pytest.approx([0.9, 1 - 0.1 * 2 / 11, 1 - 0.1 * 2 / 11 * 3 / 12])
        masker.updates.fill_(1000)
        nn.init.zeros_(masker.teacher.level)
        seen = levels_over(masker, steps=3)
        assert seen == pytest.approx([0.5, 0.75, 0.875])

    @pytest.mark.parametrize(("progress", "decay"), [(0.0, 0.8), (0.125, 0.85), (0.25, 0.9), (1.0, 0.9)])
    def test_decay_rises_over_the_first_quarter(self, progress: float, decay: float) -> None:
        masker, image = masker_of(decay=(0.8, 0.9)), steps_image(2)[0]
        masker.set_progress(progress)
        masker.updates.fill_(1000)
        assert float(masker.diagnostics(masker.eval()(image))["teacher_decay"]) == pytest.approx(decay)
        nn.init.ones_(masker.student.network.level)
        masker.train()(image)
        assert level_of(masker) == pytest.approx(1 - decay)

    def test_default_decays_are_those_of_anatomask(self) -> None:
        masker = masker_of()
        decision = masker(steps_image(2)[0])
        masker.updates.fill_(1e6)
        found = []
        for progress in (0.0, 0.25):
            masker.set_progress(progress)
            found.append(float(masker.diagnostics(decision)["teacher_decay"]))
        assert found == pytest.approx([0.999, 0.9999], abs=1e-6)

    def test_running_statistics_are_averaged_and_counts_copied(self) -> None:
        masker = masker_of()
        student = masker.student.network
        student.norm.running_mean.fill_(1.0)
        student.norm.num_batches_tracked.fill_(7)
        masker.move_teacher()
        assert float(masker.teacher.norm.running_mean) == pytest.approx(0.9)
        assert int(masker.teacher.norm.num_batches_tracked) == 7
        assert float(student.norm.running_mean) == 1.0

    def test_it_does_not_move_in_eval(self) -> None:
        masker = masker_of().eval()
        nn.init.ones_(masker.student.network.level)
        masker(steps_image(2)[0])
        assert level_of(masker) == 0.0
        assert masker.updates == 0

    def test_it_is_always_in_eval_mode_and_the_student_is_never_asked(self) -> None:
        masker = masker_of().train()
        masker(steps_image(2)[0])
        masker.eval().train()(steps_image(2)[0])
        assert masker.training and not any(masker.teacher.modes)
        assert masker.student.network.masks == []
        assert masker.student.network.training

    def test_nothing_wants_a_gradient(self) -> None:
        network = ReconstructionUNet(2, backbone_args=SMALL)
        masker, image = TeacherErrorMasker(2, PATCH, network=network), steps_image(2)[0]
        decision = masker(image)
        assert not any(weight.requires_grad for weight in masker.parameters())
        assert not decision.policy_map.requires_grad
        assert masker.loss([(decision, image)]) is None
        assert all(weight.requires_grad for weight in network.parameters())

    def test_the_state_holds_the_teacher_and_not_the_student(self) -> None:
        masker, image = masker_of(), steps_image(2)[0]
        nn.init.ones_(masker.student.network.level)
        masker(image)
        state = masker.state_dict()
        assert {name.split(".")[0] for name in state} == {"teacher", "updates", "_extra_state"}
        resumed = masker_of()
        resumed.load_state_dict(state)
        assert level_of(resumed) == pytest.approx(0.9)
        nn.init.ones_(resumed.student.network.level)
        for one in (masker, resumed):
            one(image)
        assert level_of(resumed) == level_of(masker)

    def test_copies_follow_the_same_student_with_a_teacher_of_their_own(self) -> None:
        masker, image = masker_of(), steps_image(2)[0]
        other = copy.deepcopy(masker)
        nn.init.ones_(masker.student.network.level)
        other(image)
        assert (level_of(masker), level_of(other)) == (0.0, pytest.approx(0.9))

    @two_and_three_d
    @pytest.mark.parametrize(("amp_dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
    def test_precision_of_its_passes(self, dims: int, amp_dtype: torch.dtype | None, expected: torch.dtype) -> None:
        network = ReconstructionUNet(dims, backbone_args=SMALL)
        masker = TeacherErrorMasker(dims, PATCH, network=network, amp_dtype=amp_dtype)
        seen: list[torch.dtype] = []
        masker.teacher.register_forward_hook(lambda module, args, pred: seen.append(pred.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            decision = masker(steps_image(dims)[0])
        assert seen == [expected] * 2
        assert decision.policy_map.dtype == torch.float32

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @two_and_three_d
    def test_on_the_gpu(self, dims: int) -> None:
        masker = masker_of(dims)
        expected, image = masker(steps_image(dims)[0]), steps_image(dims)[0].cuda()
        masker.student.network.cuda()
        decision = masker.cuda()(image)
        assert decision.mask.device.type == masker.teacher.level.device.type == "cuda"
        assert torch.equal(decision.cells.cpu(), expected.cells)


@two_and_three_d
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_with_a_u_net_on_images_of_any_size(dims: int, ratio: float) -> None:
    image = torch.rand(2, 2, *(17, 13, 11)[:dims])
    network = ReconstructionUNet(dims, 2, backbone_args=SMALL)
    masker = TeacherErrorMasker(dims, PATCH, ratio, network=network, in_channels=2)
    cells = masker(image).cells.flatten(1)
    assert (cells.sum(1) == cell_count(ratio, cells.shape[1])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": (0.9, 1.1)}, r"decay: expected two numbers in \[0, 1\], got \(0.9, 1.1\)"),
        ({"decay": 0.9}, r"decay: expected two numbers in \[0, 1\], got 0.9"),
        ({"decay": (-0.1, 0.9)}, r"decay: expected two numbers in \[0, 1\], got \(-0.1, 0.9\)"),
        ({"passes": 0}, "passes: expected 1 or 2, got 0"),
        ({"passes": 3}, "passes: expected 1 or 2, got 3"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masker_of(**options)
