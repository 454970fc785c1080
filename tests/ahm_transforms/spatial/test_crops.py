# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

from ahm_transforms.spatial import ClearOutsideBlockd, CropBlockd, FixedCropSamplesd, RandCropSamplesd


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).float().reshape(1, *shape)


def test_windows_lie_in_the_image_and_differ() -> None:
    img = numbered(9, 10, 11)
    crop = RandCropSamplesd(["image", "copy"], (4, 5, 6), samples=5)
    crop.set_random_state(seed=0)
    items = crop({"image": img, "copy": img.clone(), "case_id": "a"})
    assert len(items) == 5 and len({item["image"].min().item() for item in items}) > 1
    for item in items:
        assert item["case_id"] == "a" and torch.equal(item["image"], item["copy"])
        x, y, z = ((int(item["image"].min()) - 1) // step for step in (110, 11, 1))
        assert torch.equal(item["image"], img[:, x : x + 4, y % 10 : y % 10 + 5, z % 11 : z % 11 + 6])


def test_every_place_can_be_drawn() -> None:
    crop = RandCropSamplesd("image", (2,), samples=200)
    crop.set_random_state(seed=0)
    assert {item["image"][0, 0].item() for item in crop({"image": numbered(5)})} == {1.0, 2.0, 3.0, 4.0}


def test_slices_of_volumes() -> None:
    img = numbered(6, 7, 30)
    crop = RandCropSamplesd("image", (6, 7), samples=40)
    crop.set_random_state(seed=0)
    found = {(item["image"][0, 0, 0].item(), tuple(item["image"].shape)) for item in crop({"image": img})}
    assert {shape for _, shape in found} == {(1, 6, 7)}
    assert len(found) > 15


def test_small_images_are_padded_evenly_with_zeros() -> None:
    (item,) = FixedCropSamplesd("image", (6, 4, 5))({"image": torch.ones(2, 3, 4, 5)})
    assert item["image"].shape == (2, 6, 4, 5)
    assert item["image"].sum() == 2 * 3 * 4 * 5
    assert item["image"][:, 1:4].min() == 1  # one row before, two behind


def test_windows_rather_hold_something() -> None:
    img = torch.zeros(1, 64, 64)
    img[:, :20, :20] = 1
    shares = []
    for tries in (1, 8):
        crop = RandCropSamplesd("image", (16, 16), samples=100, tries=tries)
        crop.set_random_state(seed=0)
        shares.append(sum(item["image"].mean() > 0.1 for item in crop({"image": img})))
    assert shares[1] > 2 * shares[0]


def test_an_empty_image_still_gives_windows() -> None:
    assert len(RandCropSamplesd("image", (4, 4), samples=3)({"image": torch.zeros(1, 8, 8)})) == 3


def test_the_same_seed_gives_the_same_windows_and_fixed_ones_never_change() -> None:
    data = {"image": numbered(20, 20)}
    random = RandCropSamplesd("image", (4, 4), samples=4)
    draws = []
    for seed in (0, 0, 1):
        random.set_random_state(seed=seed)
        draws.append([item["image"][0, 0, 0].item() for item in random(data)])
    assert draws[0] == draws[1] != draws[2]
    fixed = FixedCropSamplesd("image", (4, 4), samples=4, seed=3)
    again = pickle.loads(pickle.dumps(fixed))
    first = [item["image"] for item in fixed(data)]
    assert all(torch.equal(a, b["image"]) for a, b in zip(first, again(data), strict=True))
    assert len({window.min().item() for window in first}) > 1


def test_windows_are_plain_tensors_that_share_no_memory_with_the_image() -> None:
    img = MetaTensor(numbered(8, 8))
    (item,) = FixedCropSamplesd("image", (4, 4))({"image": img})
    assert type(item["image"]) is torch.Tensor
    item["image"].zero_()
    assert torch.equal(img.as_tensor(), numbered(8, 8))


def labelled(*shape: int) -> dict[str, torch.Tensor]:
    """A large class 1 and a single voxel of class 3; class 2 is absent."""
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[:, : shape[0] // 2] = 1
    label[(0, *(size - 2 for size in shape))] = 3
    return {"image": numbered(*shape), "label": label}


def seeded(crop_size: tuple[int, ...], samples: int, share: float, seed: int = 0) -> RandCropSamplesd:
    crop = RandCropSamplesd(["image", "label"], crop_size, samples, tries=1, label_key="label", foreground_share=share)
    crop.set_random_state(seed=seed)
    return crop


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_windows_lies_around_classes_drawn_equally_often(share: float) -> None:
    items = seeded((3, 3), 600, share)(labelled(40, 50))
    rare = sum(bool((item["label"] == 3).any()) for item in items)
    assert rare / 600 == pytest.approx(share / 2, abs=0.05)  # two classes are there; chance alone gives 0.005
    if share == 1:
        assert all(item["label"].any() for item in items)


def test_every_window_that_holds_the_voxel_can_be_drawn() -> None:
    label = torch.zeros(1, 6, 6, dtype=torch.uint8)
    label[0, 1, 4] = 2
    items = seeded((3, 3), 200, 1.0)({"image": numbered(6, 6), "label": label})
    found = {tuple(divmod(int(item["image"][0, 0, 0]) - 1, 6)) for item in items}
    assert found == {(x, y) for x in (0, 1) for y in (2, 3)}


def test_every_voxel_of_a_class_can_be_drawn() -> None:
    label = torch.zeros(1, 7, dtype=torch.uint8)
    label[0, [1, 4, 6]] = 5
    items = seeded((1,), 100, 1.0)({"image": numbered(7), "label": label})
    assert {item["image"].item() for item in items} == {2.0, 5.0, 7.0}


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("crop_size", [(3, 4, 5), (3, 4)])
def test_image_and_label_are_cut_at_one_place_in_any_memory_order(crop_size: tuple[int, ...], fortran: bool) -> None:
    data = labelled(8, 9, 10)
    if fortran:
        data = {key: img.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for key, img in data.items()}
    whole = torch.where(data["image"] > 8 * 9 * 10 / 2, 0, 1)
    whole[0, 6, 7, 8] = 3
    assert torch.equal(whole, data["label"])
    items = seeded(crop_size, 40, 1.0)(data)
    assert sum(bool((item["label"] == 3).any()) for item in items) > 10
    for item in items:
        assert item["label"].dtype == torch.uint8 and item["label"].shape == (1, *crop_size)
        assert torch.equal(item["label"], whole.flatten()[item["image"].long() - 1].to(torch.uint8))


def test_small_labels_are_padded_with_background_where_the_image_is() -> None:
    data = {"image": torch.ones(1, 3, 8), "label": torch.full((1, 3, 8), 2, dtype=torch.uint8)}
    for item in seeded((6, 4), 20, 1.0)(data):
        assert torch.equal(item["label"], (2 * item["image"]).to(torch.uint8))
        assert item["label"].any() and not item["label"].all()


def test_a_label_without_foreground_gives_windows_all_the_same() -> None:
    data = {"image": numbered(9, 9), "label": torch.zeros(1, 9, 9, dtype=torch.uint8)}
    assert len({item["image"].min().item() for item in seeded((3, 3), 30, 1.0)(data)}) > 5


def test_classes_that_are_not_there_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = np.flatnonzero
    monkeypatch.setattr("numpy.flatnonzero", lambda where: looks.append(1) or look(where))
    label = torch.zeros(1, 9, 9, dtype=torch.uint8)
    label[0, 2, 3], label[0, 5, 6] = 60, 200
    items = seeded((3, 3), 40, 1.0)({"image": numbered(9, 9), "label": label})
    assert all(item["label"].any() for item in items) and len(looks) == 2


def test_the_share_follows_the_seed() -> None:
    data = labelled(20, 20)
    draws = [[item["image"][0, 0, 0].item() for item in seeded((4, 4), 6, 0.5, seed)(data)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_window_of_the_whole_image_shares_no_memory_with_it() -> None:
    data = {"image": numbered(4, 4)}
    RandCropSamplesd("image", (4, 4))(data)[0]["image"].zero_()
    assert torch.equal(data["image"], numbered(4, 4))


def test_absent_entries_are_passed_over() -> None:
    img = numbered(9, 7)
    options = {"label_key": "label", "foreground_share": 1.0, "allow_missing_keys": True}
    labelled = RandCropSamplesd(("image", "label"), (5, 4), 3, **options)
    unlabelled = RandCropSamplesd("image", (5, 4), 3)
    found, wanted = (crop.set_random_state(seed=0)({"image": img}) for crop in (labelled, unlabelled))
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(found, wanted, strict=True))
    assert labelled({"case_id": "a"}) == [{"case_id": "a"}] * 3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_arrays_become_tensors(share: float) -> None:
    img = numbered(9, 7)
    item = {"image": img, "label": (img == 20).to(torch.uint8), "block": [[1, 8], [2, 7]]}
    arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in item.items()}
    crop = RandCropSamplesd(("image", "label"), (5, 4), samples=3, label_key="label", foreground_share=share)
    steps = Compose([ClearOutsideBlockd(("image", "label")), crop])
    wanted, found = (steps.set_random_state(seed=0)(entry) for entry in (item, arrays))
    for one, other in zip(wanted, found, strict=True):
        assert all(type(other[key]) is torch.Tensor and torch.equal(one[key], other[key]) for key in ("image", "label"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foreground_share": 1.5, "label_key": "label"}, r"must be in \[0, 1\], got 1.5"),
        ({"foreground_share": 0.5}, "needs label_key, one of the keys"),
        ({"label_key": "mask"}, "got 'mask'"),
    ],
)
def test_wrong_arguments_for_labels(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandCropSamplesd(["image", "label"], (4, 4), **options)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, got \(4, 0\), 1 and 4"):
        RandCropSamplesd("image", (4, 0))
    with pytest.raises(ValueError, match="crop_size: expected a size for each axis of the window, got 4"):
        RandCropSamplesd("image", 4)
    with pytest.raises(ValueError, match="has more axes than the image"):
        FixedCropSamplesd("image", (4, 4, 4))({"image": torch.zeros(1, 8, 8)})


@pytest.mark.parametrize("crop", [RandCropSamplesd, FixedCropSamplesd])
def test_entries_of_different_sizes_are_refused(crop: type) -> None:
    data = {"image": torch.zeros(1, 20, 20), "label": torch.zeros(1, 16, 20)}
    with pytest.raises(ValueError, match=r"keys: expected entries of one size, got .*'label': \(16, 20\)"):
        crop(["image", "label"], (4, 4))(data)


def test_block_is_cut_and_can_be_inverted() -> None:
    img = MetaTensor(numbered(6, 8, 10))
    chain = Compose([CropBlockd("image")])
    data = chain({"image": img, "block": [[1, 5], [0, 8], [4, 10]], "case_id": "a"})
    assert torch.equal(data["image"].as_tensor(), img[:, 1:5, :, 4:].as_tensor())
    assert data["image"].affine[:3, 3].tolist() == [1, 0, 4]
    assert set(data) == {"image", "case_id"}
    back = Invertd("image", transform=chain, orig_keys="image", nearest_interp=False)(data)["image"]
    assert back.shape == img.shape and torch.equal(back[:, 1:5, :, 4:], data["image"])


def test_block_holds_no_memory_of_the_whole_image_and_no_block_is_the_whole() -> None:
    img = numbered(6, 8, 10)
    cut = CropBlockd("image")({"image": img, "block": [[0, 2], [0, 2], [0, 2]]})["image"]
    assert cut.untyped_storage().nbytes() == 8 * 4
    assert torch.equal(CropBlockd("image")({"image": img})["image"], img)


def test_outside_the_block_is_cleared_and_the_input_left_alone() -> None:
    label = MetaTensor(torch.ones(1, 6, 8, dtype=torch.uint8), affine=torch.eye(4) * 2)
    data = {"label": label, "block": [[1, 5], [0, 4]]}
    out = ClearOutsideBlockd("label")(data)
    wanted = np.zeros((1, 6, 8))
    wanted[:, 1:5, :4] = 1
    np.testing.assert_array_equal(out["label"], wanted)
    assert out["label"].dtype == torch.uint8 and torch.equal(out["label"].affine, label.affine)
    assert label.all() and out["block"] == data["block"]
    assert ClearOutsideBlockd("label")({"label": label})["label"].all()
