# SPDX-License-Identifier: Apache-2.0
"""An app for MONAI Label; an app folder's ``main.py`` imports :class:`LabelApp`, and the server finds it there."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from ahm_engines.errors import behind_monai
from ahm_engines.monai_label.bundles import CLASSIFICATION, MODEL, PRETRAINING, find_bundles, task_of
from ahm_engines.monai_label.understanding import ERROR, LeastUnderstood, ReconstructionScoring

__all__ = ["LabelApp", "PretrainTask"]

FAILED = 500  # HTTP status
logger = logging.getLogger(__name__)
MISSING = "MONAI Label is not installed in this environment: docs/monai_label.md says how ({})."


def _of_monai_label(module: str, name: str) -> Any:
    """Return a class that can be inherited from, and says what is missing when it is used."""
    return optional_import(f"monailabel.{module}", name=name, as_type="base", descriptor=MISSING)[0]


MONAILabelApp: Any = _of_monai_label("interfaces.app", "MONAILabelApp")
BundleInferTask: Any = _of_monai_label("tasks.infer.bundle", "BundleInferTask")
BundleTrainTask: Any = _of_monai_label("tasks.train.bundle", "BundleTrainTask")
First: Any = _of_monai_label("tasks.activelearning.first", "First")
Random: Any = _of_monai_label("tasks.activelearning.random", "Random")
HTTPException: Any = optional_import("fastapi", name="HTTPException", descriptor=MISSING)[0]


class PretrainTask(BundleTrainTask):
    """Pretraining on all images of the datastore, where MONAI Label's own task takes labelled ones only."""

    def _fetch_datalist(self, request: Any, datastore: Any) -> list[dict[str, str]]:
        return [{"image": datastore.get_image_uri(image)} for image in datastore.list_images()]


class LabelApp(MONAILabelApp):
    """Bundles of this project behind MONAI Label's server.

    It differs from the stock app ``monaibundle`` in that weights must fit, a model appears as soon as it is trained,
    ``ahm_pretrain`` trains on all images, the scan least understood can be asked for, and a prediction that fails is
    answered with the reason.

    Args:
        app_dir: folder of the app, with bundles in its folder ``model``.
        studies: folder of the images, or address of a DICOMweb server.
        conf: ``models``, names of bundles with commas; without it, all of them.

    Raises:
        FileNotFoundError: there is no such bundle, or none at all.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = find_bundles(Path(app_dir) / "model", conf.get("models"))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="monai-ahm",
            description="Segmentation and classification with few labels, and pretraining without any",
            version=version("monai-ahm"),
        )

    def init_infers(self) -> dict[str, Any]:
        """Return the models that have weights."""
        return {
            name: BundleInferTask(str(folder), self.conf, load_strict=True)
            for name, folder in self.bundles.items()
            if task_of(name) != PRETRAINING and (folder / MODEL).is_file()
        }

    def init_trainers(self) -> dict[str, Any]:
        """Return what can be trained; the datastore keeps label maps, and no classes of images."""
        return {
            name: (PretrainTask if task_of(name) == PRETRAINING else BundleTrainTask)(
                str(folder), self.conf, load_strict=True
            )
            for name, folder in self.bundles.items()
            if task_of(name) != CLASSIFICATION
        }

    def init_strategies(self) -> dict[str, Any]:
        """Return the ways to choose the next scan."""
        own = {"least_understood": LeastUnderstood()} if self._pretraining else {}
        return {"random": Random(), "first": First(), **own}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Return the score that the strategy goes by."""
        return {ERROR: ReconstructionScoring(self._pretraining[0])} if self._pretraining else {}

    def infer(self, request: Any, datastore: Any = None) -> Any:
        """Predict.

        Raises:
            HTTPException: it failed; the answer says why.
        """
        try:
            return super().infer(request, datastore)
        except Exception as error:  # whatever a bundle raises
            logger.exception("The prediction has failed.")
            reason = behind_monai(error)
            raise HTTPException(FAILED, detail=str(getattr(reason, "msg", reason))) from error

    def info(self) -> Any:
        """Return what the server offers, with models that were trained since."""
        if any((folder / MODEL).is_file() for name, folder in self.bundles.items() if name not in self._infers):
            self._infers: dict[str, Any] = {**self.init_infers(), **self._infers}
        return super().info()

    @property
    def _pretraining(self) -> list[Path]:
        return [folder for name, folder in self.bundles.items() if task_of(name) == PRETRAINING]
