# SPDX-License-Identifier: Apache-2.0
"""The array transforms: what they hide, what they leave alone, what they refuse."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from monai.utils import TransformBackends
from torch import Tensor, nn

from ahm_networks import ActorCriticMasker
from ahm_transforms import AdaptiveHardMask, RandBoxMask, RandPatchMask
from ahm_transforms.masking import cells_to_image

AFFINE = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))


def brightest(image: Tensor) -> Tensor:
    return image.amax(1, keepdim=True) > image.mean()


def coin(image: Tensor) -> Tensor:
    return torch.rand(image[:, :1].shape) < 0.5


MAKERS = {
    "patch": lambda **options: RandPatchMask(4, 0.5, **options),
    "box": lambda **options: RandBoxMask(2, 3, max_box_size=6, **options),
    "adaptive": lambda **options: AdaptiveHardMask(coin, **options),
}
every_transform = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def volume(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1.0


@every_transform
@pytest.mark.parametrize("shape", [(1, 17, 12), (3, 9, 8, 11)], ids=["2d", "3d"])
def test_hidden_voxels_are_filled_and_all_others_kept(make, shape):
    image, hide = volume(*shape), make(fill=-7.0).set_random_state(seed=0)
    masked = hide(image)
    hidden = hide.mask.expand_as(image)
    assert hide.mask.shape == (1, *shape[1:])
    assert hide.mask.dtype == torch.bool
    assert 0 < hide.mask.sum() < hide.mask.numel()
    assert masked[hidden].eq(-7.0).all()
    assert torch.equal(masked[~hidden].as_tensor(), image[~hidden])


@every_transform
def test_mean_fill_is_the_mean_of_each_channel(make):
    image, hide = volume(2, 16, 16), make(fill="mean").set_random_state(seed=0)
    masked = hide(image)
    for channel in range(2):
        torch.testing.assert_close(
            masked[channel][hide.mask[0]].unique().as_tensor(), image[channel].mean().reshape(1), rtol=1e-6, atol=0
        )


def test_nan_is_hidden_too():
    image = torch.full((1, 8, 8), float("nan"))
    hide = RandPatchMask(4, 0.5)
    assert hide(image)[hide.mask].eq(0).all()


@every_transform
@pytest.mark.parametrize("kind", ["tensor", "meta", "array"])
def test_input_is_not_modified(make, kind):
    image = volume(1, 16, 16)
    given = {
        "tensor": image.clone(),
        "meta": MetaTensor(image.clone(), meta={"a": [1]}),
        "array": image.numpy().copy(),
    }[kind]
    masked = make()(given)
    assert np.array_equal(np.asarray(given), image.numpy())
    assert isinstance(masked, MetaTensor)
    masked += 1
    masked.meta["new"] = 1
    assert np.array_equal(np.asarray(given), image.numpy())
    assert "new" not in getattr(given, "meta", {})


@every_transform
def test_metadata_and_dtype_are_kept(make):
    image = MetaTensor(volume(1, 8, 8, 8).to(torch.float16), affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    masked = make()(image)
    assert masked.dtype == torch.float16
    assert masked.meta["filename_or_obj"] == "a.nii.gz"
    assert torch.equal(masked.affine, image.affine)


def test_integer_images_keep_their_dtype():
    image = torch.arange(64, dtype=torch.int16).view(1, 8, 8)
    masked = RandPatchMask(4, 0.5, fill="mean")(image)
    assert masked.dtype == torch.int16
    assert masked.eq(31).sum() >= 32


@every_transform
def test_a_seed_repeats_the_masks_and_masks_differ(make):
    image, hide = volume(1, 32, 32), make()
    runs = []
    for seed in (0, 0, 1):
        hide.set_random_state(seed=seed)
        runs.append([hide(image).as_tensor().clone() for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


@every_transform
def test_numpy_and_torch_default_generators_are_left_alone(make):
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    make().set_random_state(seed=0)(volume(1, 16, 16))
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@every_transform
def test_pickle_and_compose_go_on_with_the_same_masks(make):
    image, hide = volume(1, 16, 16), make().set_random_state(seed=3)
    copy = pickle.loads(pickle.dumps(hide))
    assert torch.equal(copy(image).as_tensor(), hide(image).as_tensor())
    chains = [Compose([make()]).set_random_state(seed=5) for _ in range(2)]
    assert torch.equal(chains[0](image).as_tensor(), chains[1](image).as_tensor())


@every_transform
def test_last_mask_can_be_used_again(make):
    image, hide = volume(1, 16, 16), make()
    first = hide(image)
    assert torch.equal(hide(image, randomize=False).as_tensor(), first.as_tensor())
    with pytest.raises(ValueError, match=r"expected the spatial shape of the mask, \(16, 16\), got \(8, 16\)"):
        hide(image[:, :8], randomize=False)


@every_transform
def test_channel_axis_is_required(make):
    with pytest.raises(ValueError, match="expected a channel-first image"):
        make()(torch.ones(16, 16))


@every_transform
def test_backend_and_fill(make):
    assert make().backend == [TransformBackends.TORCH]
    for fill in ("median", None):
        with pytest.raises(ValueError, match=f"fill: expected a number or 'mean', got {fill!r}"):
            make(fill=fill)


@pytest.mark.parametrize("name", ["patch", "box"])
def test_prob_leaves_images_alone(name):
    image, hide = volume(1, 16, 16), MAKERS[name](prob=0.3).set_random_state(seed=0)
    applied = 0
    for _ in range(300):
        masked = hide(image)
        applied += bool(hide.mask.any())
        assert hide.mask.any() or torch.equal(masked.as_tensor(), image)
    assert 60 < applied < 120


# ---- RandPatchMask


@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.75])
@pytest.mark.parametrize(("shape", "patch"), [((16, 16), 4), ((17, 13), (4, 5)), ((9, 10, 11), (4, 3, 5))])
def test_exact_number_of_whole_cells_is_hidden(ratio, shape, patch):
    hide = RandPatchMask(patch, ratio).set_random_state(seed=0)
    hide(volume(1, *shape))
    steps = patch if isinstance(patch, tuple) else (patch,) * len(shape)
    cells = hide.mask[(slice(None), *(slice(None, None, p) for p in steps))]
    assert int(cells.sum()) == int(ratio * cells.numel() + 0.5)
    assert torch.equal(cells_to_image(cells[None], patch, shape)[0], hide.mask)


def half_bright() -> Tensor:
    image = torch.zeros(2, 16, 16)
    image[1, :, :8] = 1.0
    return image


@pytest.mark.parametrize("foreground", [0.5, lambda image: image > 0.5, lambda image: image.amax(0, keepdim=True) > 0])
def test_only_foreground_is_hidden(foreground):
    hide = RandPatchMask(4, 0.75, foreground=foreground)
    for _ in range(5):
        hide(half_bright())
        assert hide.mask[..., :8].float().mean() == 0.75
        assert not hide.mask[..., 8:].any()


def test_foreground_takes_the_brightest_channel_and_the_mean_of_a_cell():
    image = torch.zeros(1, 8, 8)
    image[0, 0, 0] = 10.0
    image[0, 4:, 4:] = 1.0
    hide = RandPatchMask(4, 0.5, foreground=0.7)
    hide(image)
    assert hide.mask[0, 4:, 4:].all()
    assert hide.mask.sum() == 16


def test_share_of_the_grid_and_more_than_the_foreground_has():
    hide = RandPatchMask(4, 0.25, foreground=0.5, ratio_of="grid")
    hide(half_bright())
    assert hide.mask[..., :8].float().mean() == 0.5
    with pytest.raises(ValueError, match="asked to hide 12 cells, but only 8 of 16 cells may be hidden"):
        RandPatchMask(4, 0.75, foreground=0.5, ratio_of="grid")(half_bright())


def test_image_without_foreground_has_no_restriction():
    hide = RandPatchMask(4, 0.75, foreground=0.5)
    hide(torch.zeros(1, 16, 16))
    assert hide.mask.float().mean() == 0.75


def test_foreground_callable_must_return_a_mask():
    with pytest.raises(ValueError, match="foreground: expected the callable to return bool"):
        RandPatchMask(4, 0.75, foreground=lambda image: image[..., :4] > 0)(volume(1, 16, 16))
    with pytest.raises(ValueError, match="float32"):
        RandPatchMask(4, 0.75, foreground=lambda image: image)(volume(1, 16, 16))


def test_patch_arguments_are_checked():
    with pytest.raises(ValueError, match="mask_ratio"):
        RandPatchMask(4, 1.0)
    with pytest.raises(ValueError, match="ratio_of: expected 'foreground' or 'grid'"):
        RandPatchMask(4, 0.5, ratio_of="image")
    with pytest.raises(ValueError, match="foreground: expected a number, a callable or None, got 'brain'"):
        RandPatchMask(4, 0.5, foreground="brain")
    with pytest.raises(ValueError, match="patch_size: expected at most the image size"):
        RandPatchMask(32, 0.5)(volume(1, 16, 16))


# ---- RandBoxMask


def test_a_box_has_its_size_and_lies_inside():
    hide, corners = RandBoxMask(1, (3, 5)).set_random_state(seed=0), set()
    for _ in range(400):
        hide(torch.ones(1, 5, 7))
        rows, columns = hide.mask[0].nonzero().T
        assert hide.mask.sum() == 15
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (2, 4)
        corners.add((int(rows.min()), int(columns.min())))
    assert corners == {(row, column) for row in range(3) for column in range(3)}


def test_box_sizes_cover_their_range_and_stop_at_the_image():
    hide, sizes = RandBoxMask(1, (2, 2, 2), max_box_size=(3, 2, 99)).set_random_state(seed=0), set()
    for _ in range(200):
        hide(torch.ones(1, 6, 6, 4))
        sizes.add(tuple((axis.max() - axis.min() + 1).item() for axis in hide.mask[0].nonzero().T))
    assert sizes == {(a, 2, c) for a in (2, 3) for c in (2, 3, 4)}


def test_number_of_boxes_covers_its_range():
    hide, voxels = RandBoxMask(1, 1, max_num_boxes=3).set_random_state(seed=0), set()
    for _ in range(200):
        hide(torch.ones(1, 64, 64))
        voxels.add(int(hide.mask.sum()))
    assert voxels == {1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_boxes": 0, "box_size": 4}, "num_boxes: expected 1 <="),
        ({"num_boxes": 3, "max_num_boxes": 2, "box_size": 4}, "num_boxes: expected 1 <="),
        ({"num_boxes": "1", "box_size": 4}, "num_boxes: expected .* in whole numbers, got '1' and None"),
        ({"num_boxes": 1, "box_size": 17}, "box_size: expected at most the image size"),
        ({"num_boxes": 1, "box_size": 0}, "box_size: expected sizes of at least 1"),
        ({"num_boxes": 1, "box_size": 4, "max_box_size": 3}, "max_box_size: expected at least box_size"),
        ({"num_boxes": 1, "box_size": (4, 4, 4)}, "box_size: expected 1 or 2 sizes"),
    ],
)
def test_box_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandBoxMask(**arguments)(volume(1, 16, 16))


# ---- AdaptiveHardMask


class Decision(NamedTuple):
    log_prob: float
    mask: Tensor
    policy_map: Tensor


def decide(image: Tensor) -> Decision:
    return Decision(0.0, brightest(image), image[..., ::4, ::4])


def pair(image: Tensor) -> tuple[Tensor, Tensor]:
    return brightest(image), image[..., ::4, ::4]


class Net(nn.Module):
    """A module with a mode, a gradient and a random draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        self.modes: list[bool] = []

    def forward(self, image: Tensor) -> Tensor:
        logits = self.layer(image)
        self.modes.append((self.training, logits.requires_grad))
        return torch.rand_like(logits) < torch.sigmoid(logits)


class Seeded:
    """A masker with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def set_random_state(self, seed: int) -> Seeded:
        self.generator.manual_seed(seed)
        return self

    def __call__(self, image: Tensor) -> Tensor:
        return torch.rand(image.shape, generator=self.generator) < 0.5


@pytest.mark.parametrize("masker", [brightest, pair, decide])
def test_every_form_of_answer(masker):
    image, hide = volume(1, 16, 16), AdaptiveHardMask(masker)
    hide(image)
    assert torch.equal(hide.mask, image > image.mean())
    if masker is brightest:
        assert hide.policy_map is None
    else:
        assert torch.equal(hide.policy_map, image[:, ::4, ::4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_zeros_and_ones_are_a_mask(dtype):
    image, hide = volume(1, 16, 16), AdaptiveHardMask(lambda image: brightest(image).to(dtype))
    hide(image)
    assert torch.equal(hide.mask, image > image.mean())


@pytest.mark.parametrize(
    ("masker", "error", "message"),
    [
        (lambda image: torch.sigmoid(image), ValueError, "expected a bool mask .or zeros and ones., got torch.float32"),
        (lambda image: image[..., ::4, ::4] > 0, ValueError, r"expected a mask of shape \(1, 1, 16, 16\)"),
        (lambda image: image[0] > 0, ValueError, r"got \(1, 16, 16\)"),
        (lambda image: (image > 0, image[0]), ValueError, "expected a policy map"),
        (lambda image: None, TypeError, "expected a mask tensor, a pair .* got NoneType"),
        (lambda image: (image > 0, image, image), TypeError, "got tuple"),
        (lambda image: image.numpy() > 0, TypeError, "got ndarray"),
    ],
)
def test_bad_answers_are_refused(masker, error, message):
    with pytest.raises(error, match=message):
        AdaptiveHardMask(masker)(volume(1, 16, 16))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("draw", [True, False])
def test_modules_run_in_the_mode_asked_for_without_gradients_and_get_theirs_back(draw, training):
    net = Net().train(training)
    hide = AdaptiveHardMask(net, draw=draw, device="cpu")
    assert not hide(volume(1, 16, 16)).requires_grad
    assert net.modes == [(draw, False)]
    assert net.training is training and torch.is_grad_enabled()


@pytest.mark.parametrize("draw", [True, False])
def test_parts_of_a_module_get_the_mode_back_that_they_were_in(draw):
    net = nn.Sequential(nn.Dropout(), Net().eval())
    AdaptiveHardMask(net, draw=draw)(volume(1, 16, 16))
    assert net[1].modes == [(draw, False)]
    assert [module.training for module in net.modules()] == [True, True, False, False]


def test_a_masker_asked_to_draw_hides_other_cells_at_every_look():
    image, masker = volume(1, 32, 32), ActorCriticMasker(2, 8, 0.5).eval()
    for draw, alike in ((True, False), (False, True)):
        hide = AdaptiveHardMask(masker, draw=draw).set_random_state(seed=0)
        first, second = hide(image).as_tensor(), hide(image).as_tensor()
        assert torch.equal(first, second) is alike
        assert torch.equal(hide.set_random_state(seed=0)(image).as_tensor(), first)


def test_an_image_that_is_not_masked_has_no_policy_map():
    hide = AdaptiveHardMask(pair, prob=0.5).set_random_state(seed=0)
    hidden = 0
    for _ in range(40):
        hide(volume(1, 16, 16))
        assert (hide.policy_map is not None) == bool(hide.mask.any())
        hidden += bool(hide.mask.any())
    assert 10 < hidden < 30


def test_seed_reaches_a_masker_with_its_own_generator():
    image, hide = volume(1, 16, 16), AdaptiveHardMask(Seeded())
    masks = [hide.set_random_state(seed=seed)(image).as_tensor() for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    state = [hide.set_random_state(state=np.random.RandomState(4))(image).as_tensor() for _ in range(2)]
    assert torch.equal(*state)


def test_modules_that_use_torchs_generator_follow_the_seed():
    image, hide = volume(1, 16, 16), AdaptiveHardMask(Net())
    masks = []
    for _ in range(2):
        torch.rand(3)
        masks.append(hide.set_random_state(seed=1)(image).as_tensor())
    assert torch.equal(*masks)
    assert not torch.equal(hide(image).as_tensor(), masks[0])


class Scripted(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.rand_like(image) < 0.5).to(torch.uint8), image[:, :, ::4, ::4]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "masker.ts"
    torch.jit.script(Scripted()).save(str(path))
    return path


@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_torchscript_file(script, as_type):
    image, hide = volume(1, 16, 16), AdaptiveHardMask(as_type(script)).set_random_state(seed=0)
    before = pickle.dumps(hide)
    hide(image)
    assert torch.equal(hide.policy_map, image[:, ::4, ::4])
    for state in (before, pickle.dumps(hide.set_random_state(seed=0))):
        copy = pickle.loads(state)
        assert torch.equal(copy(image).as_tensor(), pickle.loads(before)(image).as_tensor())


def test_torchscript_that_was_frozen_and_has_no_mode():
    image = volume(1, 16, 16)
    assert AdaptiveHardMask(torch.jit.freeze(torch.jit.script(Scripted().eval())))(image).shape == image.shape


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ts"):
        AdaptiveHardMask(tmp_path / "nowhere.ts")
    broken = tmp_path / "broken.ts"
    broken.write_bytes(b"no program")
    with pytest.raises(RuntimeError, match=r"expected a TorchScript file, could not load .*broken\.ts.*load_masker"):
        AdaptiveHardMask(broken)(volume(1, 16, 16))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="masker: expected a module, a callable or a path, got int"):
        AdaptiveHardMask(3)
