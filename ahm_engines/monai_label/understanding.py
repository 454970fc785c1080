# SPDX-License-Identifier: Apache-2.0
"""Which scan to label next: the one that stands for most others, or the one that a pretrained network rebuilds worst.

MONAI Label computes scores in one place and chooses by them in another. It asks of both no more than ``info()`` and a
call with a request and its datastore.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ahm_engines.bundles import inference_of
from ahm_engines.losses import hidden_mean
from ahm_engines.selection import ScanFeatures, most_typical

__all__ = ["LeastUnderstood", "MostTypical", "ReconstructionError", "ReconstructionScoring", "TypicalityScoring"]

CHECKPOINT = "runs/pretrain/models/model.pt"  # of a pretraining, in its bundle
ERROR, SCORED_BY = "reconstruction_error", "reconstruction_checkpoint"
TURN, PLACED_BY, TURNS = "typical_turn", "typical_checkpoint", 500
Score = TypeVar("Score")
logger = logging.getLogger(__name__)


class ReconstructionError:
    r"""How badly a pretrained network rebuilds what its own masker hides of a scan.

    The mean of :math:`|\hat x - x|` over hidden voxels and several masks, of intensities in [0, 1]. A scan unlike
    those of the pretraining is rebuilt badly; so is a noisy one.

    Args:
        bundle: folder of ``ahm_pretrain``, whose ``inference.json`` says how to read a scan.
        checkpoint: of a pretraining; ``None`` takes the bundle's own, ``runs/pretrain/models/model.pt``.
        device: where to run.
        draws: masks for each scan, the same for all scans.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is none of pretraining, or ``draws`` is below 1.
    """

    def __init__(
        self, bundle: str | Path, checkpoint: str | Path | None = None, *, device: str = "cpu", draws: int = 2
    ) -> None:
        if draws < 1:
            raise ValueError(f"draws: expected at least one mask, got {draws}.")
        parser = inference_of(bundle, checkpoint or Path(bundle) / CHECKPOINT, device=device)
        parser.get_parsed_content("checkpointloader")()
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.inferer = parser.get_parsed_content("inferer")
        self.network = parser.get_parsed_content("network").eval()
        self.device = torch.device(device)
        self.draws = draws

    def __call__(self, image: str | Path | Sequence[str]) -> float:
        """Return the error of one scan; of a DICOM series, ``image`` may be all files.

        Raises:
            OSError: it cannot be read.
            ValueError: it has other channels than those of the pretraining.
        """
        scan = self.preprocessing({"image": image})["image"].as_tensor()[None].to(self.device)
        return sum(self._error(scan, seed) for seed in range(self.draws)) / self.draws

    @torch.no_grad()
    def _error(self, scan: Tensor, seed: int) -> float:
        self.network.masker.set_random_state(seed)
        _, mask, rebuilt = self.inferer(scan, self.network)
        return float(hidden_mean((rebuilt - scan).abs().mean(1, keepdim=True), mask > 0.5))


class ReconstructionScoring:
    """MONAI Label's scoring method: note the reconstruction error of every scan without a label in the datastore.

    Scans keep their score until the checkpoint is another one. A scan that cannot be scored is passed over.

    Args:
        bundle: folder of ``ahm_pretrain`` with the checkpoint of a pretraining.
    """

    def __init__(self, bundle: str | Path) -> None:
        self.bundle = Path(bundle)

    def info(self) -> dict[str, str]:
        """Return what the server lists."""
        return {"description": "How badly the pretrained network rebuilds a scan."}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, int]:
        """Score, and return how many scans there were, were scored and could not be.

        Args:
            request: may hold ``device`` and ``draws``.
            datastore: MONAI Label's.

        Raises:
            FileNotFoundError: nothing has been pretrained yet.
        """
        checkpoint, stamp = _pretrained(self.bundle)
        images = datastore.get_unlabeled_images()
        todo = [image for image in images if datastore.get_image_info(image).get(SCORED_BY) != stamp]
        error_of = ReconstructionError(
            self.bundle, checkpoint, device=_device(request), draws=int(request.get("draws", 2))
        )
        errors = _of_each(todo, datastore, error_of)
        for image, error in errors.items():
            datastore.update_image_info(image, {ERROR: error, SCORED_BY: stamp})
        return {"unlabelled": len(images), "scored": len(errors), "failed": len(todo) - len(errors)}


class TypicalityScoring:
    """MONAI Label's scoring method: note for each scan without a label when its turn is, the most typical first.

    The order is that of `most_typical` in the `ScanFeatures` of the pretrained encoder, given the scans that have
    labels; behind the first 500, scans have no turn. It stays until the checkpoint is another one, or there are scans
    that it has not seen. A scan that cannot be read is passed over.

    Args:
        bundle: folder of ``ahm_pretrain`` with the checkpoint of a pretraining.
    """

    def __init__(self, bundle: str | Path) -> None:
        self.bundle = Path(bundle)

    def info(self) -> dict[str, str]:
        """Return what the server lists."""
        return {"description": "Which scans stand for the others, in the features of the pretrained network."}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, int]:
        """Score, and return how many scans there were, were scored and could not be.

        Args:
            request: may hold ``device``.
            datastore: MONAI Label's.

        Raises:
            FileNotFoundError: nothing has been pretrained yet.
        """
        checkpoint, stamp = _pretrained(self.bundle)
        images = datastore.get_unlabeled_images()
        if all(datastore.get_image_info(image).get(PLACED_BY) == stamp for image in images):
            return {"unlabelled": len(images), "scored": 0, "failed": 0}
        features = _of_each(datastore.list_images(), datastore, ScanFeatures(checkpoint, device=_device(request)))
        known, unlabelled = list(features), set(images)
        labelled = [row for row, image in enumerate(known) if image not in unlabelled]
        left = len(known) - len(labelled)
        rows = most_typical(torch.stack([*features.values()]), min(left, TURNS), labelled=labelled) if left else []
        turns = {known[row]: turn for turn, row in enumerate(rows)}
        for image in features.keys() & unlabelled:
            datastore.update_image_info(image, {TURN: turns.get(image), PLACED_BY: stamp})
        return {"unlabelled": len(images), "scored": left, "failed": len(images) - left}


def _pretrained(bundle: Path) -> tuple[Path, str]:
    """The checkpoint, and what changes whenever it does."""
    checkpoint = bundle / CHECKPOINT
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint: pretrain first, or put one there.")
    return checkpoint, str(checkpoint.stat().st_mtime_ns)


def _device(request: Mapping[str, Any]) -> str:
    return request.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")


def _of_each(images: Iterable[str], datastore: Any, score: Callable[[str], Score]) -> dict[str, Score]:
    """Scores of the images that have one; a warning names the others."""
    found = {}
    for image in images:
        try:
            found[image] = score(datastore.get_image_uri(image))
        except Exception as error:  # every format has its own; the next scan may be fine
            logger.warning("%s has no score: %s", image, error)
    return found


class LeastUnderstood:
    """MONAI Label's strategy: of the scans without a label, the one with the largest reconstruction error.

    One that was handed out already comes again when all others were, too; one without a score comes last.
    """

    def info(self) -> dict[str, str]:
        """Return what the server lists."""
        return {"description": "The scan that the pretrained network rebuilds worst."}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any] | None:
        """Return the ``id`` of the scan to label next and its score; ``None`` if all are labelled."""
        return _next(request, datastore, ERROR, largest=True)


class MostTypical:
    """MONAI Label's strategy: of the scans without a label, the one that stands best for those not yet stood for.

    One that was handed out already comes again when all others were, too; one without a turn comes last.
    """

    def info(self) -> dict[str, str]:
        """Return what the server lists."""
        return {"description": "The scan that stands for most others, in the features of the pretrained network."}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any] | None:
        """Return the ``id`` of the scan to label next and its turn; ``None`` if all are labelled."""
        return _next(request, datastore, TURN, largest=False)


def _next(request: Mapping[str, Any], datastore: Any, key: str, *, largest: bool) -> dict[str, Any] | None:
    images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
    if not images:
        return None
    infos = {image: datastore.get_image_info(image) for image in images}

    def rank(image: str) -> tuple[float, float]:
        """First when it was handed out last, then its score."""
        handed_out = infos[image].get("strategy", {}).get(request["strategy"], {}).get("ts", 0)
        score = infos[image].get(key)
        return handed_out, math.inf if score is None else -score if largest else score

    chosen = min(images, key=rank)
    if infos[chosen].get(key) is None:
        logger.warning("No scan left that has a score: scoring is not done yet, or has failed.")
    return {"id": chosen, key: infos[chosen].get(key)}
