# SPDX-License-Identifier: Apache-2.0
"""Study folders with planted results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = (
    *("version", "stage", "arm", "fraction", "seed", "draw", "status", "error", "evaluated_on", "labelled_patients"),
    *("epochs", "steps", "seconds", "step_seconds", "memory_mib", "device", "config_hash", "ahm", "monai", "torch"),
    *("created", "random_psnr", "hardness", "rank_correlation", "dice", "hd95_mm", "surface_dice"),
)
ARMS: dict[str, dict[str, Any]] = {
    "scratch": {"title": "from scratch", "pretrain": None, "compare_with": []},
    "random": {"title": "random masks", "pretrain": {}, "compare_with": ["scratch"]},
    "a3c": {"title": "A3C", "pretrain": {}, "compare_with": ["scratch", "random"]},
}
COMMON = {"version": 1, "status": "done", "device": "cpu", "ahm": "0.1.0", "monai": "1.6.1", "torch": "2.13.0"}


def write_settings(
    folder: Path, *, arms: Mapping[str, Any] = ARMS, seeds: Mapping[str, Sequence[int]], **more: Any
) -> Path:
    """study.json."""
    settings = {
        **{"version": 1, "name": "hippocampus-small", "task": "segmentation", "evaluate_on": "test"},
        **{"key_metric": "dice", "metrics": ["dice", "hd95_mm", "surface_dice"], "arms": arms, "seeds": seeds},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(settings | more))
    return folder


def finetuned(arm: str, seed: int, dice: float, *, fraction: float = 0.25, **more: Any) -> dict[str, Any]:
    """One finished finetuning."""
    row = {"stage": "finetune", "arm": arm, "fraction": fraction, "seed": seed, "draw": 0}
    patients = {"evaluated_on": "test", "labelled_patients": round(64 * fraction), "steps": 200, "seconds": 60}
    metrics = {"dice": dice, "hd95_mm": 4 - 3 * dice, "surface_dice": dice}
    return {**COMMON, **row, **patients, **metrics, **more}


def pretrained(arm: str, seed: int, **more: Any) -> dict[str, Any]:
    """One finished pretraining."""
    costs = {"steps": 500, "seconds": 100.0, "step_seconds": 0.2, "memory_mib": 512}
    return {**COMMON, "stage": "pretrain", "arm": arm, "fraction": "", "seed": seed, "draw": 0, **costs, **more}


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] = COLUMNS) -> None:
    """results.csv."""
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_curves(folder: Path, curves: Mapping[tuple[Any, ...], Mapping[float, float]]) -> None:
    """curves.csv, by arm, fraction, seed and draw; without the last, the first draw."""
    cells = {(*cell, 0)[:4]: curve for cell, curve in curves.items()}
    lines = [[*cell, step, value] for cell, curve in cells.items() for step, value in curve.items()]
    with open(folder / "curves.csv", "w", newline="") as file:
        csv.writer(file).writerows([["arm", "fraction", "seed", "draw", "step", "value"], *lines])


def write_maps(folder: Path, arm: str, epoch: int, *, seed: int = 0, policy: bool = True, size: int = 32) -> Path:
    """maps/epochNNNN.npz: discs, hidden more and more inside."""
    rng = np.random.default_rng(epoch)
    rows, columns = np.mgrid[:size, :size] / size
    disc = np.hypot(rows - 0.45, columns - 0.55) < 0.3
    images = np.stack([disc * (0.6 + 0.1 * n) + 0.05 * rng.normal(size=disc.shape) for n in range(4)])
    cells = np.kron(disc[::8, ::8] * epoch / 10 + rng.random((size // 8, size // 8)), np.ones((8, 8)))
    masks = np.stack([np.kron(rng.random((size // 8, size // 8)) < 0.6, np.ones((8, 8))) > 0 for _ in range(4)])
    maps: dict[str, Any] = {"image": images.astype("float32"), "mask": masks}
    path = folder / "runs" / "pretrain" / f"{arm}_seed{seed}" / "maps" / f"epoch{epoch:04d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **maps, **({"policy": np.stack([cells] * 4).astype("float32")} if policy else {}))
    return path


def planted_study(
    folder: Path, *, seeds: Mapping[str, Sequence[int]], gain: Callable[[str, float, int], float], **settings: Any
) -> Path:
    """A study whose cells have all finished: Dice = 0.6 + 0.2 fraction + a seed's own + ``gain(arm, fraction, seed)``.

    All curves rise to 0.95 of that at step 100, in an arm with a gain sooner.
    """
    write_settings(folder, seeds=seeds, **settings)
    arms = settings.get("arms", ARMS)
    rows, curves = [], {}
    for fraction, numbers in ((float(text), numbers) for text, numbers in seeds.items()):
        for arm, seed in ((arm, seed) for arm in arms for seed in numbers):
            own = 0.05 * np.sin(3.0 * seed)
            rows.append(finetuned(arm, seed, 0.6 + 0.2 * fraction + own + gain(arm, fraction, seed), fraction=fraction))
            pace = 100 * (1 - 4 * gain(arm, fraction, seed)) / 3
            curve = {step: rows[-1]["dice"] * (1 - np.exp(-step / pace)) for step in range(10, 201, 10)}
            curves[arm, fraction, seed] = curve
    every = sorted({seed for numbers in seeds.values() for seed in numbers})
    rows += [pretrained(arm, seed) for arm, entry in arms.items() if entry["pretrain"] is not None for seed in every]
    write_results(folder, rows)
    write_curves(folder, curves)
    return folder
