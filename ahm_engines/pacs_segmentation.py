# SPDX-License-Identifier: Apache-2.0
"""Segment a series of a PACS with a bundle, and store the result there as DICOM SEG."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydicom.pixels import iter_pixels

from ahm_engines.case_inference import FAILED, IncompleteInferenceError
from ahm_engines.errors import behind_monai
from ahm_engines.files import writable_folder
from ahm_engines.options import unknown_entries
from ahm_engines.pacs import Pacs, Series, choose_series
from ahm_transforms.io.dicom import find_series

__all__ = ["Segmentation", "SegmentationModel", "read_segmentation", "segment_study"]

MODALITIES = {"mr": "MR", "ct": "CT"}  # of bundles, and what DICOM calls them; others take any images
QUIET = ("monai.bundle.workflows", "monai.data.image_writer")  # they write to stdout, whatever the user's settings
logger = logging.getLogger(__name__)


class Segmentation(NamedTuple):
    """A DICOM SEG: its UIDs, and how many voxels each segment has."""

    series_uid: str
    instance_uid: str
    voxels: dict[str, int]

    @property
    def empty(self) -> bool:
        """Whether nothing was found."""
        return not any(self.voxels.values())


class SegmentationModel:
    """A bundle that segments, with its weights loaded.

    Args:
        bundle: its folder. ``configs/inference.json`` must read ``bundle_root``, ``dataset_dir``, ``output_dir`` and
            ``checkpoint``, and write one ``.dcm`` file per series, as ahm_segmentation does.
        output_dir: where the results go.
        checkpoint: weights other than those of the bundle.
        changes: other entries of ``configs/inference.json``.

    Raises:
        OSError, ValueError, RuntimeError: no such bundle or weights, weights of another task, or settings that do not
            go together.
    """

    def __init__(
        self,
        bundle: Path,
        output_dir: Path,
        *,
        checkpoint: Path | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        from monai.bundle import ConfigWorkflow  # slow to import

        self.output_dir = output_dir
        config = bundle / "configs/inference.json"
        given = {"bundle_root": str(bundle), "output_dir": str(output_dir)}
        given |= {} if checkpoint is None else {"checkpoint": str(checkpoint)}
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _inner_errors():
            self._workflow = ConfigWorkflow(str(config), logging_file=False, workflow_type="infer")
            self._change({**(changes or {}), **given})
            self._workflow.initialize()
            _check_task(bundle, self._setting("trained", {}))
            self.modality = MODALITIES.get(str(self._setting("modality", "")))
            self.volumes = int(self._setting("spatial_dims", 3)) == 3

    def _change(self, entries: Mapping[str, Any]) -> None:
        if unknown := unknown_entries(entries, self._workflow.parser.get()):
            raise ValueError(f"the bundle's inference.json has no entry {', '.join(unknown)}.")
        self._workflow.parser.update(entries)

    def _setting(self, name: str, default: Any) -> Any:
        parser = self._workflow.parser
        return parser.get_parsed_content(name) if name in parser else default

    def run(self, images: Path) -> Path:
        """Segment a folder with one series, or one file, and return the DICOM SEG.

        Raises:
            OSError, ValueError, RuntimeError: it did not work, or wrote no DICOM SEG.
        """
        with _inner_errors(self.output_dir):
            self._change({"dataset_dir": str(images)})
            self._workflow.initialize()  # anew, for all that depends on the images
            self._workflow.run()
            self._workflow.finalize()
        written = sorted(self.output_dir.rglob("*.dcm"))
        if len(written) != 1:
            raise RuntimeError(f"expected one DICOM SEG of the bundle, got {len(written)} files *.dcm.")
        return written[0]


def segment_study(
    pacs: Pacs,
    study_uid: str,
    bundle: Path,
    *,
    series_uid: str | None = None,
    modality: str | None = None,
    checkpoint: Path | None = None,
    output_dir: Path | None = None,
    store: bool = True,
    changes: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> Segmentation:
    """Fetch a series, segment it, and store the DICOM SEG in its study, unless nothing was found.

    The model is loaded before anything is fetched. What was fetched lies in a temporary folder that only this user can
    read, and is deleted when the function returns or raises.

    Args:
        pacs: where the study is.
        study_uid: the study.
        bundle: as for `SegmentationModel`.
        series_uid: the series; not needed where only one fits.
        modality: the series' modality; by default what the model was trained for.
        checkpoint: weights other than those of the bundle.
        output_dir: also leave the bundle's results here.
        store: whether to store.
        changes: other entries of the bundle's ``configs/inference.json``.
        tell: gets a line for each step; neither names nor descriptions are in them.

    Raises:
        OSError: from the PACS, or the disk.
        ValueError: no such study, or not one series that fits the model.
        ImportError, RuntimeError: the bundle failed.
    """
    kept = None if output_dir is None else writable_folder(output_dir)
    with tempfile.TemporaryDirectory(prefix="ahm-pacs-") as name:
        results = Path(name, "results")
        model = SegmentationModel(bundle, results, checkpoint=checkpoint, changes=changes)
        found = pacs.series(study_uid)
        series = choose_series(found, uid=series_uid, modality=modality or model.modality)
        tell(f"series {series}")
        files = pacs.retrieve(study_uid, series, Path(name, "series"))
        path = model.run(_images(series, files, model.volumes))
        segmentation = read_segmentation(path, study_uid, series.uid)
        if kept is not None:
            shutil.copytree(results, kept, dirs_exist_ok=True)
        tell("voxels: " + ", ".join(f"{label} {count}" for label, count in segmentation.voxels.items()))
        if store and not segmentation.empty:
            pacs.store(path)
            _tell_stored(segmentation, found, tell)
    return segmentation


def read_segmentation(path: Path, study_uid: str, series_uid: str) -> Segmentation:
    """Read a DICOM SEG and be sure that it can be used and belongs to a series.

    Raises:
        ImportError: highdicom is not installed.
        ValueError: it is damaged, or refers to something else.
    """
    try:
        import highdicom as hd  # optional, and slow to import
    except ImportError as error:
        raise ImportError('DICOM SEG is read with highdicom: pip install "monai-ahm[dicom]".') from error
    try:
        seg = hd.seg.segread(path)
        referred = {str(series.SeriesInstanceUID) for series in seg.ReferencedSeriesSequence}
        voxels = _count_voxels(seg)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise ValueError(f"{path.name} cannot be read as DICOM SEG: {type(error).__name__}.") from error
    if str(seg.StudyInstanceUID) != study_uid or referred != {series_uid}:
        raise ValueError(f"{path.name} is no segmentation of series {series_uid} in study {study_uid}.")
    return Segmentation(str(seg.SeriesInstanceUID), str(seg.SOPInstanceUID), voxels)


def _count_voxels(seg: Any) -> dict[str, int]:
    labels = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in seg.SegmentSequence}
    voxels = dict.fromkeys(labels.values(), 0)
    (shared,) = seg.SharedFunctionalGroupsSequence  # holds what all frames have in common: that may be their segment
    for own, frame in zip(seg.PerFrameFunctionalGroupsSequence, iter_pixels(seg), strict=True):
        groups = own if "SegmentIdentificationSequence" in own else shared
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        voxels[labels[number]] += int(frame.sum())
    return voxels


def _images(series: Series, files: list[Path], volumes: bool) -> Path:
    """Return what the model can be given: one picture, or the folder of a volume."""
    if len(files) == 1 and not volumes:
        return files[0]
    found = find_series(files, root=files[0].parent)
    if len(found.cases) != 1:
        reasons = "; ".join(reason for _, reason in [*found.left_out, *found.bad]) or f"{len(found.cases)} series"
        raise ValueError(f"series {series}: expected {'a' if volumes else 'an image or a'} volume, got {reasons}.")
    return files[0].parent


def _tell_stored(segmentation: Segmentation, found: list[Series], tell: Callable[[str], None]) -> None:
    if older := sum(series.modality == "SEG" for series in found):
        tell(f"the study had {older} SEG series before; they stay as they are")
    tell(f"stored: series {segmentation.series_uid}, instance {segmentation.instance_uid}")


def _check_task(bundle: Path, trained: Mapping[str, Any]) -> None:
    task = trained.get("task", "segmentation")
    if task != "segmentation":
        raise ValueError(f"{bundle}: expected a bundle that segments, got one for {task}.")


@contextmanager
def _inner_errors(output_dir: Path | None = None) -> Iterator[None]:
    """Raise what went wrong in a bundle, not that it was evaluated or instantiated there."""
    try:
        yield
    except Exception as error:
        cause = behind_monai(error)
        if isinstance(cause, IncompleteInferenceError) and output_dir is not None:
            cases = json.loads((output_dir / "results.json").read_text())["cases"]
            case = next(case for case in cases if case["status"] == FAILED)  # a localizer in the series is skipped
            raise RuntimeError(f"the series cannot be segmented: {case['reason']}") from error
        if isinstance(cause, OSError | ValueError | ImportError | RuntimeError):
            raise cause from None
        raise RuntimeError(f"the bundle failed: {type(cause).__name__}: {cause}") from error
