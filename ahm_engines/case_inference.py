# SPDX-License-Identifier: Apache-2.0
"""Inference case by case: a bad case is recorded, and the others go on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import Dataset
from monai.engines import Evaluator, IterationEvents
from monai.inferers import Inferer, SimpleInferer
from monai.utils import ensure_tuple
from torch import nn

from ahm_engines.errors import behind_monai
from ahm_engines.files import writable_folder, write_json
from ahm_engines.step import Precision
from ahm_transforms.io import LeftOut
from ahm_transforms.io.dicom import transfer_syntax

__all__ = ["CaseInference", "CaseResult", "IncompleteInferenceError", "TolerantDataset"]

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
LONGEST_REASON = 300  # characters
logger = logging.getLogger(__name__)


class IncompleteInferenceError(RuntimeError):
    """Raised when all cases were tried and some of them failed; the message is the table of those."""


class CaseResult(NamedTuple):
    """How it went with one case; ``reason`` is empty for a good one."""

    case_id: str
    status: str
    seconds: float
    reason: str


class TolerantDataset(Dataset):
    """MONAI's ``Dataset`` whose items say what went wrong where a transform raises, also in worker processes.

    Items are those of ``transform`` with ``files``, the names of the case's image files; a case that cannot be loaded,
    or whose image has one value everywhere (empty, all NaN, outside of the window), becomes ``{"case_id", "failure"}``.

    Args:
        data: case dictionaries with ``image`` and ``case_id``.
        transform: preprocessing.
    """

    def _transform(self, index: int) -> dict[str, Any]:
        case = self.data[index]
        files = [str(name) for name in ensure_tuple(case["image"])]
        try:
            item = super()._transform(index)
            if item["image"].min() == item["image"].max():
                raise ValueError(
                    "expected an image that shows something, after preprocessing it has one value everywhere: it is "
                    "constant, holds no finite voxel, or lies outside of the window of intensities."
                )
            return {**item, "files": files}
        except Exception as error:  # every format and transform has its own
            return {"case_id": case["case_id"], "failure": _describe(error, [*files, str(case.get("mask", ""))])}


class CaseInference(Evaluator):
    """Predict case after case; what fails in loading, network or postprocessing is recorded and passed over.

    Postprocessing gets ``image``, ``pred`` (as the network gives it), ``case_id`` and ``files``, without batch axis.
    At the end ``results.json`` in ``output_dir`` and a table in the log tell about every case, and :meth:`run` raises
    when one failed, so that the command ends with a status other than 0. Seconds are those since the case before.
    Table and error say in which folder damaged and skipped DICOM files are, ``results.json`` has their pseudonyms.

    Args:
        device: where to run.
        val_data_loader: single cases of a :class:`TolerantDataset`.
        network: ``network(image) -> pred``.
        output_dir: folder for ``results.json``.
        inferer: runs the network; the default takes whole images.
        bad: cases that were found to be damaged before, and why; they count as failed.
        skipped: what was found and is nothing to predict on, and why; it counts neither as done nor as failed.
        postprocessing, val_handlers: as in MONAI's ``SupervisedEvaluator``. Handlers find a list in the output: of one
            dictionary, or empty for a case that failed.
        amp: whether to autocast the network.
        amp_kwargs: for ``torch.autocast``.

    Raises:
        OSError: when ``output_dir`` cannot be written to.
        IncompleteInferenceError: on running, after all good cases are written.
        ValueError: on running, when a batch holds several cases.

    Example:
        >>> import tempfile
        >>> loader = [{"image": torch.rand(1, 1, 8, 8), "case_id": ["a"], "files": [("a.png",)]}]
        >>> inference = CaseInference("cpu", loader, nn.Conv2d(1, 2, 3, padding=1), tempfile.mkdtemp())
        >>> inference.run()
        >>> inference.results[0].status
        'ok'
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: nn.Module,
        output_dir: str | Path,
        *,
        inferer: Inferer | None = None,
        bad: Sequence[LeftOut] = (),
        skipped: Sequence[LeftOut] = (),
        postprocessing: Callable[..., Any] | None = None,
        val_handlers: Sequence[Any] | None = None,
        amp: bool = False,
        amp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        device = torch.device(device)
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            postprocessing=postprocessing,
            val_handlers=val_handlers,
            decollate=True,
        )
        self.network = network
        self.folder = writable_folder(output_dir)
        self.inferer = inferer or SimpleInferer()
        self.bad = [CaseResult(_id_of(item), FAILED, 0.0, item.reason) for item in bad]
        self.skipped = [CaseResult(_id_of(item), SKIPPED, 0.0, item.reason) for item in skipped]
        self._names = {_id_of(item): item.name for item in (*bad, *skipped)}
        self.precision = Precision(device, amp, amp_kwargs)
        self.results: list[CaseResult] = []
        self._since = 0.0

    def run(self, global_epoch: int = 1) -> None:
        """Go through all cases.

        Raises:
            IncompleteInferenceError: some failed.
        """
        self.results = [*self.bad, *self.skipped]
        self._since = time.perf_counter()
        try:
            if self.state.epoch_length != 0:  # every case may have been bad
                super().run(global_epoch)
        finally:
            self._report()
        failed = [result for result in self.results if result.status == FAILED]
        if failed:
            count = f"{len(failed)} of {len(self.results) - len(self.skipped)} case(s) failed"
            table = _table(failed, self._names)
            raise IncompleteInferenceError(f"{count}, the others are in {self.folder}:\n{table}")

    @torch.no_grad()
    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> list[dict[str, Any]]:
        if len(batchdata["case_id"]) != 1:
            raise ValueError(f"val_data_loader: expected batch_size=1, got {len(batchdata['case_id'])} cases at once.")
        failure = batchdata["failure"][0] if "failure" in batchdata else self._failure(batchdata)
        if failure:
            logger.warning("%s failed: %s", batchdata["case_id"][0], failure)
            self.state.output = []
            if self.state.device.type == "cuda":
                torch.cuda.empty_cache()
        now = time.perf_counter()
        status = FAILED if failure else OK
        self.results.append(CaseResult(batchdata["case_id"][0], status, round(now - self._since, 3), failure))
        self._since = now
        return self.state.output

    def _failure(self, batch: Mapping[str, Any]) -> str:
        """Work on one case and return what went wrong, nothing if all is well."""
        try:
            self._predict(batch)
        except Exception as error:  # whatever it is, the next case may be fine
            return _describe(error, [name for (name,) in batch.get("files", [])])
        return ""

    def _predict(self, batch: Mapping[str, Any]) -> None:
        image = batch["image"].to(self.state.device, non_blocking=True)
        with self.mode(self.network), self.precision.autocast():
            pred = self.inferer(image, self.network).float()
        if not pred.isfinite().all():
            raise ValueError("the network's output holds NaN or infinite values.")
        told = {key: batch[key] for key in ("case_id", "files") if key in batch}
        self.state.output = {"image": image, "pred": pred, **told}
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)

    def _report(self) -> None:
        statuses = [result.status for result in self.results]
        done, failed, skipped = (statuses.count(status) for status in (OK, FAILED, SKIPPED))
        more = f", {skipped} skipped" if skipped else ""
        logger.info("%d case(s) done, %d failed%s:\n%s", done, failed, more, _table(self.results, self._names))
        cases = [result._asdict() for result in self.results]
        counts = {"done": done, "failed": failed, "skipped": skipped}
        write_json(self.folder / "results.json", {**counts, "cases": cases})


def _id_of(item: LeftOut) -> str:
    """How results call it: by a pseudonym, if it has one."""
    return str(getattr(item, "case_id", item.name))


def _table(results: Sequence[CaseResult], names: Mapping[str, str]) -> str:
    """Plain text, columns aligned; what has a name besides its id is listed by that, the id before the reason."""
    rows = [CaseResult._fields]
    for case_id, status, spent, reason in results:
        name = names.get(case_id, case_id)
        rows.append((name, status, f"{spent:.1f}", reason if name == case_id else f"{case_id}: {reason}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {status:<{widths[1]}}  {seconds:>{widths[2]}}  {why}".rstrip()
        for name, status, seconds, why in rows
    )


def _describe(error: BaseException, files: Sequence[str]) -> str:
    """One line without the names of folders, which may be called after a patient."""
    logger.debug("Traceback of a failed case", exc_info=error)
    error = behind_monai(error)
    text = f"{type(error).__name__}: {error}"
    for folder in {os.path.dirname(name) for name in files} - {""}:
        text = text.replace(folder + os.sep, "")
    syntax = transfer_syntax(files[0]) if isinstance(error, OSError) and files else ""
    if syntax:
        text = f"transfer syntax {syntax}: {text}"
    return " ".join(text.split())[:LONGEST_REASON]
