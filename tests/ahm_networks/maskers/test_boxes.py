# SPDX-License-Identifier: Apache-2.0
"""Boxes of chosen place and size: what is hidden, what it earns, and what is learned from it."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahm_networks import ReconstructionUNet
from ahm_networks.maskers import BoxMasker, CurriculumMasker, QRegionMasker
from ahm_networks.maskers.box_feedback import BoxReward, ErrorSoFar
from ahm_networks.maskers.box_learner import BoxDecision
from ahm_transforms.masking.functional import image_to_cells

IMAGE = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))  # 8 x 8 cells of 4 x 4 voxels
ERROR = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(1))
RATIO = 0.3  # 19 of 64 cells
STEPS = 200  # of a training, where there is one
every_learner = pytest.mark.parametrize("learner", ["dqn", "actor_critic"])


def build(**options: object) -> BoxMasker:
    """Without the second task unless told otherwise: the losses below are those of the agent."""
    torch.manual_seed(0)
    return BoxMasker(2, 4, RATIO, **({"cell_weight": 0.0} | options))


def opinionated(**options: object) -> BoxMasker:
    """One whose scores are far apart, so that all that depends on them shows."""
    masker = build(**options)
    for parameter in masker.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return masker


@every_learner
class TestWhatIsHidden:
    @pytest.mark.parametrize("training", [True, False])
    def test_whole_boxes_within_the_budget(self, learner: str, training: bool) -> None:
        masker = opinionated(learner=learner, n_steps=6, sizes=(1, 2, (1, 4), 3)).train(training)
        foreground = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(2)) < 0.1
        for ratio in (0.05, 0.3, 0.9):
            decision = masker(IMAGE, mask_ratio=ratio, foreground=foreground)
            assert (decision.cells.flatten(1).sum(1) <= masker.count(ratio, (8, 8), decision.allowed)).all()
            self.check_boxes(decision, masker)

    def check_boxes(self, decision: BoxDecision, masker: BoxMasker) -> None:
        """Each step hides exactly what its box covers, is allowed and was not hidden yet."""
        for image in range(len(decision.cells)):
            free = decision.allowed[image, 0].clone()
            for step in range(masker.n_steps):
                size, first = divmod(int(decision.episode.actions[image, step]), 64)
                row, column = divmod(first, 8)
                height, width = masker.sizes[size]
                expected = torch.zeros(8, 8, dtype=torch.bool)
                if decision.episode.live[image, step]:
                    assert row + height <= 8
                    assert column + width <= 8
                    expected[row : row + height, column : column + width] = True
                    expected &= free
                    assert expected.any()
                assert torch.equal(decision.box_cells[image, step].view(8, 8), expected)
                free &= ~expected
            assert torch.equal(decision.cells[image, 0], decision.allowed[image, 0] & ~free)

    def test_episodes_go_on_while_a_box_fits(self, learner: str) -> None:
        masker = opinionated(learner=learner, n_steps=5, sizes=(2,))
        decision = masker(IMAGE, mask_ratio=0.2)  # 13 cells: after three boxes of four new ones, one is left
        for live in decision.episode.live:
            taken = int(live.sum())
            assert live.tolist() == [True] * taken + [False] * (5 - taken)
            assert taken >= 3  # one box hides at most four
        assert not decision.episode.valid[~decision.episode.live].any()

    def test_eval_takes_the_best_box_first(self, learner: str) -> None:
        masker = opinionated(learner=learner).eval()
        decision = masker(IMAGE)
        first = decision.box_cells[:, 0]
        assert torch.equal(decision.episode.actions[:, 0], decision.scores[:, 0].argmax(1))
        for chance, cells in zip(decision.policy_map.flatten(1), first, strict=True):
            assert (chance[cells] == 1.0).all()  # the cells of the best box are wanted most
            assert chance.min() == 0.0

    def test_the_map_is_there_before_anything_is_hidden(self, learner: str) -> None:
        """While masks are random the inner masker is asked for nothing, and panels still show what it would like."""
        decision = opinionated(learner=learner)(IMAGE, mask_ratio=0.0)
        assert not decision.cells.any()
        assert (decision.policy_map.flatten(1).amax(1) == 1.0).all()

    def test_stop_is_one_more_action(self, learner: str) -> None:
        masker = opinionated(learner=learner, stop=True, n_steps=6, sizes=(1,))
        with torch.no_grad():
            masker.scorer.stop.bias.fill_(1e3)
        decision = masker.eval()(IMAGE)
        assert (decision.cells.flatten(1).sum(1) == 1).all()  # a first box, then stop
        assert torch.equal(decision.episode.live.sum(1), torch.full((6,), 2))

    def test_the_image_is_looked_at_once(self, learner: str) -> None:
        masker, calls = build(learner=learner, n_steps=5), []
        masker.scorer.features.register_forward_hook(lambda *_: calls.append(1))
        masker(IMAGE)
        assert len(calls) == 1


class TestReward:
    def frozen(self, penalty: float, largest: int = 4, *, mean: float = 2.0, std: float = 0.5) -> BoxReward:
        reward = BoxReward(penalty, largest)
        reward.moments.decay = 1.0
        reward.moments.mean.fill_(mean)
        reward.moments.var.fill_(std**2)
        reward.moments.steps.fill_(1e12)
        return reward

    error = torch.tensor([[1.0, 3.0, 2.0, 9.0, 5.0]])
    boxes = torch.tensor([[[True, True, False, False, False], [False, False, False, True, False], [False] * 5]])

    @pytest.mark.parametrize(
        ("penalty", "expected"),
        [
            (0.0, [(2.0 + 6.0) / 4, 18.0 / 4, 0.0]),  # e / 0.5, summed, over 4 cells
            (1.0, [(-2.0 + 2.0) / 4, 14.0 / 4, 0.0]),  # (e - 2) / 0.5
            (0.5, [(0.0 + 4.0) / 4, 16.0 / 4, 0.0]),  # (e - 1) / 0.5
        ],
    )
    def test_by_hand(self, penalty: float, expected: list[float]) -> None:
        found = self.frozen(penalty)(self.error, self.boxes.any(1), self.boxes)
        torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)

    def test_moments_are_those_of_all_hidden_cells(self) -> None:
        """Also of cells that a curriculum added: here the last one. Mean of 1, 3, 9, 5 is 4.5, variance 8.75."""
        reward = BoxReward(1.0, 1)
        reward(self.error, torch.tensor([[True, True, False, True, True]]), self.boxes)
        assert float(reward.moments.mean) == pytest.approx(4.5)
        assert float(reward.moments.var) == pytest.approx(8.75)

    def test_the_penalty_makes_size_a_trade_off(self) -> None:
        """A large box of average cells against a small one of a hard cell: the area decides without a penalty."""
        error = torch.tensor([[2.0, 2.0, 2.0, 2.0, 4.0]])
        boxes = torch.tensor([[[True] * 4 + [False], [False] * 4 + [True]]])
        free, paid = (self.frozen(penalty)(error, boxes.any(1), boxes)[0] for penalty in (0.0, 1.0))
        assert free[0] > free[1]
        assert paid[1] > paid[0]

    def test_what_was_not_hidden_does_not_matter(self) -> None:
        wild = torch.where(self.boxes.any(1), self.error, 1e6)
        rewards = [BoxReward(1.0, 4)(error, self.boxes.any(1), self.boxes) for error in (self.error, wild)]
        torch.testing.assert_close(*rewards)

    def test_negative_rewards_are_rewards(self) -> None:
        """Learning progress may be negative: then boxes lose what they hide."""
        masker = build()
        loss = masker.loss([(masker(IMAGE), -ERROR)])
        loss.backward()
        assert torch.isfinite(loss)
        assert (self.frozen(0.0)(-self.error, self.boxes.any(1), self.boxes)[0, :2] < 0).all()


class TestQLearning:
    def loss_by_hand(self, masker: BoxMasker, decision: BoxDecision, double: bool) -> Tensor:
        """Image by image and step by step; targets come from the masker's target network."""
        error = image_to_cells(ERROR, 4).flatten(1)
        hidden = decision.cells.flatten(1)
        mean, std = error[hidden].mean(), error[hidden].std(correction=0)
        target_net = masker.learner.target
        steps, valid = decision.episode.actions.shape[1], decision.episode.valid
        advantage, value = target_net(target_net.look(IMAGE), decision.episode.state)
        losses = []
        for image, step in itertools.product(range(6), range(steps)):
            if not decision.episode.live[image, step]:
                continue
            reward = ((error[image] - mean) / std)[decision.box_cells[image, step]].sum() / 16
            y = reward
            if step + 1 < steps and valid[image, step + 1].any():
                row = valid[image, step + 1].nonzero().flatten()
                later = advantage[image, step + 1, row]
                later = value[image, step + 1] + later - later.mean()
                judge = decision.scores[image, step + 1, row] if double else later
                y = reward + 0.9 * later[judge.argmax()]
            q = decision.scores[image, step, decision.episode.actions[image, step]]
            losses.append(F.smooth_l1_loss(q, y.detach()))
        return torch.stack(losses).mean()

    @pytest.mark.parametrize("double", [True, False])
    def test_loss_by_hand(self, double: bool) -> None:
        masker = opinionated(double=double)  # the target network still has its first weights: the two differ
        decision = masker(IMAGE)
        expected = self.loss_by_hand(masker, decision, double)
        torch.testing.assert_close(masker.loss([(decision, ERROR)]), expected)

    def test_without_a_target_network_the_online_one_judges(self) -> None:
        masker = opinionated(target_decay=0.0)
        assert masker.learner.target is None
        decision = masker(IMAGE)
        masker.learner.target = masker.scorer  # for the computation by hand only
        expected = self.loss_by_hand(masker, decision, double=True)
        masker.learner.target = None
        torch.testing.assert_close(masker.loss([(decision, ERROR)]), expected)

    def test_the_target_network_follows_slowly_and_never_learns(self) -> None:
        masker = opinionated(target_decay=0.75)
        before = copy.deepcopy(masker.learner.target)
        masker.loss([(masker(IMAGE), ERROR)]).backward()
        for old, new, online in zip(
            before.parameters(), masker.learner.target.parameters(), masker.scorer.parameters(), strict=True
        ):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
            assert not new.requires_grad
            assert new.grad is None

    def test_evaluation_moves_nothing(self) -> None:
        masker = opinionated(replay=8).eval()
        before = copy.deepcopy(masker.learner.target.state_dict())
        masker.loss([(masker(IMAGE), ERROR)])
        assert all(torch.equal(before[key], value) for key, value in masker.learner.target.state_dict().items())
        assert len(masker.learner.replay) == 0

    def test_one_step_needs_no_target_network(self) -> None:
        assert build(n_steps=1).learner.target is None

    @pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.1, 0.55), (0.2, 0.1), (1.0, 0.1)])
    def test_epsilon_follows_its_schedule(self, progress: float, expected: float) -> None:
        masker = build(epsilon=(1.0, 0.1), explore=(0.0, 0.2))
        masker.set_progress(progress)
        assert float(masker.diagnostics(masker(IMAGE))["epsilon"]) == pytest.approx(expected)

    def test_exploring_and_not(self) -> None:
        """With epsilon 1 actions do not depend on the weights; with 0 they are the best ones."""
        for epsilon in (0.0, 1.0):
            masker = opinionated(epsilon=(epsilon, epsilon))
            decision = masker(IMAGE)
            greedy = torch.equal(decision.episode.actions, decision.scores.argmax(2))
            assert greedy == (epsilon == 0.0)

    def test_diagnostics_by_hand(self) -> None:
        masker = opinionated()
        decision = masker(IMAGE)
        found = masker.diagnostics(decision)
        valid = decision.episode.valid[:, 0]
        spread = torch.stack([q[v].std(correction=0) for q, v in zip(decision.scores[:, 0], valid, strict=True)]).mean()
        assert float(found["q_spread"]) == pytest.approx(float(spread.detach()), rel=1e-4)
        boxes = decision.box_cells.flatten(0, 1).sum(1)
        assert float(found["box_cells_mean"]) == pytest.approx(float(boxes[boxes > 0].float().mean()))


class TestReplay:
    def test_the_first_loss_is_the_fresh_one_alone(self) -> None:
        plain, replayed = build(), build(replay=8)
        assert torch.equal(replayed.loss([(replayed(IMAGE), ERROR)]), plain.loss([(plain(IMAGE), ERROR)]))
        assert len(replayed.learner.replay) == 6

    def test_then_old_episodes_count_as_much_as_new_ones(self) -> None:
        """Old and new are one and the same image here, with the rewards of their own time."""
        masker = build(replay=1, target_decay=0.0)
        single = IMAGE[:1].half().float()  # the replay keeps half precision
        first = masker(single)
        masker.loss([(first, ERROR[:1])])
        old = masker.learner.replay.sample(torch.zeros(1))
        second = masker(single)
        fresh = copy.deepcopy(masker)
        fresh.learner.replay = None
        expected_new = fresh.loss([(second, ERROR[1:2])])
        expected_old = fresh.learner._loss(first.episode, first.scores, old["rewards"])
        torch.testing.assert_close(masker.loss([(second, ERROR[1:2])]), (expected_new + expected_old) / 2)

    def test_old_episodes_bring_a_gradient(self) -> None:
        masker = build(replay=8, target_decay=0.0)
        masker.loss([(masker(IMAGE), ERROR)])
        nothing = masker(IMAGE, mask_ratio=0.0)  # nothing new to learn from
        masker.loss([(nothing, ERROR)]).backward()
        assert masker.scorer.from_image.weight.grad.any()

    def test_episodes_in_which_nothing_was_tried_are_not_kept(self) -> None:
        masker = build(replay=8)
        masker.loss([(masker(IMAGE, mask_ratio=0.0), ERROR)])
        assert len(masker.learner.replay) == 0

    def test_it_is_no_part_of_the_checkpoint_and_fills_again(self) -> None:
        masker, other = build(replay=8), build(replay=8)
        masker.loss([(masker(IMAGE), ERROR)])
        assert masker.state_dict().keys() == build().state_dict().keys()
        other.load_state_dict(masker.state_dict())
        other.loss([(other(IMAGE), ERROR)])
        assert len(other.learner.replay) == 6

    def test_images_of_another_size_are_refused(self) -> None:
        masker = build(replay=8)
        masker.loss([(masker(IMAGE), ERROR)])
        with pytest.raises(ValueError, match=r"replay: expected image of shape .* crop all images to one size"):
            masker.loss([(masker(IMAGE[..., :24]), ERROR[..., :24])])

    def test_errors_so_far_are_kept_too(self) -> None:
        masker = build(replay=8, network=ReconstructionUNet(2, backbone_args=SMALL))
        masker.loss([(masker(IMAGE), ERROR)])
        assert torch.isfinite(masker.loss([(masker(IMAGE), ERROR)]))
        assert "error" in masker.learner.replay.stored


SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}


class TestErrorSoFar:
    class Zeros(nn.Module):
        """Rebuilds nothing, and keeps what it was asked."""

        def __init__(self) -> None:
            super().__init__()
            self.masks: list[Tensor] = []

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            self.masks.append(mask)
            return torch.zeros_like(image)

    def test_by_hand(self) -> None:
        """The error of black is the brightness; over its mean in the two hidden cells, 2 and 4."""
        image = torch.tensor([2.0, 4.0, 9.0]).view(1, 1, 1, 3)
        cells = torch.tensor([True, True, False]).view(1, 1, 1, 3)
        found = ErrorSoFar(self.Zeros(), (1, 1))(image, cells)
        torch.testing.assert_close(found, torch.tensor([[2 / 3, 4 / 3, 0.0]]), atol=1e-4, rtol=0)

    def test_it_is_asked_after_every_box_but_the_last(self) -> None:
        network = self.Zeros()
        decision = build(n_steps=3, network=network)(IMAGE)
        assert len(network.masks) == 2
        hidden = decision.box_cells.cumsum(1).bool()
        for step, mask in enumerate(network.masks):
            assert torch.equal(image_to_cells(mask, 4).flatten(1) > 0, hidden[:, step])
        error = decision.episode.state.error
        assert not error[:, 0].any()
        assert torch.equal(error[:, 1:] > 0, hidden[:, :-1])

    def test_its_weights_are_not_the_maskers(self) -> None:
        network = ReconstructionUNet(2, backbone_args=SMALL)
        masker = build(network=network)
        assert masker.state_dict().keys() == build(network=self.Zeros()).state_dict().keys()
        assert copy.deepcopy(masker).error_so_far.network.network is network


class TestActorCritic:
    def test_actions_are_drawn_from_the_policy(self) -> None:
        """Frequencies of the first two actions against the product of the two softmaxes."""
        torch.manual_seed(0)
        masker = BoxMasker(2, 4, 0.75, learner="actor_critic", n_steps=2, sizes=(1, (1, 2)))
        nn.init.normal_(masker.scorer.boxes.weight, std=1.0)
        picture = torch.rand(1, 1, 8, 8).expand(20000, -1, -1, -1)  # 2 x 2 cells, 8 actions
        with torch.no_grad():
            decision = masker(picture)
        first, second = decision.episode.actions.unbind(1)
        pairs = torch.bincount(first * 8 + second, minlength=64) / 20000
        probability = torch.zeros(64)
        for a in range(8):
            rows = (first == a).nonzero()
            if len(rows):
                later = decision.scores[int(rows[0]), 1].softmax(0)
                probability[a * 8 : a * 8 + 8] = decision.scores[0, 0].softmax(0)[a] * later
        assert (pairs - probability).abs().max() < 0.012
        assert pairs.max() > 0.05

    def test_loss_by_hand(self) -> None:
        """Step by step: exact log-probability by softmax, return minus value, its running deviation, entropy."""
        masker = opinionated(learner="actor_critic", entropy_weight=(0.2, 0.2), entropy_floor=0.95)
        decision = masker(IMAGE)
        error = image_to_cells(ERROR, 4).flatten(1)
        hidden = decision.cells.flatten(1)
        worth = (error - error[hidden].mean()) / error[hidden].std(correction=0)
        reward = (decision.box_cells * worth.unsqueeze(1)).sum(2) / 16
        rows = []
        for image, step in itertools.product(range(6), range(4)):
            if decision.episode.live[image, step]:
                back = sum(0.9 ** (k - step) * reward[image, k] for k in range(step, 4))
                valid = decision.episode.valid[image, step]
                p = decision.scores[image, step, valid].softmax(0)
                log_p = decision.scores[image, step].softmax(0)[decision.episode.actions[image, step]].log()
                entropy = -(p * p.log()).sum() / torch.tensor(float(max(len(p), 2))).log()
                rows.append((step, back, decision.value[image, step], log_p, entropy))
        steps, returns, values, log_probs, entropies = zip(*rows, strict=True)
        advantage = torch.stack(returns) - torch.stack(values).detach()
        discount = torch.tensor([0.9**step for step in steps])
        policy = -(discount * advantage / advantage.std(correction=0) * torch.stack(log_probs)).sum() / (6 * 4)
        critic = 0.5 * F.smooth_l1_loss(torch.stack(values), torch.stack(returns))
        bonus = torch.stack([2.0 * F.relu(0.95 - entropy) - 0.2 * entropy for entropy in entropies]).mean()
        torch.testing.assert_close(masker.loss([(decision, ERROR)]), policy + critic + bonus, rtol=1e-4, atol=1e-5)

    def test_diagnostics(self) -> None:
        even = build(learner="actor_critic")
        found = even.diagnostics(even(IMAGE))
        assert float(found["policy_entropy"]) == pytest.approx(1.0, abs=0.01)
        sharp = opinionated(learner="actor_critic")
        assert float(sharp.diagnostics(sharp(IMAGE))["policy_entropy"]) < 0.9


class TestSingleCells:
    """The second task: the standardised error of every hidden cell, whoever hid it."""

    def test_loss_by_hand(self) -> None:
        """On top of the agent's loss: its weight times the mean squared error over hidden cells."""
        masker = opinionated(cell_weight=0.5, target_decay=0.0)
        decision = masker(IMAGE)
        error, hidden = image_to_cells(ERROR, 4).flatten(1), decision.cells.flatten(1)
        standard = (error[hidden] - error[hidden].mean()) / error[hidden].std(correction=0)
        second = (decision.predicted[hidden] - standard).square().mean()
        both = masker.loss([(decision, ERROR)])
        masker.cell_weight = 0.0
        agent = copy.deepcopy(masker).loss([(dataclasses.replace(decision, predicted=None), ERROR)])
        torch.testing.assert_close(both, agent + 0.5 * second, rtol=1e-4, atol=1e-4)

    def test_it_learns_during_the_random_warm_up(self) -> None:
        """Else nothing would be learned while nothing is chosen."""
        masker = CurriculumMasker(build(cell_weight=1.0), warm_up=0.5)
        masker.loss([(masker(IMAGE), ERROR)]).backward()
        assert masker.masker.scorer.single.weight.grad.any()
        assert masker.masker.scorer.from_image.weight.grad.any()

    def test_none_unless_asked_for(self) -> None:
        assert build()(IMAGE).predicted is None
        assert QRegionMasker(2, 4)(IMAGE).predicted is None
        assert BoxMasker(2, 4)(IMAGE).predicted.shape == (6, 64)


@every_learner
class TestNothingChosen:
    def test_no_gradient_but_a_finite_loss(self, learner: str) -> None:
        masker = build(learner=learner)
        loss = masker.loss([(masker(IMAGE, mask_ratio=0.0), ERROR)])
        loss.backward()
        assert loss.item() == 0.0
        learned = [parameter for parameter in masker.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learned)

    def test_in_a_curriculum(self, learner: str) -> None:
        """Random cells join the mask and the running moments, but not the boxes."""
        masker = CurriculumMasker(build(learner=learner), policy_share=(0.5, 0.5), warm_up=0.5)
        for progress in (0.1, 0.9):
            masker.set_progress(progress)
            decision = masker(IMAGE)
            assert (decision.cells.flatten(1).sum(1) == 19).all()
            assert decision.box_cells.any() == (progress == 0.9)
            assert torch.isfinite(masker.loss([(decision, ERROR)]))
        assert float(masker.masker.reward.moments.steps) == 2


class TestOptimality:
    """Two boxes of two or three cells in a row of six, four cells at most: all episodes can be listed."""

    worth = torch.tensor([6.0, 1.0, 6.0, 0.0, 5.0, 5.0])
    boxes = tuple(tuple(range(s, s + n)) for n in (2, 3) for s in range(6 - n + 1))

    def total(self, *pair: tuple[int, ...]) -> float:
        hidden: set[int] = set()
        for box in pair:
            new = set(box) - hidden
            if len(hidden | new) <= 4:
                hidden |= new
        return float(self.worth[list(hidden)].sum())

    def hidden_after_training(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        sizes, schedule = ((1, 2), (1, 3)), {"explore": (0.5, 0.8), "target_decay": 0.9}
        masker = BoxMasker(
            2, 4, 0.6, n_steps=2, sizes=sizes, gamma=1.0, area_penalty=0.0, cell_weight=0.0, seed=seed, **schedule
        )
        image = torch.rand(1, 1, 4, 24).expand(16, -1, -1, -1)
        error = self.worth.repeat_interleave(4).view(1, 1, 1, 24).expand(16, 1, 4, 24)
        optimizer = torch.optim.Adam([p for p in masker.parameters() if p.requires_grad], 3e-3)
        for step in range(STEPS):
            masker.set_progress(step / STEPS)
            optimizer.zero_grad()
            masker.loss([(masker(image), error)]).backward()
            optimizer.step()
        return masker.eval()(image[:1]).cells.flatten()

    @pytest.mark.parametrize("seed", [0, 2])
    def test_learns_the_best_pair_not_the_best_first_box(self, seed: int) -> None:
        """The best single box, 6 + 1 + 6, leaves no room for 5 + 5; two boxes of two hide more."""
        best = max(self.total(*pair) for pair in itertools.product(self.boxes, repeat=2))
        greedy = max(self.boxes, key=self.total)
        assert max(self.total(greedy, other) for other in self.boxes) < best
        assert float(self.worth[self.hidden_after_training(seed)].sum()) == best


class TestIntelligentMasking:
    """One box of one size with a plain head is a Q-region masker, and that is a step of Intelligent Masking."""

    def step_by_hand(self, masker: BoxMasker, k: int, penalty: float) -> tuple[Tensor, Tensor]:
        """Q-map, best corner, its region hidden; squared error between its Q-value and the region's scaled error."""
        cells = masker.scorer.boxes(masker.scorer.from_image(masker.scorer.features(IMAGE)).relu())[:, 0]
        corners = 8 - k + 1
        mask, q, errors = torch.zeros(6, 1, 32, 32, dtype=torch.bool), [], []
        for number in range(6):
            q_map = torch.stack(
                [cells[number, i : i + k, j : j + k].mean() for i in range(corners) for j in range(corners)]
            )
            row, column = divmod(int(q_map.argmax()), corners)
            region = (slice(4 * row, 4 * (row + k)), slice(4 * column, 4 * (column + k)))
            mask[number, 0][region] = True
            q.append(q_map.max())
            errors.append(ERROR[number, 0][region])
        hidden = image_to_cells(ERROR, 4)[image_to_cells(mask, 4) > 0]
        shift = penalty * hidden.mean()
        target = torch.stack([(error.mean() - shift) / hidden.std(correction=0) for error in errors])
        return mask, (torch.stack(q) - target).square().mean()

    @pytest.mark.parametrize("penalty", [0.0, 1.0])
    @pytest.mark.parametrize("k", [2, 3])
    def test_three_ways_to_the_same_step(self, k: int, penalty: float) -> None:
        shared = {"area_penalty": penalty, "epsilon": (0.0, 0.0), "cell_weight": 0.0}
        box = BoxMasker(2, 4, RATIO, n_steps=1, sizes=(k,), dueling=False, td_loss="mse", **shared)
        region = QRegionMasker(2, 4, RATIO, region_size=k, **shared)
        nn.init.normal_(box.scorer.boxes.weight)
        region.load_state_dict(box.state_dict())
        mask, loss = self.step_by_hand(box, k, penalty)
        found = []
        for masker in (box, region):
            decision = masker(IMAGE)
            assert torch.equal(decision.mask, mask)
            found.append(masker.loss([(decision, ERROR)]))
        torch.testing.assert_close(found[0], loss)
        assert torch.equal(found[0], found[1])

    def test_the_same_draws_while_exploring(self) -> None:
        box = BoxMasker(2, 4, RATIO, n_steps=1, sizes=(2,), dueling=False, td_loss="mse", cell_weight=0.0, seed=4)
        region = QRegionMasker(2, 4, RATIO, seed=4)
        assert torch.equal(box(IMAGE).mask, region(IMAGE).mask)

    def test_random_for_a_fifth_of_the_training(self) -> None:
        masker = QRegionMasker(2, 4)
        found = []
        for progress in (0.0, 0.19, 0.2, 1.0):
            masker.set_progress(progress)
            found.append(float(masker.diagnostics(masker(IMAGE))["epsilon"]))
        assert found == pytest.approx([1.0, 1.0, 0.05, 0.05])

    @pytest.mark.parametrize(("dims", "size", "patch"), [(2, (300, 300), 34), (3, (96, 96, 96), 16)])
    def test_the_papers_grid(self, dims: int, size: tuple[int, ...], patch: int) -> None:
        with torch.no_grad():
            decision = QRegionMasker(dims, patch)(torch.rand(1, 1, *size))
        assert decision.cells.shape[2:] == (9 if dims == 2 else 6,) * dims
        assert int(decision.cells.sum()) == 2**dims

    def test_further_options_act_with_further_regions(self) -> None:
        masker = QRegionMasker(2, 4, n_steps=2, dueling=True, double=True, target_decay=0.9, replay=8)
        for _ in range(2):
            loss = masker.loss([(masker(IMAGE), ERROR)])
        assert torch.isfinite(loss)
        assert masker.learner.target is not None
        assert len(masker.learner.replay) == 8

    def test_chance_to_explore_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"epsilon: expected two numbers in \[0, 1\], got 0.1"):
            QRegionMasker(2, 8, epsilon=0.1)

    @pytest.mark.parametrize("options", [{"double": True}, {"target_decay": 0.9}])
    def test_options_without_effect_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="double, target_decay: with n_steps=1"):
            QRegionMasker(2, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": "sarsa"}, "learner: expected one of dqn, actor_critic, got 'sarsa'"),
        ({"td_loss": "l1"}, "td_loss: expected one of huber, mse, got 'l1'"),
        ({"learner": "actor_critic", "dueling": False}, "dueling: learner='actor_critic' needs"),
        ({"learner": "actor_critic", "replay": 5}, "replay: learner='actor_critic'"),
        ({"n_steps": 0}, "n_steps: expected at least 1 box, got 0"),
        ({"n_steps": 1, "stop": True}, "stop, network: matter after the first box only"),
        ({"n_steps": 1, "network": nn.Identity()}, "stop, network: matter after the first box only"),
        ({"gamma": 1.1}, "gamma, target_decay: expected"),
        ({"learner": "actor_critic", "gamma": 1.1}, r"gamma: expected a number in \[0, 1\], got 1.1"),
        ({"target_decay": 1.0}, "gamma, target_decay: expected"),
        ({"explore": (0.5, 0.2)}, "start, end: expected"),
        ({"explore": 0.2}, r"explore: expected two numbers in \[0, 1\], got 0.2"),
        ({"epsilon": (5, -1)}, r"epsilon: expected two numbers in \[0, 1\], got \(5, -1\)"),
        ({"entropy_weight": 0.01}, r"entropy_weight: expected two numbers in \[0, inf\], got 0.01"),
        ({"entropy_floor": 80.0}, r"entropy_floor: expected a number in \[0, 1\], got 80.0"),
        ({"sizes": ()}, "sizes: expected boxes"),
        ({"sizes": (1, 2.5)}, "sizes: expected boxes of at least 1 cell along each axis, in whole cells"),
        ({"replay": -1}, "capacity: expected at least 1 episode"),
        ({"features": "nonsense"}, "features: expected"),
    ],
)
def test_options_out_of_range_or_excluding_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_boxes_larger_than_the_grid() -> None:
    with pytest.raises(ValueError, match=r"sizes: expected a box that fits into the grid of \(8, 8\) cells"):
        build(sizes=(9, (1, 12)))(IMAGE)
