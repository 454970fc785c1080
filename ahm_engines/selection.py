# SPDX-License-Identifier: Apache-2.0
"""Which scans to label first: those that stand for the others, in the features of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.utils import dense_patch_slices
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from ahm_engines.trained import PRETRAINING, trained_settings
from ahm_networks import EncoderClassifier, transfer_weights
from ahm_networks.nets import read_weights
from ahm_transforms import recipes
from ahm_transforms.io import load_cases
from ahm_transforms.io.pairs import find_pairs, place_of
from ahm_transforms.io.progress import with_bar

__all__ = ["Images", "ScanFeatures", "choose_patients", "most_typical", "typical_patients"]

BATCH = 16  # windows that the encoder sees at once
Images = Mapping[str, Sequence[str | list[str]]]  # of each patient; of a DICOM series, all its files


class ScanFeatures:
    """What a pretrained encoder makes of a scan, as one vector: scans that look alike have vectors that are near.

    The scan is read as in the pretraining and cut into windows of its crop size, slice by slice for a 2D network. Of
    each window there are mean and standard deviation of every channel of every encoder stage; of the scan, mean and
    standard deviation of these over its windows.

    Args:
        checkpoint: of the bundle ``ahm_pretrain``, whichever way it pretrained.
        device: where the encoder runs.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is none of pretraining.
    """

    def __init__(self, checkpoint: str | Path, *, device: str | torch.device = "cpu") -> None:
        weights = read_weights(checkpoint)
        settings = trained_settings(checkpoint, task=PRETRAINING)
        if not settings:
            raise ValueError(f"{checkpoint}: expected one of the bundle ahm_pretrain, got no settings in it.")
        dims, channels = settings["spatial_dims"], settings["in_channels"]
        self.window = ensure_tuple_rep(settings["crop_size"], dims)
        self.device = torch.device(device)
        self.preprocessing = recipes.deterministic(
            settings["modality"],
            spatial_dims=dims,
            spacing_mm=settings["spacing_mm"],
            channels=channels,
            window_hu=tuple(settings["window_hu"]),
        )
        size = {"img_size": self.window} if settings["backbone"] == "unetr" else {}
        backbone = {"backbone": settings["backbone"], "backbone_args": size | settings["backbone_args"]}
        network = EncoderClassifier(dims, channels, 2, head="stages", **backbone)
        transfer_weights(network, weights)
        network.head = nn.Sequential()  # the statistics of the stages themselves
        self.network = network.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: str | Path | Sequence[str]) -> Tensor:
        """Return the vector ``[F]`` of one scan, float32; of a DICOM series, ``image`` may be all files.

        Raises:
            OSError: it cannot be read.
            ValueError: it has other channels than those of the pretraining.
        """
        scan = self.preprocessing({"image": image})["image"].as_tensor()
        slices = scan.movedim(-1, 0) if scan.ndim > len(self.window) + 1 else scan[None]
        windows = torch.cat([slices[(..., *place)] for place in self._windows(slices.shape[2:])])
        found = torch.cat([self.network(batch.to(self.device)) for batch in windows.split(BATCH)]).cpu()
        return torch.cat([found.mean(0), found.std(0, unbiased=False)])

    def _windows(self, size: torch.Size) -> list[tuple[slice, ...]]:
        window = [min(pair) for pair in zip(size, self.window, strict=True)]
        return dense_patch_slices(size, window, window)


def most_typical(features: Tensor, count: int, *, labelled: Collection[int] = ()) -> list[int]:
    r"""Choose scans that stand for the others: greedily, each brings all scans nearest to a chosen one.

    The next is :math:`\arg\min_i \sum_j \min(d_j, \lVert z_i - z_j \rVert)`, with the distance :math:`d_j` of scan j to
    the nearest one chosen or labelled before, in features standardised over the scans: k-medoids, greedily. The first
    is the medoid, the scan nearest to all others, and fewer scans are the first of more. Typical scans are worth more
    than uncertain ones as long as labels are few (Hacohen et al. 2022, "Active Learning on a Budget").

    Args:
        features: ``[N, F]``, a row for each scan.
        count: how many to choose.
        labelled: rows that have labels already; they are not chosen again.

    Returns:
        Rows in order of choice.

    Raises:
        ValueError: fewer scans without a label than asked for, or features that are not finite.
    """
    left = len(features) - len(set(labelled))
    if not 1 <= count <= left:
        raise ValueError(f"count: expected 1 to {left}, as many have no label, got {count}.")
    if not features.isfinite().all():
        raise ValueError("features: expected finite numbers, got NaN or infinity.")
    standard = (features - features.mean(0)) / features.std(0, unbiased=False).clamp_min(1e-6)
    distances = torch.cdist(standard, standard)
    nearest = distances.new_full((len(features),), torch.inf)
    chosen: list[int] = []
    taken = torch.zeros(len(features), dtype=torch.bool)
    for row in labelled:
        nearest, taken[row] = torch.minimum(nearest, distances[row]), True
    for _ in range(count):
        cost = torch.minimum(nearest, distances).mean(1).masked_fill(taken, torch.inf)
        row = int(cost.argmin())
        nearest, taken[row] = torch.minimum(nearest, distances[row]), True
        chosen.append(row)
    return chosen


def typical_patients(
    images: Images, count: int, features: Callable[[str | list[str]], Tensor], *, labelled: Collection[str] = ()
) -> list[str]:
    """Choose patients as `most_typical` does, each by the mean over its scans.

    Args:
        images: the scans of each patient.
        count: how many patients to choose.
        features: `ScanFeatures`, or another function from a scan to its vector ``[F]``.
        labelled: patients that have labels already.

    Raises:
        ValueError: as `most_typical`.
    """
    patients = list(images)
    named = with_bar(patients, "Reading patients", len(patients))
    rows = [torch.stack([features(scan) for scan in images[patient]]).mean(0) for patient in named]
    known = [row for row, patient in enumerate(patients) if patient in labelled]
    return [patients[row] for row in most_typical(torch.stack(rows), count, labelled=known)]


def choose_patients(
    checkpoint: str | Path,
    dataset_dir: str | Path,
    count: int,
    *,
    labels_dir: str | Path | None = None,
    patient_pattern: str | None = None,
    skip_bad: bool = False,
    device: str | None = None,
) -> dict[str, list[str]]:
    """Find scans, and choose the patients to label first: patient to paths of scans, in order of choice.

    Args:
        checkpoint: of the bundle ``ahm_pretrain``.
        dataset_dir: folder of the scans.
        count: how many patients to choose.
        labels_dir: folder of label maps of some scans; whoever has one has labels already.
        patient_pattern: regular expression that finds the patient in a path.
        skip_bad: leave out what cannot be used, with a warning.
        device: where the encoder runs; ``None`` for a GPU if there is one.

    Raises:
        BadCasesError: some scans cannot be used; it lists them all.
        FileNotFoundError: there is no checkpoint or no scan, or ``labels_dir`` has no label map.
        ValueError: the checkpoint is none of pretraining, or fewer patients are without labels.
    """
    features = ScanFeatures(checkpoint, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = trained_settings(checkpoint)
    cases = load_cases(
        dataset_dir,
        labels_dir=labels_dir,
        spatial_dims=settings["spatial_dims"],
        channels=settings["in_channels"],
        pictures=settings["modality"] == "image2d",
        patient_pattern=patient_pattern,
        skip_bad=skip_bad,
        val_fraction=0.0,
    ).training
    paired = find_pairs(cases, root=Path(dataset_dir), folder=labels_dir) if labels_dir else {}
    images: dict[str, list[Any]] = {}
    places: dict[str, list[str]] = {}
    for case in cases:
        images.setdefault(case["patient_id"], []).append(case["image"])
        places.setdefault(case["patient_id"], []).append(str(place_of(case)))
    labelled = {case["patient_id"] for case in cases if case["case_id"] in paired}
    return {patient: places[patient] for patient in typical_patients(images, count, features, labelled=labelled)}
