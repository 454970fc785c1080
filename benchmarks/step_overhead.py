# SPDX-License-Identifier: Apache-2.0
"""What a learned mask costs: one training step with each masker over one with uniform masks.

python -m benchmarks.step_overhead [--all] [--rounds 60]

With --all, every masker that the pretraining bundle offers, and a step of our masked autoencoder, which is given its
mask, over one of MONAI's, which draws its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ahm_engines import MaskedTrainer
from ahm_networks import (
    ActorCriticMasker,
    BoxMasker,
    LossPredictionMasker,
    Masker,
    QRegionMasker,
    ReconstructionUNet,
    TeacherErrorMasker,
    UniformMasker,
    VisibleSamplingMasker,
)
from benchmarks._paired import Paired, paired, peak_memory_mb, report
from benchmarks.mae_step import compare_mae

SIZES = {"12x1x128x128": (12, 1, 128, 128), "2x1x64x64x64": (2, 1, 64, 64, 64)}
Build = Callable[[int, int, float, nn.Module], Masker]


def plain(masker: Callable[..., Masker], **options: object) -> Build:
    """Build a masker that needs no network but its own."""
    return lambda dims, patch, ratio, network: masker(dims, patch, ratio, **options)


def teacher(**options: Any) -> Build:
    return lambda dims, patch, ratio, network: TeacherErrorMasker(dims, patch, ratio, network=network, **options)


UNIFORM = plain(UniformMasker)
LEARNED = {
    "a3c": plain(ActorCriticMasker),
    "a3c_bernoulli": plain(ActorCriticMasker, mode="bernoulli"),
    "loss_prediction": plain(LossPredictionMasker),
    "boxes": plain(BoxMasker),
    "boxes_actor_critic": plain(BoxMasker, learner="actor_critic"),
    "q_region": plain(QRegionMasker),
    "teacher_error": teacher(),
    "teacher_error, 1 pass": teacher(passes=1),
    "adamae": plain(VisibleSamplingMasker),
}


def training_step(size: tuple[int, ...], build: Build) -> Callable[[], object]:
    """One iteration of the trainer on a batch of random numbers; the masker alone chooses, in the default patches."""
    dims = len(size) - 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = ReconstructionUNet(dims).to(device)
    masker = build(dims, 16 if dims == 2 else 8, 0.6, network).to(device)
    weights = [weight for weight in masker.parameters() if weight.requires_grad]
    batch = {"image": torch.rand(size).to(device)}
    trainer = MaskedTrainer(
        device,
        1,
        [batch],
        network,
        torch.optim.AdamW(network.parameters(), 1e-4),
        masker,
        masker_optimizer=torch.optim.Adam(weights, 1e-4, fused=True) if weights else None,
    )
    return lambda: trainer._iteration(trainer, batch)


def compare(size: tuple[int, ...], build: Build, rounds: int) -> tuple[Paired, list[float | None]]:
    uniform, learned = training_step(size, UNIFORM), training_step(size, build)
    timed = paired(uniform, learned, rounds=rounds, warmup=10)
    return timed, [peak_memory_mb(uniform), peak_memory_mb(learned)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every learned masker, not only the actor-critic; and MAE")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    rows, memory = {}, {}
    for name, build in LEARNED.items():
        if name != "a3c" and not arguments.all:
            continue
        for label, size in SIZES.items():
            key = f"{name} {label}"
            rows[key], memory[key] = compare(size, build, arguments.rounds)
            print(f"{key}: peak MiB of a step, uniform and learned: {memory[key]}", flush=True)
    report(rows, labels=("uniform", "learned"), extra={"peak_mib": memory})
    if arguments.all:
        rows, memory = compare_mae(arguments.rounds)
        report(rows, labels=("MONAI's", "ours"), extra={"peak_mib": memory})


if __name__ == "__main__":
    main()
