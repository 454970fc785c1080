# SPDX-License-Identifier: Apache-2.0
"""The dictionary transforms inside MONAI: chains, caches, loaders, missing keys."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, set_track_meta
from monai.transforms import Compose, MapTransform, OneOf, Randomizable, RandomOrder, ScaleIntensityd, Spacingd
from monai.transforms.traits import RandomizableTrait
from torch import Tensor

import ahm_transforms
from ahm_transforms import AdaptiveHardMaskd, RandBoxMaskd, RandPatchMaskd

AFFINE = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))


def coin(image: Tensor) -> tuple[Tensor, Tensor]:
    return torch.rand(image[:, :1].shape) < 0.5, image[..., ::4, ::4]


MAKERS = {
    "patch": lambda keys="image", **options: RandPatchMaskd(keys, 4, 0.5, **options),
    "box": lambda keys="image", **options: RandBoxMaskd(keys, 2, 4, **options),
    "adaptive": lambda keys="image", **options: AdaptiveHardMaskd(keys, coin, **options),
}
every_transform = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def items(count: int = 1, *shape: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(shape or (1, 16, 16), generator=generator) + 1.0} for _ in range(count)]


@every_transform
def test_keys_share_one_mask_and_originals_are_kept(make):
    data = {"t1": items()[0]["image"], "t2": items()[0]["image"] + 5, "id": "p1"}
    before = {key: value.clone() for key, value in data.items() if key != "id"}
    out = make(keys=["t1", "t2"], original_key=["t1c", "t2c"]).set_random_state(seed=0)(data)
    assert set(out) == {"t1", "t2", "t1c", "t2c", "mask", "id"}
    assert set(data) == {"t1", "t2", "id"}
    for key, original in (("t1", "t1c"), ("t2", "t2c")):
        assert torch.equal(out[original].as_tensor(), before[key])
        assert torch.equal(data[key], before[key])
        assert torch.equal((out[key] == 0).as_tensor(), out["mask"].as_tensor())
        out[key] += 1
        assert torch.equal(out[original].as_tensor(), before[key])


@every_transform
def test_mask_has_the_metadata_of_the_image(make):
    image = MetaTensor(torch.rand(1, 8, 8, 8), affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    transform = AdaptiveHardMaskd("image", lambda image: image > 0.5) if make is MAKERS["adaptive"] else make()
    out = transform({"image": image})
    for key in ("image", "mask"):
        assert torch.equal(out[key].affine, image.affine)
        assert out[key].meta["filename_or_obj"] == "a.nii.gz"
    assert out["mask"].dtype == torch.bool
    out["mask"].meta["new"] = 1
    assert "new" not in image.meta


@every_transform
def test_metadata_tracking_can_be_off(make):
    set_track_meta(False)
    try:
        out = make()({"image": MetaTensor(items()[0]["image"])})
    finally:
        set_track_meta(True)
    assert type(out["image"]) is Tensor
    assert type(out["mask"]) is Tensor


@every_transform
def test_missing_keys(make):
    data = items()[0]
    with pytest.raises(KeyError, match="other"):
        make(keys=["other", "image"])(data)
    lenient = make(keys=["other", "image"], allow_missing_keys=True)
    out = lenient(data)
    assert set(out) == {"image", "mask"}
    assert out["mask"].any()
    assert lenient({"id": 1}) == {"id": 1}


@every_transform
def test_images_of_two_shapes_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"'t2'.*expected the spatial shape of the mask"):
        make(keys=["t1", "t2"])({"t1": torch.rand(1, 16, 16), "t2": torch.rand(1, 8, 8)})


@every_transform
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_key": "image"}, "'image', which would overwrite"),
        ({"mask_key": "image_mask"}, "'image_mask' .*Spacingd"),
        ({"original_key": "image_target"}, "'image_target' .*Spacingd"),
        ({"original_key": "mask"}, "'mask', which would overwrite"),
        ({"original_key": ["a", "b"]}, "original_key: expected one name for each"),
    ],
)
def test_names_that_would_do_harm_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_masks_ahead_of_spacingd():
    image = MetaTensor(torch.rand(1, 8, 8, 8), affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    chain = Compose([RandPatchMaskd("image", 4, 0.5, original_key="target"), Spacingd("image", (4.0, 4.0, 4.0))])
    assert chain({"image": image})["image"].shape[1:] != image.shape[1:]


@every_transform
@pytest.mark.parametrize("kind", [Compose, OneOf, RandomOrder])
def test_chains_repeat_with_a_seed(make, kind):
    data = items()[0]
    chain = kind([make(), make()]) if kind is OneOf else kind([ScaleIntensityd("image"), make()])
    runs = [chain.set_random_state(seed=2)(data) for _ in range(2)]
    assert torch.equal(runs[0]["image"].as_tensor(), runs[1]["image"].as_tensor())
    assert torch.equal(runs[0]["mask"].as_tensor(), runs[1]["mask"].as_tensor())
    assert runs[0]["mask"].any()
    assert not torch.equal(chain(data)["mask"].as_tensor(), runs[0]["mask"].as_tensor())


@every_transform
@pytest.mark.parametrize("copy_cache", [True, False])
def test_cache_is_neither_masked_nor_modified(make, copy_cache):
    data = [{"image": MetaTensor(item["image"])} for item in items(3)]
    cached = CacheDataset(
        data, Compose([ScaleIntensityd("image"), make()]), num_workers=0, copy_cache=copy_cache, progress=False
    )
    before = [item["image"].clone() for item in cached._cache]
    masks = torch.stack([cached[i]["mask"].as_tensor() for i in (0, 1, 2, 0, 1, 2)])
    assert len(torch.unique(masks, dim=0)) == 6
    for item, image in zip(cached._cache, before, strict=True):
        assert set(item) == {"image"}
        assert torch.equal(item["image"].as_tensor(), image.as_tensor())


def load_masks(make, workers: int, context: str | None, epochs: int = 2) -> Tensor:
    torch.manual_seed(0)
    chain = Compose([make()]).set_random_state(seed=0)
    loader = DataLoader(Dataset(items(4), chain), batch_size=2, num_workers=workers, multiprocessing_context=context)
    return torch.stack([batch["mask"].as_tensor() for _ in range(epochs) for batch in loader]).flatten(0, 1)


@every_transform
@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork")])
def test_loader_masks_differ_by_sample_worker_and_epoch_and_repeat(make, workers, context):
    masks = load_masks(make, workers, context)
    assert masks.shape == (8, 1, 16, 16)
    assert len(torch.unique(masks, dim=0)) == 8
    assert torch.equal(load_masks(make, workers, context), masks)


class CoinProgram(torch.nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.rand_like(image) < 0.5).to(torch.uint8), image[:, :, ::4, ::4]


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (1, "spawn")])
def test_torchscript_file_in_loader_workers(tmp_path, workers, context):
    path = tmp_path / "coin.ts"
    torch.jit.script(CoinProgram()).save(str(path))
    transform = AdaptiveHardMaskd("image", path, policy_key="policy")
    transform(items()[0])  # opened here too: the workers must open it for themselves
    dataset = Dataset(items(4), transform)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert len(torch.unique(torch.cat([batch["mask"].as_tensor() for batch in batches]), dim=0)) == 4
    assert torch.equal(batches[1]["policy"], torch.stack([d["image"][:, ::4, ::4] for d in items(4)[2:]]))


@pytest.mark.parametrize("name", ["patch", "box"])
def test_images_left_alone_still_collate(name):
    transform = MAKERS[name](prob=0.5, original_key="target").set_random_state(seed=0)
    batch = next(iter(DataLoader(Dataset(items(16), transform), batch_size=16)))
    untouched = ~batch["mask"].as_tensor().flatten(1).any(1)
    assert 0 < untouched.sum() < 16
    assert torch.equal(batch["image"][untouched].as_tensor(), batch["target"][untouched].as_tensor())


@every_transform
def test_image_left_alone_shares_no_memory_with_the_original(make):
    out = (MAKERS["patch"] if make is MAKERS["adaptive"] else make)(prob=0.0, original_key="target")(items()[0])
    out["image"] += 1
    assert not torch.equal(out["image"].as_tensor(), out["target"].as_tensor())


@every_transform
def test_pickle_keeps_the_random_state(make):
    transform = make().set_random_state(seed=1)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(items()[0])["mask"].as_tensor(), transform(items()[0])["mask"].as_tensor())


@every_transform
def test_dictionary_form_draws_what_the_array_form_draws(make):
    transform = make()
    array = pickle.loads(pickle.dumps(transform.transform)).set_random_state(seed=4)
    out = transform.set_random_state(seed=4)(items()[0])
    assert torch.equal(out["image"].as_tensor(), array(items()[0]["image"]).as_tensor())


@every_transform
def test_traits_and_numpy_input(make):
    transform = make()
    assert isinstance(transform, MapTransform) and isinstance(transform, Randomizable | RandomizableTrait)
    assert transform.backend == transform.transform.backend
    array = np.random.RandomState(0).rand(1, 16, 16).astype(np.float32) + 1
    out = transform({"image": array})
    assert isinstance(out["image"], MetaTensor)
    assert array.min() >= 1


def test_policy_map_is_written_when_asked_for():
    data = items()[0]
    out = AdaptiveHardMaskd("image", coin, policy_key="policy")(data)
    assert torch.equal(out["policy"], data["image"][:, ::4, ::4])
    assert "policy" not in AdaptiveHardMaskd("image", coin)(data)


def test_policy_map_that_the_masker_does_not_give():
    with pytest.raises(ValueError, match="policy_key: expected the masker to answer with a policy map for 'policy'"):
        AdaptiveHardMaskd("image", lambda image: image > 0, policy_key="policy")(items()[0])


@pytest.mark.parametrize("policy_key", ["image", "mask", "image_policy"])
def test_policy_key_is_checked(policy_key):
    with pytest.raises(ValueError, match="policy_key"):
        AdaptiveHardMaskd("image", coin, policy_key=policy_key)


def test_policy_key_needs_a_policy_map_of_every_image():
    with pytest.raises(ValueError, match=r"policy_key: expected prob=1 with 'policy', got 0\.5"):
        AdaptiveHardMaskd("image", coin, policy_key="policy", prob=0.5)


def test_aliases_as_in_monai():
    for name in ("RandPatchMask", "RandBoxMask", "AdaptiveHardMask"):
        forms = {getattr(ahm_transforms, name + suffix) for suffix in ("d", "D", "Dict")}
        assert len(forms) == 1
        assert name in ahm_transforms.__all__
