# SPDX-License-Identifier: Apache-2.0
"""Two views of one crop: of the same anatomy, differently disturbed, repeatable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose
from torch import Tensor

from ahm_transforms import recipes
from ahm_transforms.recipes import contrastive_views, fixed_contrastive_views
from tests.fixtures_data import write_nifti

SIZES = {2: (24, 32), 3: (16, 20, 24)}
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
both = pytest.mark.parametrize("build", [contrastive_views, fixed_contrastive_views], ids=["random", "fixed"])


def views_of(dims: int, seed: int = 0, **options: Any) -> Compose:
    return contrastive_views(**{"spatial_dims": dims, "crop_size": SIZES[dims], **options}).set_random_state(seed)


def crop(size: Sequence[int], seed: int = 0, channels: int = 1) -> Tensor:
    """Smooth shapes in [0, 1]."""
    coarse = torch.rand(1, channels, *[4] * len(size), generator=torch.Generator().manual_seed(seed))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return torch.nn.functional.interpolate(coarse, tuple(size), mode=mode)[0]


def correlation(first: Tensor, second: Tensor) -> float:
    return float(np.corrcoef(first.flatten(), second.flatten())[0, 1])


@two_and_three_d
@pytest.mark.parametrize("channels", [1, 2])
def test_views_differ_and_look_like_a_crop(dims: int, channels: int) -> None:
    source, views = crop(SIZES[dims], channels=channels), views_of(dims)
    for _ in range(20):
        data = views({"image": source, "case_id": "a"})
        assert set(data) == {"image", "view", "case_id"}
        for key in ("image", "view"):
            assert type(data[key]) is Tensor and data[key].dtype == torch.float32
            assert data[key].shape == source.shape
            assert data[key].min() >= 0 and data[key].max() <= 1
            assert not torch.allclose(data[key], source, atol=1e-3)
        assert (data["image"] - data["view"]).abs().mean() > 0.01


@both
@two_and_three_d
def test_crop_is_not_written_to(dims: int, build: Callable[..., Compose]) -> None:
    source, views = crop(SIZES[dims]), build(spatial_dims=dims, crop_size=SIZES[dims])
    for _ in range(10):
        views({"image": source})
    assert torch.equal(source, crop(SIZES[dims]))


@two_and_three_d
def test_seed_decides_on_everything(dims: int) -> None:
    source = {"image": crop(SIZES[dims])}
    first, again, other = (views_of(dims, seed) for seed in (1, 1, 2))
    for _ in range(5):
        expected, repeated, different = first(source), again(source), other(source)
        for key in ("image", "view"):
            assert torch.equal(expected[key], repeated[key])
            assert not torch.equal(expected[key], different[key])


@two_and_three_d
def test_views_show_the_anatomy_of_their_crop(dims: int) -> None:
    """Left unturned, a view resembles its own crop and its partner more than any other."""
    size = (48, 40, 36)[:dims]
    sources = [crop(size, seed) for seed in range(8)]
    views = views_of(dims, crop_size=size, flip_prob=0.0, smallest_part=0.9)
    pairs = [views({"image": source}) for source in sources for _ in range(3)]
    own = [correlation(pair[key], sources[n // 3]) for n, pair in enumerate(pairs) for key in ("image", "view")]
    other = [correlation(pair[key], sources[n // 3 - 1]) for n, pair in enumerate(pairs) for key in ("image", "view")]
    partners = [correlation(pair["image"], pair["view"]) for pair in pairs]
    assert np.mean(own) > 0.4 + abs(np.mean(other))
    assert np.mean(partners) > 0.15 + abs(np.mean(other))


def test_turns_stay_in_planes_with_axes_of_one_length() -> None:
    ramp = torch.linspace(0, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 24).contiguous()
    views = views_of(3, crop_size=(16, 16, 24))
    ways = []
    for _ in range(30):
        view = views({"image": ramp})["view"][0]
        assert view.shape == (16, 16, 24)
        means = [view.mean([axis for axis in range(3) if axis != way]) for way in range(3)]
        ways.append(int(np.argmax([abs(np.corrcoef(np.arange(len(m)), m)[0, 1]) for m in means])))
    assert ways.count(0) >= 5 and ways.count(1) >= 5
    assert ways.count(2) <= 3  # noise alone


@pytest.mark.parametrize("copies", [1, 3])
def test_every_crop_of_a_list_has_views_of_its_own(tmp_path: Path, copies: int) -> None:
    write_nifti(tmp_path / "a.nii.gz", (20, 22, 18))
    chain = [recipes.deterministic("mr", spatial_dims=3), recipes.random_crops(spatial_dims=3, crop_size=20)]
    crops = Compose([step for part in chain for step in part.transforms])
    whole = Compose([*crops.transforms, *views_of(3, crop_size=20).transforms])
    cases = [{"image": str(tmp_path / "a.nii.gz"), "case_id": "a"}] * copies
    dataset = CacheDataset(cases, whole, progress=False, copy_cache=False)
    kept = [entry["image"].clone() for entry in dataset._cache]
    batch = next(iter(DataLoader(dataset, batch_size=copies)))
    assert batch["image"].shape == batch["view"].shape == (copies, 1, 20, 20, 20)
    views = [*batch["image"], *batch["view"]]
    assert not any(torch.equal(a, b) for n, a in enumerate(views) for b in views[:n])
    assert all(torch.equal(a, b["image"]) for a, b in zip(kept, dataset._cache, strict=True))


def test_samples_of_one_scan_become_pairs_of_their_own() -> None:
    steps = recipes.random_crops(spatial_dims=2, crop_size=16, samples_per_case=3).transforms
    chain = Compose([*steps, *views_of(2, crop_size=16).transforms]).set_random_state(0)
    pairs = chain({"image": crop((40, 40))})
    assert len(pairs) == 3
    assert all(pair["image"].shape == pair["view"].shape == (1, 16, 16) for pair in pairs)


class TestFixed:
    @two_and_three_d
    def test_one_crop_has_the_same_views_every_time(self, dims: int) -> None:
        sources = [{"image": crop(SIZES[dims], seed)} for seed in range(3)]
        views = fixed_contrastive_views(spatial_dims=dims, crop_size=SIZES[dims])
        before = [views(source) for source in sources]
        torch.manual_seed(5)
        views.set_random_state(9)  # as every epoch does
        again = fixed_contrastive_views(spatial_dims=dims, crop_size=SIZES[dims])
        for n in (2, 0, 1):
            for repeated in (views(sources[n]), again(sources[n])):
                assert torch.equal(repeated["image"], before[n]["image"])
                assert torch.equal(repeated["view"], before[n]["view"])
        assert not torch.equal(before[0]["image"], before[0]["view"])

    def test_crops_are_not_all_disturbed_alike(self) -> None:
        """A ramp and the same ramp, slightly brighter, are not always flipped together."""
        ramp = torch.linspace(0, 0.8, 24).view(1, 24, 1).expand(1, 24, 32).contiguous()
        views = fixed_contrastive_views(spatial_dims=2, crop_size=(24, 32))
        rises = [bool(torch.diff(views({"image": ramp + n / 100})["view"].mean((0, 2))).sum() > 0) for n in range(12)]
        assert 2 <= sum(rises) <= 10

    def test_seed_gives_other_views(self) -> None:
        source = {"image": crop((24, 32))}
        first, second = (fixed_contrastive_views(spatial_dims=2, crop_size=(24, 32), seed=seed) for seed in (0, 1))
        assert not torch.equal(first(source)["image"], second(source)["image"])

    def test_threads_that_fill_a_cache_change_nothing(self) -> None:
        sources = [{"image": crop((24, 32), seed)} for seed in range(24)]
        views = fixed_contrastive_views(spatial_dims=2, crop_size=(24, 32))
        cached = CacheDataset(sources, views, progress=False, num_workers=8)
        for source, found in zip(sources, cached, strict=True):
            assert torch.equal(found["view"], views(source)["view"])


@both
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"crop_size": (16, 7)}, "crop_size: views need at least 8 voxels along each axis, got (16, 7)"),
        ({"smallest_part": 0.5}, "smallest_part: expected a share in (0.5, 1], got 0.5"),
        ({"smallest_part": 1.1}, "got 1.1"),
    ],
)
def test_options_that_do_not_fit(build: Callable[..., Compose], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        build(**{"spatial_dims": 2, "crop_size": 16, **options})
    assert told in str(error.value)
