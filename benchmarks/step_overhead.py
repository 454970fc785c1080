# SPDX-License-Identifier: Apache-2.0
"""What a learned mask costs: one training step with each masker over one with uniform masks.

python -m benchmarks.step_overhead [--all] [--rounds 60]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from ahm_engines import MaskedTrainer
from ahm_networks import ActorCriticMasker, LossPredictionMasker, Masker, ReconstructionUNet, UniformMasker
from benchmarks._paired import Paired, paired, peak_memory_mb, report

SIZES = {"12x1x128x128": (12, 1, 128, 128), "2x1x64x64x64": (2, 1, 64, 64, 64)}
LEARNED: dict[str, Callable[..., Masker]] = {
    "a3c": ActorCriticMasker,
    "a3c_bernoulli": partial(ActorCriticMasker, mode="bernoulli"),
    "loss_prediction": LossPredictionMasker,
}


def training_step(size: tuple[int, ...], build: Callable[..., Masker]) -> Callable[[], object]:
    """One iteration of the trainer on a batch of random numbers, the default network and patch size."""
    dims = len(size) - 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    masker = build(dims, 16 if dims == 2 else 8, 0.6).to(device)
    network = ReconstructionUNet(dims).to(device)
    weights = list(masker.parameters())
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


def compare(size: tuple[int, ...], build: Callable[..., Masker], rounds: int) -> tuple[Paired, list[float | None]]:
    uniform, learned = training_step(size, UniformMasker), training_step(size, build)
    timed = paired(uniform, learned, rounds=rounds, warmup=10)
    return timed, [peak_memory_mb(uniform), peak_memory_mb(learned)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every learned masker, not only the actor-critic")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    rows, memory = {}, {}
    for name, build in LEARNED.items():
        if name != "a3c" and not arguments.all:
            continue
        for label, size in SIZES.items():
            key = f"{name} {label}"
            rows[key], memory[key] = compare(size, build, arguments.rounds)
            print(f"{key}: peak MiB of a step, uniform and learned: {memory[key]}")
    report(rows, labels=("uniform", "learned"), extra={"peak_mib": memory})


if __name__ == "__main__":
    main()
