# SPDX-License-Identifier: Apache-2.0
"""What pretraining taught an encoder: a linear classifier on features that stay as they are.

Run with ``python -m benchmarks.frozen_features STUDY`` on the folder of an `ahm study` of a classification. For each
arm and seed, the encoder that finetuning would start from turns the labelled images into mean and standard deviation of
every channel of every stage; a logistic regression learns from them and is scored on the validation patients.
"untrained" is the same network without pretraining; all arms must have the backbone of the first. Images have the
study's ``finetune.image_size``, or else the size of the crops of pretraining. It takes seconds for an arm, and says
nothing about what finetuning makes of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.metrics import compute_roc_auc
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.nn import functional as F

from ahm_engines.study.cells import BEST
from ahm_engines.study.finished import PRETRAIN, Finished, read_finished
from ahm_engines.study.statistics import judge, mean_and_sd, paired_bootstrap
from ahm_engines.trained import trained_settings
from ahm_networks import EncoderClassifier, transfer_weights
from ahm_networks.nets import read_weights
from ahm_transforms import recipes

UNTRAINED = "untrained"
PENALTY = 100.0  # of the squared weights, half of it, against the summed cross-entropy (scikit-learn's C = 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--fraction", type=float, help="of the labels; by default the largest of the study")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = read_finished(args.study)
    if study.task != "classification":
        raise SystemExit(f"{args.study}: expected a study of a classification, got one of a {study.task}.")
    fraction = max(study.seeds) if args.fraction is None else args.fraction
    if fraction not in study.seeds:
        raise SystemExit(f"--fraction: expected one of {sorted(study.seeds)}, got {fraction}.")
    report(study, {seed: scores(study, fraction, seed, args.part) for seed in study.seeds[fraction]}, fraction)


def scores(study: Finished, fraction: float, seed: int, part: str) -> dict[str, float]:
    """AUROC in points of each arm, on one seed."""
    cases = json.loads((study.folder / f"splits/seed{seed}_labels{fraction:g}.json").read_text(encoding="utf-8"))
    cells = {cell.arm: cell for cell in study.planned() if cell.stage == PRETRAIN and cell.seed == seed}
    if not cells:
        raise SystemExit(f"{study.folder}: expected an arm that is pretrained, got {', '.join(study.arms)}.")
    models = {
        name: _weights(study.folder / cells[name].folder / "models" / BEST) for name in study.arms if name in cells
    }
    settings = trained_settings(next(iter(models.values())))
    finetune = json.loads((study.folder / "study.json").read_text(encoding="utf-8"))["finetune"]
    size = finetune.get("image_size", settings["crop_size"])
    images = {each: _images(cases[each], settings, size) for each in ("training", part)}
    classes = sorted({case["label"] for case in cases["training"]})
    labels = {each: torch.tensor([classes.index(case["label"]) for case in cases[each]]) for each in images}
    found = {}
    for name, model in {UNTRAINED: None, **models}.items():
        features = {each: _features(_encoder(settings, model, seed), images[each]) for each in images}
        found[name] = _auroc(features["training"], labels["training"], features[part], labels[part], len(classes))
    return found


def report(study: Finished, found: dict[int, dict[str, float]], fraction: float) -> None:
    """Print means, differences to the untrained encoder and to the other arms, and the same as a line of JSON."""
    arms = list(dict.fromkeys(name for each in found.values() for name in each))
    values = {name: {seed: each[name] for seed, each in found.items() if name in each} for name in arms}
    print(f"AUROC in points, {fraction:g} of the labels, {len(found)} seeds, mean and standard deviation")
    for name in arms:
        print("{:24s} {:6.1f} +- {:.1f}".format(name, *mean_and_sd(list(values[name].values()))))
    for name in arms:
        references = [UNTRAINED, *study.arms[name].compare_with] if name in study.arms else []
        for other in (each for each in references if each in values):
            pairs = [values[name][seed] - values[other][seed] for seed in values[name] if seed in values[other]]
            gain = paired_bootstrap(pairs)
            print(f"{name} - {other}: {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] {judge(gain).value}")
    print(json.dumps(values))


def _weights(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; let the study finish its pretrainings.")
    return path


def _images(cases: Sequence[dict[str, Any]], settings: dict[str, Any], image_size: int | Sequence[int]) -> Tensor:
    chain = recipes.classification_deterministic(
        settings["modality"],
        spatial_dims=settings["spatial_dims"],
        spacing_mm=settings["spacing_mm"],
        channels=settings["in_channels"],
        window_hu=tuple(settings["window_hu"]),
        image_size=image_size,
    )
    loader = DataLoader(Dataset([{"image": case["image"]} for case in cases], chain), batch_size=16)
    return torch.cat([batch["image"].as_tensor() for batch in loader])


def _encoder(settings: dict[str, Any], model: Path | None, seed: int) -> nn.Module:
    set_determinism(seed)
    backbone = {"backbone": settings["backbone"], "backbone_args": settings["backbone_args"]}
    network = EncoderClassifier(settings["spatial_dims"], settings["in_channels"], 2, head="stages", **backbone)
    if model is not None:
        transfer_weights(network, read_weights(model))
    network.head = nn.Sequential()
    return network.eval()


@torch.no_grad()
def _features(encoder: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([encoder(batch) for batch in images.split(16)]).double()


def _auroc(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor, classes: int) -> float:
    """Macro AUROC of a logistic regression whose classes weigh alike."""
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    layer = nn.Linear(known.shape[1], classes).double()
    nn.init.zeros_(layer.weight)
    weight = len(labels) / (classes * torch.bincount(labels, minlength=classes).double())
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(layer(known), labels, weight, reduction="sum") + PENALTY / 2 * layer.weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    chance = layer(asked).softmax(1).detach()
    return 100 * float(compute_roc_auc(chance, F.one_hot(truth, classes), average="macro"))


if __name__ == "__main__":
    main()
