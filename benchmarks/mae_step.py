# SPDX-License-Identifier: Apache-2.0
"""What the mask as an input costs: a training step of our MAE over one of MONAI's, which draws its mask inside.

Both have the same sizes, learned positions, L1 error over the hidden tokens and optimiser. Ours draws its mask in a
``UniformMasker`` and goes by way of the image; MONAI's gets its error from tokens. MONAI's has a class token more.

python -m benchmarks.mae_step [--rounds 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from ahm_engines.losses import MaskedLoss
from ahm_networks import UniformMasker
from ahm_networks.nets import MaskedAutoencoder, image_to_tokens
from benchmarks._paired import Paired, paired, peak_memory_mb, report

RATIO = 0.75
PATCH = 16


class Size(NamedTuple):
    """What both networks are built with."""

    image: tuple[int, ...]
    encoder: dict[str, Any]
    decoder_width: int
    decoder_layers: int
    decoder_heads: int


SMALL_ENCODER = {"hidden_size": 192, "mlp_dim": 768, "num_layers": 6, "num_heads": 6}
ENCODER = {"hidden_size": 384, "mlp_dim": 1536, "num_layers": 6, "num_heads": 6}
SIZES = {
    "mae 16x1x128x128": Size((16, 1, 128, 128), SMALL_ENCODER, 128, 2, 4),
    "mae 2x1x64x64x64": Size((2, 1, 64, 64, 64), ENCODER, 192, 2, 6),
    "mae 2x1x96x96x96": Size((2, 1, 96, 96, 96), ENCODER, 192, 2, 6),
}


def our_step(size: Size) -> Callable[[], object]:
    """Draw a mask, rebuild, step."""
    dims = len(size.image) - 2
    masker, loss_function = UniformMasker(dims, PATCH, RATIO), MaskedLoss("l1")
    network = MaskedAutoencoder(
        dims,
        img_size=size.image[2:],
        patch_size=PATCH,
        encoder_args=size.encoder,
        decoder_hidden_size=size.decoder_width,
        decoder_num_layers=size.decoder_layers,
        decoder_num_heads=size.decoder_heads,
    )

    def loss(image: Tensor) -> Tensor:
        mask = masker(image).mask
        return loss_function(network(image, mask), image, mask)

    return _step(network, loss, size.image)


def monai_step(size: Size) -> Callable[[], object]:
    """Rebuild with a mask drawn inside, step."""
    dims = len(size.image) - 2
    network = MaskedAutoEncoderViT(
        1,
        size.image[2:],
        PATCH,
        **size.encoder,
        masking_ratio=RATIO,
        decoder_hidden_size=size.decoder_width,
        decoder_mlp_dim=4 * size.decoder_width,
        decoder_num_layers=size.decoder_layers,
        decoder_num_heads=size.decoder_heads,
        pos_embed_type="learnable",
        decoder_pos_embed_type="learnable",
        spatial_dims=dims,
    )

    def loss(image: Tensor) -> Tensor:
        tokens, hidden = network(image)
        error = (tokens - image_to_tokens(image, [PATCH] * dims)).abs().mean(-1)
        return (error * hidden).sum() / hidden.sum()

    return _step(network, loss, size.image)


def _step(network: nn.Module, loss: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> Callable[[], object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    image = torch.rand(size).to(device)
    optimizer = torch.optim.AdamW(network.to(device).parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(image).backward()
        optimizer.step()

    return step


def compare_mae(rounds: int = 20) -> tuple[dict[str, Paired], dict[str, list[float | None]]]:
    """Time both at every size; returns the comparisons and the peak MiB of a step, MONAI's and ours, by name."""
    rows, memory = {}, {}
    for name, size in SIZES.items():
        theirs, ours = monai_step(size), our_step(size)
        rows[name] = paired(theirs, ours, rounds=rounds)
        memory[name] = [peak_memory_mb(theirs), peak_memory_mb(ours)]
    return rows, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    rows, memory = compare_mae(parser.parse_args().rounds)
    for name, peaks in memory.items():
        print(f"{name}: peak MiB of a step, MONAI and ours: {peaks}")
    report(rows, labels=("MONAI", "ours"), extra={"peak_mib": memory})


if __name__ == "__main__":
    main()
