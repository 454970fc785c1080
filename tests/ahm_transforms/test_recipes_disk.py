# SPDX-License-Identifier: Apache-2.0
"""What is prepared once and kept on disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Lambdad, RandSpatialCropd, ScaleIntensityd, ScaleIntensityRanged, Transform

from ahm_transforms import fingerprint
from ahm_transforms.io import BoundedCacheDataset
from ahm_transforms.recipes import PersistentSteps, persistent, preprocessing, validation_preprocessing


class Counted(Transform):
    """Reads the image as a MetaTensor, and counts how often."""

    calls = 0

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        Counted.calls += 1
        volume = nib.load(data["image"])
        return {**data, "image": MetaTensor(volume.get_fdata(dtype=np.float32)[None], affine=volume.affine)}


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    Counted.calls = 0
    return write(tmp_path / "scan.nii", 0)


def write(path: Path, seed: int) -> dict[str, Any]:
    values = np.random.default_rng(seed).normal(size=(20, 24, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return {"image": str(path), "case_id": "scan", "patient_id": "p", "label": 1, "block": [[0, 4], [0, 4]]}


def steps(folder: Path, *more: Transform) -> PersistentSteps:
    return PersistentSteps([Counted(), *more], folder)


def test_second_look_comes_from_disk_and_is_the_same(case: dict[str, Any], tmp_path: Path) -> None:
    plain = Counted()(case)
    first = steps(tmp_path / "new/cache")(case)
    again = steps(tmp_path / "new/cache")(case)
    assert Counted.calls == 2
    for ready in (first, again):
        assert ready.keys() == plain.keys() and {key: ready[key] for key in ready if key != "image"} == {
            key: plain[key] for key in plain if key != "image"
        }
        assert torch.equal(ready["image"].as_tensor(), plain["image"].as_tensor())
        assert torch.equal(ready["image"].affine, plain["image"].affine)
    assert [path.suffix for path in (tmp_path / "new/cache").iterdir()] == [".pt"]


def test_another_process_finds_it(case: dict[str, Any], tmp_path: Path) -> None:
    """So the name does not hang on addresses or the seed of hashes."""
    chain = preprocessing("mr", spatial_dims=3, crop_size=8, spacing_mm=2.0)
    persistent(chain, tmp_path / "cache")({key: case[key] for key in ("image", "case_id")})
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    code = (
        "import sys; from ahm_transforms.recipes import persistent, preprocessing;"
        "chain = preprocessing('mr', spatial_dims=3, crop_size=8, spacing_mm=2.0);"
        "persistent(chain, sys.argv[1])({'image': sys.argv[2], 'case_id': 'scan'})"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "cache"), case["image"]]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert len(before) == 1


@pytest.mark.parametrize("what", ["time", "size", "file of another key", "entry", "step", "version", "code"])
def test_what_has_changed_is_prepared_anew(
    case: dict[str, Any], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case["more"] = [str(tmp_path / "mask.txt")]
    Path(case["more"][0]).write_text("a")
    steps(tmp_path / "cache")(case)
    more: list[Transform] = []
    if what == "time":
        os.utime(case["image"], ns=(1, 1))
    elif what == "size":
        stat = os.stat(case["image"])
        with open(case["image"], "ab") as file:
            file.write(b"0")
        os.utime(case["image"], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif what == "file of another key":
        Path(case["more"][0]).write_text("ab")
    elif what == "entry":
        case["block"] = [[0, 4], [0, 5]]
    elif what == "step":
        more = [ScaleIntensityd("image", minv=0.1)]
    elif what == "version":
        monkeypatch.setattr(fingerprint, "version", lambda package: "9.9")
        monkeypatch.setattr(fingerprint, "_code", fingerprint._code.__wrapped__)  # not what it found before
    else:
        monkeypatch.setattr(fingerprint, "_code", lambda: ["other"])
    steps(tmp_path / "cache", *more)(case)
    assert Counted.calls == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_file_is_made_anew(case: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = steps(tmp_path / "cache")(case)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = steps(tmp_path / "cache")(case)
    assert file.name in caplog.text and "damaged" in caplog.text
    assert torch.equal(first["image"], again["image"])
    steps(tmp_path / "cache")(case)
    assert Counted.calls == 2


def test_what_is_read_back_may_be_written_to(case: dict[str, Any], tmp_path: Path) -> None:
    """The file must not change with it."""
    steps(tmp_path / "cache")(case)["image"].zero_()
    steps(tmp_path / "cache")(case)["image"].zero_()
    assert steps(tmp_path / "cache")(case)["image"].abs().sum() > 0


def test_full_disk_leaves_no_half_file(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cache_dir: cannot write to .*cache .*No space left"):
        steps(tmp_path / "cache")(case)
    assert list((tmp_path / "cache").iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=r"cache_dir: expected a folder to write to, got .*cache"):
        steps(tmp_path / "cache")


def test_what_cannot_be_read_safely_is_refused(case: dict[str, Any], tmp_path: Path) -> None:
    odd = Lambdad("case_id", func=Path)
    with pytest.raises(TypeError, match=r"cache_dir: expected tensors, arrays, numbers and text .*case_id.*Path"):
        steps(tmp_path / "cache", odd)(case)
    assert list((tmp_path / "cache").iterdir()) == []


def test_arrays_become_tensors(case: dict[str, Any], tmp_path: Path) -> None:
    case["label"] = np.arange(3)
    assert torch.equal(steps(tmp_path / "cache")(case)["label"], torch.arange(3))
    assert torch.equal(steps(tmp_path / "cache")(case)["label"], torch.arange(3))
    case["label"] = np.arange(3) + 1
    assert torch.equal(steps(tmp_path / "cache")(case)["label"], torch.arange(3) + 1)


def test_random_steps_stay_random(case: dict[str, Any], tmp_path: Path) -> None:
    scale, crop = ScaleIntensityRanged("image", 0, 1, 0, 2), RandSpatialCropd("image", (4, 4, 4), random_size=False)
    chain = persistent(Compose([Counted(), scale, crop]), tmp_path / "cache")
    assert [type(step).__name__ for step in chain.transforms] == ["PersistentSteps", "RandSpatialCropd"]
    first, second = chain(case)["image"], chain(case)["image"]
    assert first.shape == (1, 4, 4, 4) and not torch.equal(first, second) and Counted.calls == 1


def test_without_a_folder_nothing_changes() -> None:
    chain = Compose([Counted()])
    assert persistent(chain, None) is chain


def test_crops_of_validation_are_kept_as_well(case: dict[str, Any], tmp_path: Path) -> None:
    chain = validation_preprocessing("mr", spatial_dims=3, crop_size=8, samples_per_case=2)
    case = {"image": case["image"], "case_id": "scan"}
    plain, first, again = chain(case), *(persistent(chain, tmp_path / "cache")(case) for _ in range(2))
    for ready in (first, again):
        for one, other in zip(ready, plain, strict=True):
            assert torch.equal(torch.as_tensor(one["image"]), torch.as_tensor(other["image"]))


def test_memory_and_disk_together(tmp_path: Path) -> None:
    cases = [{**write(tmp_path / f"{number}.nii", number), "case_id": str(number)} for number in range(4)]
    chain = persistent(preprocessing("mr", spatial_dims=3, crop_size=8), tmp_path / "cache")
    cases = [{"image": case["image"], "case_id": case["case_id"]} for case in cases]
    dataset = BoundedCacheDataset(cases, chain, cache_rate=0.5, copy_cache=False, progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert all(crops[0]["image"].shape == (1, 8, 8, 8) for crops in dataset)
    assert len(list((tmp_path / "cache").iterdir())) == 4
