# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from ignite.engine import Events
from monai.engines import IterationEvents

from ahm_engines import ErrorReward, MaskedEvaluator, MaskedEvents, MaskedKeys, MaskedTrainer, ProgressReward
from ahm_engines.finite import FiniteCheck
from ahm_networks import (
    ActorCriticMasker,
    CurriculumMasker,
    LossPredictionMasker,
    MaskedAutoencoder,
    ReconstructionUNet,
    UniformMasker,
)

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}


def batches(dims=2, count=4, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"image": torch.rand(2, 1, *[size] * dims, generator=generator)} for _ in range(count)]


def build(masker, dims=2, data=None, epochs=1, backbone_args=SMALL, **options):
    torch.manual_seed(0)
    network = ReconstructionUNet(dims, backbone_args=backbone_args)
    weights = list(masker.parameters())
    options.setdefault("masker_optimizer", torch.optim.Adam(weights, 1e-3) if weights else None)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    return MaskedTrainer("cpu", epochs, data or batches(dims), network, optimizer, masker, **options)


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def buffers_of(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def moved(module, before):
    return [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("dims", [2, 3])
def test_both_networks_learn_from_one_run(dims):
    trainer = build(ActorCriticMasker(dims, 8, 0.5), dims)
    network, masker = weights_of(trainer.network), weights_of(trainer.masker)
    trainer.run()
    assert set(moved(trainer.network, network)) == set(network)
    assert set(moved(trainer.masker, masker)) == set(masker)


def test_reconstruction_gradient_does_not_reach_the_masker_nor_reward_gradient_the_network():
    trainer = build(ActorCriticMasker(2, 8, 0.5), masker_optimizer=None)
    before = weights_of(trainer.masker)
    trainer.run()
    assert moved(trainer.masker, before) == []
    assert all(p.grad is None for p in trainer.masker.parameters())
    assert not trainer.state.output[MaskedKeys.ERROR].requires_grad


def test_events_come_in_the_documented_order():
    trainer, seen = build(ActorCriticMasker(2, 8, 0.5), data=batches(count=1)), []
    order = [
        MaskedEvents.MASK_CHOSEN,
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        MaskedEvents.REWARDED,
        MaskedEvents.MASKER_UPDATED,
        IterationEvents.MODEL_COMPLETED,
    ]
    for event in order:
        trainer.add_event_handler(event, lambda engine, e: seen.append(e), event)
    trainer.run()
    assert seen == order


def test_output_holds_what_handlers_read():
    trainer = build(ActorCriticMasker(2, 8, 0.5))
    trainer.run()
    output = trainer.state.output
    assert output[MaskedKeys.MASK].dtype == torch.bool
    assert output[MaskedKeys.ERROR].shape == output[MaskedKeys.MASK].shape == (2, 1, 32, 32)
    assert all(not output[key].requires_grad for key in (MaskedKeys.LOSS, MaskedKeys.MASKER_LOSS, MaskedKeys.PRED))


def test_staged_training_freezes_one_network_at_a_time():
    masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5), policy_share=(1.0, 1.0), warm_up=0.5)
    stages = {"network_stages": [(0.0, 0.5)], "masker_stages": [(0.5, 1.0)]}
    trainer = build(masker, epochs=2, backbone_args={**SMALL, "norm": "batch", "dropout": 0.5}, **stages)
    start = (weights_of(trainer.network), weights_of(masker))
    middle, buffers, training = [], [], []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: buffers.append(buffers_of(trainer.network)))
    trainer.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda: training.append(trainer.network.training))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=1), lambda: middle.extend([weights_of(trainer.network), weights_of(masker)])
    )
    trainer.run()
    assert training == [True] * 4 + [False] * 4
    assert buffers[0] and all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    assert all(torch.equal(middle[1][name], start[1][name]) for name in start[1])
    assert any(not torch.equal(middle[0][name], start[0][name]) for name in start[0])
    assert moved(trainer.network, middle[0]) == []
    assert moved(masker, middle[1])


@pytest.mark.parametrize("name", ["network_stages", "masker_stages"])
@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([(10, 100)], r"expected two numbers in \[0, 1\], got \(10, 100\)"),
        ((0.0, 0.5), r"expected two numbers in \[0, 1\], got 0.0"),
        ([(0.0, 0.4), (0.6, 0.5)], r"expected intervals that end no earlier than they begin, got \(0.6, 0.5\)"),
    ],
)
def test_stages_that_would_never_come_are_refused(name, stages, told):
    with pytest.raises(ValueError, match=f"{name}: {told}"):
        build(UniformMasker(2, 8), **{name: stages})


def test_the_curriculum_follows_the_progress_of_the_run():
    masker = CurriculumMasker(LossPredictionMasker(2, 8, 0.5), policy_share=(0.0, 0.8), warm_up=0.0)
    trainer, shares = build(masker, epochs=2), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: shares.append(masker.share))
    trainer.run()
    assert shares == pytest.approx([0.8 * step / 8 for step in range(8)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_keeps_the_masker_in_float32(dtype):
    trainer = build(ActorCriticMasker(2, 8, 0.5), amp=True, amp_kwargs={"dtype": dtype})
    before = weights_of(trainer.network)
    trainer.run()
    assert trainer.state.output[MaskedKeys.PRED].dtype == dtype
    assert trainer.state.output[MaskedKeys.DECISION].logits.dtype == torch.float32
    assert moved(trainer.network, before)
    assert torch.isfinite(trainer.state.output[MaskedKeys.LOSS])


def test_mixed_precision_stays_close_to_full_precision():
    losses = []
    for amp in (False, True):
        trainer = build(UniformMasker(2, 8, 0.5), amp=amp, amp_kwargs={"dtype": torch.bfloat16})
        trainer.run()
        losses.append(float(trainer.state.output[MaskedKeys.LOSS]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_gives_the_same_training(dims):
    losses = []
    for channels_last in (False, True):
        trainer = build(UniformMasker(dims, 8, 0.5), dims, channels_last=channels_last)
        trainer.run()
        losses.append(float(trainer.state.output[MaskedKeys.LOSS]))
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    weight = next(p for p in trainer.network.parameters() if p.ndim == dims + 2 and min(p.shape[:2]) > 1)
    assert weight.is_contiguous(memory_format=layout)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_channels_last_fits_a_3d_network_without_3d_convolutions():
    encoder = {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2, "num_layers": 1, "proj_type": "perceptron"}
    sizes = {"img_size": 16, "patch_size": 8, "decoder_hidden_size": 8, "decoder_num_heads": 2}
    network = MaskedAutoencoder(3, encoder_args=encoder, **sizes)
    assert max(p.ndim for p in network.parameters()) < 5
    optimizer, masker = torch.optim.Adam(network.parameters(), 1e-3), UniformMasker(3, 8, 0.5)
    trainer = MaskedTrainer("cpu", 1, batches(3, size=16), network, optimizer, masker, channels_last=True)
    trainer.run()
    assert trainer.state.output[MaskedKeys.IMAGE].shape[2:] == (16, 16, 16)


def test_compiled_network_trains_and_keeps_its_plain_names():
    trainer = build(UniformMasker(2, 8, 0.5), compile=True, compile_kwargs={"backend": "aot_eager"})
    before = weights_of(trainer.network)
    trainer.run()
    assert moved(trainer.network, before)
    assert not any("_orig_mod" in name for name in trainer.network.state_dict())


def test_only_what_its_optimizer_changes_counts_in_the_norm_of_the_maskers_gradient():
    masker, norms = ActorCriticMasker(2, 8, 0.5), []
    weight = list(masker.parameters())[-1]  # the others' gradients pile up unused
    optimizer = torch.optim.SGD([weight], 1.0)
    trainer = build(masker, masker_optimizer=optimizer, masker_gradient_clip=1e-6)
    trainer.add_event_handler(MaskedEvents.MASKER_UPDATED, lambda: norms.append(float(weight.grad.norm())))
    trainer.run()
    assert norms == pytest.approx([1e-6] * 4, rel=1e-3)


def test_gradient_clipping_limits_the_update():
    norms = []
    trainer = build(UniformMasker(2, 8, 0.5), gradient_clip=1e-3)
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda: norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.network.parameters()])),
    )
    trainer.run()
    assert max(norms) <= 1e-3 * 1.01


def test_leave_one_out_draws_further_masks_without_teaching_the_network_twice():
    single = build(ActorCriticMasker(2, 8, 0.5, seed=3), masker_optimizer=None)
    single.run()
    masker = ActorCriticMasker(2, 8, 0.5, num_samples=2, baseline="leave_one_out", seed=3)
    trainer = build(masker, data=batches(count=1))
    before = weights_of(masker)
    trainer.run()
    assert moved(masker, before)


@pytest.mark.parametrize("masker", [UniformMasker(2, 8, 0.5), ActorCriticMasker(2, 8, 0.5)])
def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved(masker):
    data = batches()
    data[-1]["image"] = torch.full_like(data[-1]["image"], float("nan"))
    trainer, saved = build(copy.deepcopy(masker), data=data), []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: saved.append(True))
    with pytest.raises(FloatingPointError, match="loss: expected finite numbers"):
        trainer.run()
    assert saved == []


@pytest.mark.parametrize("spoilt", ["network", "masker"])
def test_weights_that_the_last_step_spoilt_stop_the_run_before_anything_is_saved(spoilt):
    trainer, saved = build(ActorCriticMasker(2, 8, 0.5), data=batches(count=1)), []
    next(getattr(trainer, spoilt).parameters()).register_hook(lambda gradient: gradient * float("nan"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: saved.append(True))
    with pytest.raises(FloatingPointError, match=f"{spoilt}: expected finite weights"):
        trainer.run()
    assert saved == []


def test_both_losses_of_the_last_iteration_are_looked_at_without_waiting(monkeypatch):
    monkeypatch.setattr(FiniteCheck, "finite", lambda check: len(check.losses) != 2)
    trainer = build(ActorCriticMasker(2, 8, 0.5))
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 2"):
        trainer.run()


def test_batches_without_image_are_refused_by_name():
    trainer = build(UniformMasker(2, 8, 0.5), data=[{"picture": torch.rand(1, 1, 32, 32)}])
    with pytest.raises(TypeError, match="expected a tensor or a dictionary with 'image'"):
        trainer.run()


def test_the_reward_is_what_the_masker_learns_from():
    """A reward that is zero everywhere gives the policy no direction."""

    class Nothing(ErrorReward):
        def __call__(self, error, pred, mask, again=None):
            return torch.zeros_like(error)

    options = {"entropy_weight": (0.0, 0.0), "entropy_floor": 0.0, "value_weight": 0.0, "baseline": "running_mean"}
    masker = ActorCriticMasker(2, 8, 0.5, **options)
    trainer = build(masker, reward=Nothing())
    before = weights_of(masker)
    trainer.run()
    assert moved(masker, before) == []


def test_learning_progress_is_the_error_before_the_step_minus_the_error_after_it():
    rewards = []

    class Seen(ProgressReward):
        def __call__(self, error, pred, mask, again=None):
            rewards.append((error, super().__call__(error, pred, mask, again)))
            return rewards[-1][1]

    image = batches(count=1)[0]["image"]
    trainer = build(ActorCriticMasker(2, 8, 0.5), data=[{"image": image}], reward=Seen())
    trainer.run()
    mask = trainer.state.output[MaskedKeys.MASK]
    with torch.no_grad():
        after = (trainer.network(image, mask) - image).abs()
    error, reward = rewards[0]
    torch.testing.assert_close(reward, error - after)
    assert reward[mask].mean() > 0  # the network did learn from that very mask
    assert not reward.requires_grad


@pytest.mark.parametrize(
    "options",
    [{"network_stages": [(0.5, 1.0)]}, {"masker": ActorCriticMasker(2, 8, 0.5, num_samples=2)}],
    ids=["network waits", "second mask"],
)
def test_learning_progress_without_a_step_is_refused(options):
    masker = options.pop("masker", ActorCriticMasker(2, 8, 0.5))
    with pytest.raises(ValueError, match="reward: learning progress needs a mask that the network has just learned"):
        build(masker, reward=ProgressReward(), **options).run()


def test_no_reward_is_worked_out_for_a_masker_that_does_not_learn():
    def reward(*_):
        raise AssertionError("asked for a reward")

    build(UniformMasker(2, 8, 0.5), reward=reward).run()
    build(ActorCriticMasker(2, 8, 0.5), reward=reward, masker_stages=[(1.0, 1.0)]).run()


class Tokens(torch.nn.Module):
    token_size = (8, 4)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, image, mask):
        return image * self.scale


@pytest.mark.parametrize("wrap", [lambda network: network, torch.nn.DataParallel], ids=["plain", "wrapped"])
def test_cells_that_cut_tokens_are_refused(wrap):
    network = wrap(Tokens())
    optimizer = torch.optim.Adam(network.parameters())
    MaskedTrainer("cpu", 1, batches(), network, optimizer, UniformMasker(2, (16, 4), 0.5))
    with pytest.raises(ValueError, match=r"patch_size: expected multiples of .* \(8, 4\) voxels, got \(12, 4\)"):
        MaskedTrainer("cpu", 1, batches(), network, optimizer, UniformMasker(2, (12, 4), 0.5))
    with pytest.raises(ValueError, match="patch_size: expected multiples"):
        MaskedEvaluator("cpu", batches(), network, UniformMasker(2, (8, 6), 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_on_cuda(dtype):
    network = ReconstructionUNet(3, backbone_args=SMALL).cuda()
    masker = ActorCriticMasker(3, 8, 0.5).cuda()
    trainer = MaskedTrainer(
        "cuda",
        2,
        batches(3),
        network,
        torch.optim.Adam(network.parameters(), 1e-3),
        masker,
        masker_optimizer=torch.optim.Adam(masker.parameters(), 1e-3),
        amp=True,
        amp_kwargs={"dtype": dtype},
        channels_last=True,
    )
    trainer.run()
    assert torch.isfinite(trainer.state.output[MaskedKeys.LOSS])
    cpu = ActorCriticMasker(3, 8, 0.5, seed=5)
    image = torch.rand(2, 1, 32, 32, 32)
    same = copy.deepcopy(cpu).cuda()
    assert torch.equal(cpu(image).mask, same(image.cuda()).mask.cpu())
