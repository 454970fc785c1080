# SPDX-License-Identifier: Apache-2.0
"""Which scan to label next: the one that the pretrained network rebuilds worst.

MONAI Label computes scores in one place and chooses by them in another. It asks of both no more than ``info()`` and a
call with a request and its datastore.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ahm_engines.bundles import inference_of
from ahm_engines.losses import hidden_mean

__all__ = ["LeastUnderstood", "ReconstructionError", "ReconstructionScoring"]

CHECKPOINT = "runs/pretrain/models/model.pt"  # of a pretraining, in its bundle
ERROR, SCORED_BY = "reconstruction_error", "reconstruction_checkpoint"
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
        checkpoint = self.bundle / CHECKPOINT
        if not checkpoint.is_file():
            raise FileNotFoundError(f"{checkpoint}: no such checkpoint: pretrain first, or put one there.")
        stamp = str(checkpoint.stat().st_mtime_ns)
        images = datastore.get_unlabeled_images()
        todo = [image for image in images if datastore.get_image_info(image).get(SCORED_BY) != stamp]
        device = request.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        error_of = ReconstructionError(self.bundle, checkpoint, device=device, draws=int(request.get("draws", 2)))
        scored = 0
        for image in todo:
            try:
                score = error_of(datastore.get_image_uri(image))
            except Exception as error:  # every format has its own; the next scan may be fine
                logger.warning("%s has no score: %s", image, error)
            else:
                datastore.update_image_info(image, {ERROR: score, SCORED_BY: stamp})
                scored += 1
        return {"unlabelled": len(images), "scored": scored, "failed": len(todo) - scored}


class LeastUnderstood:
    """MONAI Label's strategy: of the scans without a label, the one with the largest reconstruction error.

    One that was handed out already comes again when all others were, too; one without a score comes last.
    """

    def info(self) -> dict[str, str]:
        """Return what the server lists."""
        return {"description": "The scan that the pretrained network rebuilds worst."}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any] | None:
        """Return the ``id`` of the scan to label next and its score; ``None`` if all are labelled."""
        images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        if not images:
            return None
        infos = {image: datastore.get_image_info(image) for image in images}
        chosen = min(images, key=lambda image: _rank(infos[image], request["strategy"]))
        if ERROR not in infos[chosen]:
            logger.warning("No scan left that has a score: scoring is not done yet, or has failed.")
        return {"id": chosen, ERROR: infos[chosen].get(ERROR)}


def _rank(info: Mapping[str, Any], strategy: str) -> tuple[float, float]:
    """First when it was handed out last, then how well it is understood."""
    handed_out = info.get("strategy", {}).get(strategy, {}).get("ts", 0)
    return handed_out, -info.get(ERROR, float("-inf"))
