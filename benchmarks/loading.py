# SPDX-License-Identifier: Apache-2.0
"""From file to crops: our recipe against the usual MONAI chain; run ``python -m benchmarks.loading``."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    Spacingd,
)
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ahm_transforms.io import find_cases
from ahm_transforms.recipes import deterministic, persistent, preprocessing
from benchmarks._paired import Paired, paired, peak_memory_mb, report

SHAPE = (256, 256, 128)
VOXEL_MM = (0.9, 0.9, 1.5)
SPACING_MM = 1.2
WINDOW_HU = (-175.0, 250.0)
CROP, SAMPLES = 96, 4


def phantom() -> np.ndarray:
    """Return a noisy ball in air as int16: it compresses about as well as a CT scan."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij", sparse=True)
    inside = sum(axis**2 for axis in axes) < 0.7
    noise = np.random.default_rng(0).normal(40, 12, SHAPE)
    return np.where(inside, noise, -1000).astype(np.int16)


def write_nifti(values: np.ndarray, folder: Path) -> str:
    path = folder / "volume.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-VOXEL_MM[0], -VOXEL_MM[1], VOXEL_MM[2], 1])), path)
    return str(path)


def write_series(values: np.ndarray, folder: Path) -> str:
    series = folder / "series"
    series.mkdir()
    uid = generate_uid()
    for index in range(values.shape[2]):
        _write_slice(series / f"{index:04d}.dcm", values[:, :, index], index, uid)
    return str(series)


def monai_chain() -> Compose:
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(SPACING_MM,) * 3),
            ScaleIntensityRanged("image", *WINDOW_HU, 0.0, 1.0, clip=True),
        ]
    )


def monai_training_chain() -> Compose:
    crop = RandSpatialCropSamplesd("image", roi_size=(CROP,) * 3, num_samples=SAMPLES, random_size=False)
    flips = [RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)]
    return Compose([*monai_chain().transforms, crop, *flips])


def our_chain() -> Compose:
    return deterministic("ct", spatial_dims=3, spacing_mm=SPACING_MM, window_hu=WINDOW_HU)


def our_training_chain() -> Compose:
    return preprocessing(
        "ct",
        spatial_dims=3,
        crop_size=CROP,
        samples_per_case=SAMPLES,
        spacing_mm=SPACING_MM,
        window_hu=WINDOW_HU,
    )


def from_disk(chain: Compose, image: str | list[str]) -> Callable[[], object]:
    dataset = Dataset([{"image": image}], chain)
    return lambda: dataset[0]


def from_cache(chain: Compose, image: str | list[str], *, copy_cache: bool) -> Callable[[], object]:
    dataset = CacheDataset([{"image": image}], chain, progress=False, copy_cache=copy_cache)
    return lambda: dataset[0]


def prepared(dataset: Dataset) -> Callable[[], object]:
    dataset[0]  # prepares it
    return lambda: dataset[0]


def compare(folder: Path, rounds: int) -> tuple[dict[str, Paired], dict[str, dict[str, float | None]]]:
    values = phantom()
    nifti, series = write_nifti(values, folder), write_series(values, folder)
    files = find_cases(series).cases[0]["image"]
    contenders = {
        "nii.gz to volume": (from_disk(monai_chain(), nifti), from_disk(our_chain(), nifti)),
        "nii.gz to 4 crops": (from_disk(monai_training_chain(), nifti), from_disk(our_training_chain(), nifti)),
        "DICOM to volume": (from_disk(monai_chain(), series), from_disk(our_chain(), files)),
        "DICOM to 4 crops": (from_disk(monai_training_chain(), series), from_disk(our_training_chain(), files)),
        "cached volume to 4 crops": (
            from_cache(monai_training_chain(), nifti, copy_cache=True),
            from_cache(our_training_chain(), nifti, copy_cache=False),
        ),
        "volume prepared on disk to 4 crops": (
            prepared(PersistentDataset([{"image": nifti}], monai_training_chain(), folder / "monai")),
            prepared(Dataset([{"image": nifti}], persistent(our_training_chain(), folder / "ours"))),
        ),
    }
    rows = {name: paired(monai, ours, rounds=rounds, warmup=2) for name, (monai, ours) in contenders.items()}
    memory = {
        name: {"monai": peak_memory_mb(monai), "ours": peak_memory_mb(ours)}
        for name, (monai, ours) in contenders.items()
    }
    return rows, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often each contender is timed")
    parser.add_argument("--threads", type=int, default=1, help="of torch; a DataLoader worker has one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # MONAI's readers report which optional packages are absent
    print(f"milliseconds per volume of {SHAPE} voxels, {VOXEL_MM} mm to {SPACING_MM} mm, {options.threads} thread(s)")
    print("ratio = ours / MONAI")
    with tempfile.TemporaryDirectory() as folder:
        rows, memory = compare(Path(folder), options.rounds)
    report(rows, labels=("MONAI", "ours"), extra={"peak_memory_mb": memory})


def _write_slice(path: Path, values: np.ndarray, index: int, series_uid: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    file.SeriesInstanceUID, file.StudyInstanceUID = series_uid, series_uid
    file.Modality, file.PatientID, file.InstanceNumber = "CT", "phantom", index + 1
    file.Columns, file.Rows = values.shape
    file.PixelSpacing = [VOXEL_MM[1], VOXEL_MM[0]]
    file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    file.ImagePositionPatient = [0, 0, VOXEL_MM[2] * index]
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.PixelData = (values.T + 1024).astype("<i2").tobytes()
    file.save_as(path)


if __name__ == "__main__":
    main()
