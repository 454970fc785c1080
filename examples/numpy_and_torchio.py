# SPDX-License-Identifier: Apache-2.0
"""Mask transforms outside MONAI: NumPy arrays in and out, and a step in a TorchIO pipeline.

Printed is, for three transforms, what becomes of an array. If TorchIO is installed (``pip install torchio``), a
``torchio.Subject`` is masked as well and then flipped by TorchIO, and the mask is compared with the hidden voxels.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from ahm_transforms import AdaptiveHardMask, RandBoxMask, RandPatchMask
from ahm_transforms.masking import MaskTransform

try:
    import torchio as tio
except ImportError:
    tio = None


def main() -> None:
    """Mask a generated volume, or each of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, help="a folder of volumes, NIfTI; one noisy ball without")
    folder = parser.parse_args().dataset_dir
    for volume in [read(path) for path in sorted(folder.glob("*.nii*"))] if folder else [ball()]:
        mask_array(volume)
        if tio is None:
            print("TorchIO is not installed; pip install torchio for the second part.")
        else:
            mask_subject(volume)


def mask_array(volume: NDArray[np.float32]) -> None:
    """Mask an array of shape ``S``: the transforms take ``[C, *S]`` and return tensors, hence the two ``[...]``."""
    transforms = {
        "cells of the body": RandPatchMask(patch_size=8, mask_ratio=0.6, foreground=0.1),
        "four boxes": RandBoxMask(num_boxes=4, box_size=12, fill="mean"),
        "a function of yours": AdaptiveHardMask(lambda image: image > image.amax() / 2),
    }
    for name, hide in transforms.items():
        hide.set_random_state(seed=0)
        masked = hide(volume[None]).numpy()[0]
        mask = hide.mask.numpy()[0]
        body, air = mask[volume > 0.1].mean(), mask[volume <= 0.1].mean()
        kept = "kept" if np.array_equal(masked[~mask], volume[~mask]) else "changed"
        hidden = f"{body:.2f} of the body, {air:.2f} of the air hidden"
        print(f"{name:19}  {masked.dtype} {masked.shape}: {hidden}; rest {kept}")


class HideInSubject:
    """A step for ``torchio.Compose``: hides the same voxels in all intensity images and adds the mask as a label map.

    The seed comes from torch's generator, as in TorchIO's own transforms, so that DataLoader workers differ.
    """

    def __init__(self, hide: MaskTransform) -> None:
        self.hide = hide

    def __call__(self, subject: Any) -> Any:
        """Return a masked copy."""
        subject = copy.deepcopy(subject)
        images = subject.get_images(intensity_only=True)
        self.hide.set_random_state(seed=int(torch.randint(2**31, ())))
        self.hide.randomize(images[0].data)
        for image in images:
            image.set_data(self.hide(image.data, randomize=False).as_tensor())
        subject.add_image(tio.LabelMap(tensor=self.hide.mask, affine=images[0].affine), "mask")
        return subject


def mask_subject(volume: NDArray[np.float32]) -> None:
    """Mask a subject ahead of a step of TorchIO's own; hidden voxels are -1, to find them again."""
    torch.manual_seed(0)
    hide = HideInSubject(RandPatchMask(patch_size=8, mask_ratio=0.6, fill=-1.0))
    transform = tio.Compose([hide, tio.RandomFlip(axes=0, flip_probability=1)])
    subject = transform(tio.Subject(scan=tio.ScalarImage(tensor=volume[None])))
    mask, hidden = subject.mask.data.bool(), subject.scan.data == -1
    overlap = (mask & hidden).sum() / (mask | hidden).sum()
    print(f"TorchIO              {hidden.float().mean():.2f} of the volume hidden, mask overlaps by {overlap:.2f}")


def ball() -> NDArray[np.float32]:
    """Return a noisy ball in an empty box, on [0, 1]."""
    inside = sum(axis**2 for axis in np.ogrid[-1:1:40j, -1:1:48j, -1:1:44j]) < 0.6
    return np.where(inside, np.random.default_rng(0).uniform(0.2, 1.0, inside.shape), 0.0).astype(np.float32)


def read(path: Path) -> NDArray[np.float32]:
    """Read a volume and scale it to [0, 1]."""
    volume = nib.load(path).get_fdata(dtype=np.float32)
    return (volume - volume.min()) / (np.ptp(volume) or 1.0)


if __name__ == "__main__":
    main()
