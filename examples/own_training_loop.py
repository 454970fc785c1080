# SPDX-License-Identifier: Apache-2.0
"""Train the actor-critic masker (A3C) in a PyTorch loop of your own: your network, two optimisers, no trainer of ours.

Noise that nothing can rebuild is planted in a tenth of the cells of every image, at random places. The masker hides a
quarter of the cells and is to find the noise. Printed are the network's error, the entropy of the policy (1 = all cells
are equally likely) and how often noisy cells of held-out images are hidden, over how often any cell is. With
``--frozen`` the masker does not learn, and that number stays near 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.transforms import LoadImage, Resize, ScaleIntensity
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ahm_networks import ActorCriticMasker, Masker
from ahm_transforms.masking import cells_to_image

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, PATCH, BATCH = 32, 4, 16


def main() -> None:
    """Train network and masker together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, help="a folder of pictures or volumes; smooth images without")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--frozen", action="store_true", help="do not train the masker")
    args = parser.parse_args()

    torch.manual_seed(0)
    images, noisy = plant_noise(read_images(args.dataset_dir) if args.dataset_dir else smooth_images(320))
    held_out = len(images) // 4
    network = nn.Sequential(nn.Conv2d(2, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 1, 5, padding=2)).to(DEVICE)
    masker = ActorCriticMasker(spatial_dims=2, patch_size=PATCH, mask_ratio=0.25).to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    masker_optimizer = torch.optim.Adam(masker.parameters(), 1e-3)

    for step in range(1, args.steps + 1):
        image = images[torch.randint(held_out, len(images), (BATCH,))]
        masker.set_progress(step / args.steps)  # its entropy bonus follows a schedule
        decision = masker(image)

        visible = image.masked_fill(decision.mask, 0.0)
        error = (network(torch.cat([visible, decision.mask.float()], dim=1)) - image).abs()
        loss = error[decision.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if not args.frozen:
            masker_optimizer.zero_grad()
            masker.loss([(decision, error.detach())]).backward()  # a large error is a large reward
            masker_optimizer.step()

        if step % 100 == 0 or step == args.steps:
            entropy = masker.diagnostics(decision)["policy_entropy"]
            found = times_chance(masker, images[:held_out], noisy[:held_out])
            print(f"step {step:4}  error {loss:.3f}  entropy {entropy:.2f}  noise hidden {found:.2f} times chance")
    print(f"In {held_out} held-out images, noise is hidden {found:.2f} times as often as by chance.")


@torch.no_grad()
def times_chance(masker: Masker, images: Tensor, noisy: Tensor) -> float:
    """Return how often noisy cells are hidden, over how often any cell is."""
    hidden = masker(images).cells
    return float(hidden[noisy].float().mean() / hidden.float().mean())


def smooth_images(number: int) -> Tensor:
    """Make images ``[B, 1, *S]`` that can be rebuilt: their grey changes evenly from corner to corner."""
    return interpolate(torch.rand(number, 1, 2, 2), (SIZE, SIZE), mode="bilinear", align_corners=True)


def read_images(folder: Path) -> Tensor:
    """Read small images on [0, 1], of volumes the middle slice: ``[B, 1, *S]``."""
    load, resize, scale = LoadImage(ensure_channel_first=True), Resize((SIZE, SIZE)), ScaleIntensity()
    volumes = [load(path)[:1] for path in sorted(folder.glob("[!.]*"))]
    slices = [volume if volume.ndim == 3 else volume[..., volume.shape[-1] // 2] for volume in volumes]
    return torch.stack([scale(resize(image)).as_tensor() for image in slices])


def plant_noise(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images with noise in a tenth of their cells, and these cells ``[B, 1, *G]``."""
    side = SIZE // PATCH
    noisy = (torch.rand(len(images), side**2).argsort() < side**2 // 10).view(-1, 1, side, side)
    planted = torch.where(cells_to_image(noisy, PATCH, (SIZE, SIZE)), torch.rand_like(images), images)
    return planted.to(DEVICE), noisy.to(DEVICE)


if __name__ == "__main__":
    main()
