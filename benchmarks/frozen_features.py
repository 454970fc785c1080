# SPDX-License-Identifier: Apache-2.0
"""What pretraining taught an encoder: a linear classifier on features that stay as they are.

Run with ``python -m benchmarks.frozen_features STUDY`` on the folder of an `ahm study`. For each arm and seed, the
encoder that finetuning would start from turns the labelled images into features; a logistic regression learns the
classes from them and is scored on the validation patients. In a classification, the features are mean and standard
deviation of every channel of every stage, and images have the study's ``finetune.image_size`` or else the size of the
crops of pretraining. In a segmentation, single voxels are classified, by all channels of all stages brought to the grid
of the image; of each case, as many are drawn of each class. "untrained" is the same network without pretraining; all
arms must have the backbone of the first. It takes seconds for an arm, and says nothing about what finetuning makes of
it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.metrics import compute_roc_auc
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.nn import functional as F

from ahm_engines.study.cells import BEST, Cell
from ahm_engines.study.finished import PRETRAIN, Finished, read_finished
from ahm_engines.study.statistics import judge, mean_and_sd, paired_bootstrap
from ahm_engines.trained import trained_settings
from ahm_networks import EncoderClassifier, transfer_weights
from ahm_networks.nets import encoder_features, read_weights
from ahm_networks.nets.adaptation import MODES
from ahm_networks.nets.padding import pad_to_multiples
from ahm_transforms import recipes

UNTRAINED = "untrained"
VOXELS = 5_000  # of each class, from all patients together
PENALTY = 100.0  # of the squared weights, half of it, against the summed cross-entropy (scikit-learn's C = 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--fraction", type=float, help="of the labels; by default the largest of the study")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = read_finished(args.study)
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
    models = {name: _weights(study, cells[name]) for name in study.arms if name in cells}
    settings = trained_settings(next(iter(models.values())))
    told = json.loads((study.folder / "study.json").read_text(encoding="utf-8"))
    asked = {each: ASKED[study.task](told, cases[each], settings, seed) for each in ("training", part)}
    known, truth = asked["training"].labels, asked[part].labels
    found = {}
    for name, model in {UNTRAINED: None, **models}.items():
        network = _network(settings, model, seed)
        features = {each: _features(network, asked[each]) for each in asked}
        found[name] = _auroc(features["training"], known, features[part], truth, int(known.max()) + 1)
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
            both = [values[name][seed] - values[other][seed] for seed in values[name] if seed in values[other]]
            pairs = [gain for gain in both if math.isfinite(gain)]
            if len(pairs) < len(both):
                print(f"{name} - {other}: {len(both) - len(pairs)} seed(s) left out, a class is absent there")
            if not pairs:
                continue
            gain = paired_bootstrap(pairs)
            print(f"{name} - {other}: {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] {judge(gain).value}")
    print(json.dumps(values))


def _weights(study: Finished, cell: Cell) -> Path:
    """The weights of a pretraining that has ended: one that goes on has some as well."""
    path = study.folder / cell.folder / "models" / BEST
    if not path.is_file() or cell not in [row.cell for row in study.done(PRETRAIN, cell.arm)]:
        raise SystemExit(f"{path}: no such file; let the study finish its pretrainings.")
    return path


@dataclass(frozen=True)
class _Asked:
    """Images in batches ``[B, C, *S]``, and classes ``[N]`` of the images or of the voxels drawn from each batch."""

    batches: Sequence[Tensor]
    labels: Tensor
    voxels: Sequence[Tensor] | None = None


def _images(told: dict[str, Any], cases: Sequence[dict[str, Any]], settings: dict[str, Any], seed: int) -> _Asked:
    size = told["finetune"].get("image_size", settings["crop_size"])
    chain = recipes.classification_deterministic(settings["modality"], image_size=size, **_grid(settings))
    loader = DataLoader(Dataset([{"image": case["image"]} for case in cases], chain), batch_size=16)
    labels = [told["data"]["classes"].index(case["label"]) for case in cases]
    return _Asked([batch["image"].as_tensor() for batch in loader], torch.tensor(labels))


def _voxels(told: dict[str, Any], cases: Sequence[dict[str, Any]], settings: dict[str, Any], seed: int) -> _Asked:
    classes = {"num_classes": len(told["data"]["classes"]), "label_values": told["data"].get("label_values")}
    chain = recipes.segmentation_deterministic(settings["modality"], **classes, **_grid(settings))
    generator = torch.Generator().manual_seed(seed)
    batches, labels, voxels = [], [], []
    for case in Dataset(cases, chain):
        image, label = (_as_batch(case[key].as_tensor(), settings["spatial_dims"]) for key in ("image", "label"))
        drawn = _draw(label.flatten(), classes["num_classes"] + 1, -(-VOXELS // len(cases)), generator)
        batches.append(image)
        voxels.append(drawn)
        labels.append(label.flatten()[drawn].long())
    return _Asked(batches, torch.cat(labels), voxels)


ASKED = {"classification": _images, "segmentation": _voxels}


def _grid(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "spatial_dims": settings["spatial_dims"],
        "spacing_mm": settings["spacing_mm"],
        "channels": settings["in_channels"],
        "window_hu": tuple(settings["window_hu"]),
    }


def _as_batch(volume: Tensor, spatial_dims: int) -> Tensor:
    """``[C, *S]`` as a batch of one, or as a batch of its slices for a network of fewer axes."""
    return volume.movedim(-1, 0) if volume.ndim > spatial_dims + 1 else volume[None]


def _draw(classes: Tensor, how_many: int, most: int, generator: torch.Generator) -> Tensor:
    """Positions of up to ``most`` voxels of each class, in no order."""
    order = torch.randperm(len(classes), generator=generator)
    return torch.cat([order[classes[order] == each][:most] for each in range(how_many)])


def _network(settings: dict[str, Any], model: Path | None, seed: int) -> EncoderClassifier:
    set_determinism(seed)
    size = {"img_size": settings["crop_size"]} if settings["backbone"] == "unetr" else {}
    backbone = {"backbone": settings["backbone"], "backbone_args": size | settings["backbone_args"]}
    network = EncoderClassifier(settings["spatial_dims"], settings["in_channels"], 2, head="stages", **backbone)
    if model is not None:
        transfer_weights(network, read_weights(model))
    network.head = nn.Sequential()
    return network.eval()


@torch.no_grad()
def _features(network: EncoderClassifier, asked: _Asked) -> Tensor:
    """One row ``[F]`` for each image or drawn voxel."""
    if asked.voxels is None:
        return torch.cat([network(batch) for batch in asked.batches]).double()
    pairs = zip(asked.batches, asked.voxels, strict=True)
    return torch.cat([_of_voxels(network, batch, drawn) for batch, drawn in pairs]).double()


def _of_voxels(network: EncoderClassifier, batch: Tensor, drawn: Tensor) -> Tensor:
    padded = pad_to_multiples(batch, network.divisor, network.fixed_size)
    size = padded.shape[2:]
    inside: Any = (..., *[slice(side) for side in batch.shape[2:]])
    picked = []
    for stage in encoder_features(network.encoder, padded):
        whole = F.interpolate(stage, size, mode=MODES[len(size)])[inside]
        picked.append(whole.movedim(1, -1).flatten(0, -2)[drawn])
    return torch.cat(picked, dim=1)


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
