# SPDX-License-Identifier: Apache-2.0
"""Hide parts of images in a plain MONAI classification pipeline, as one more augmentation.

MONAI's SupervisedTrainer trains MONAI's DenseNet twice, without masks and with a mask transform among MONAI's own.
Printed is the accuracy of both on test images as they are, and on the same images with half of their cells hidden.
Without ``--dataset_dir`` small discs are told from large ones. One seed, few images: this shows how the transforms are
used, not that they help your task.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_2d, partition_dataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import DenseNet121
from monai.utils import set_determinism
from PIL import Image
from torch import nn

from ahm_engines import load_masker
from ahm_transforms import AdaptiveHardMaskd, RandBoxMaskd, RandPatchMaskd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, PATCH, BATCH = 48, 8, 8
LOADING = [
    mt.LoadImaged("image", reader="PILReader", converter=lambda picture: picture.convert("L")),
    mt.EnsureChannelFirstd("image"),
    mt.ScaleIntensityd("image"),
    mt.Resized("image", (SIZE, SIZE)),
]


def main(args: argparse.Namespace, folder: Path) -> None:
    """Train twice and compare; ``folder`` is for generated images."""
    classes = sorted(path for path in (args.dataset_dir or write_discs(folder, args.images)).iterdir() if path.is_dir())
    files = [{"image": path, "label": label} for label, part in enumerate(classes) for path in part.glob("[!.]*")]
    training, test = partition_dataset(files, ratios=[3, 1], shuffle=True)  # with several images each: by patient
    print(f"{len(training)} training, {len(test)} test images of {', '.join(path.name for path in classes)}")
    whole = [mt.Compose(LOADING)(file) for file in test]
    hide_half = RandPatchMaskd("image", PATCH, mask_ratio=0.5).set_random_state(0)
    half_hidden = [hide_half(item) for item in whole]

    # Every other image is masked; the trainer gets image and label, not the mask.
    hide = [mask_transform(args), mt.SelectItemsd(("image", "label"))]
    for name, masking in {"no masks": [], args.masks: hide}.items():
        set_determinism(0)
        augmentation = [mt.RandFlipd("image", prob=0.5, spatial_axis=1), *masking]
        network = train(Dataset(training, mt.Compose([*LOADING, *augmentation])), len(classes), args.epochs)
        print(
            f"trained with {name:8}  accuracy {accuracy(network, whole):.2f}, "
            f"with half of the image hidden {accuracy(network, half_hidden):.2f}"
        )


def mask_transform(args: argparse.Namespace) -> mt.Transform:
    """Return what hides a part of every other image."""
    if args.masks == "learned":
        return AdaptiveHardMaskd("image", load_masker(args.checkpoint), draw=True, prob=0.5)
    if args.masks == "boxes":
        return RandBoxMaskd("image", 4, 2 * PATCH, prob=0.5)
    return RandPatchMaskd("image", PATCH, 0.5, prob=0.5)


def train(dataset: Dataset, classes: int, epochs: int) -> nn.Module:
    """Train as one would without this project; the network is small, so that this takes seconds."""
    network = DenseNet121(2, 1, classes, init_features=32, growth_rate=16, block_config=(2, 2, 2, 2)).to(DEVICE)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    SupervisedTrainer(DEVICE, epochs, loader, network, optimizer, nn.CrossEntropyLoss()).run()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, items: list[dict[str, Any]]) -> float:
    """Return the share of images whose class is found."""
    right = [network(item["image"][None].to(DEVICE)).argmax().item() == item["label"] for item in items]
    return sum(right) / len(right)


def write_discs(folder: Path, images: int) -> Path:
    """Write pictures of noisy discs, small ones and large ones, each kind into a folder."""
    state = np.random.RandomState(0)
    for index in range(images):
        kind, radius = [("small", 3), ("large", 6)][index % 2]
        image, _ = create_test_image_2d(SIZE, SIZE, 6, radius + 1, radius, noise_max=0.5, random_state=state)
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray((image * 255).clip(0, 255).astype(np.uint8)).save(folder / kind / f"{index}.png")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, help="a folder with a folder of pictures for each class")
    parser.add_argument("--masks", choices=("patches", "boxes", "learned"), default="patches")
    parser.add_argument("--checkpoint", type=Path, help="for learned masks: a model.pt of ahm_pretrain for pictures")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=200, help="how many to generate")
    options = parser.parse_args()
    if options.masks == "learned" and not (options.checkpoint and options.checkpoint.is_file()):
        parser.error(f"--masks learned needs --checkpoint, a file of ahm_pretrain; got {options.checkpoint}")
    with tempfile.TemporaryDirectory() as generated:
        main(options, Path(generated))
