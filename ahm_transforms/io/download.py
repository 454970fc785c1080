# SPDX-License-Identifier: Apache-2.0
"""Fetch a task of the Medical Segmentation Decathlon; the only part that needs the internet."""

from __future__ import annotations

from pathlib import Path

from monai.apps import DecathlonDataset, download_and_extract


def download_decathlon(task: str, root_dir: str | Path) -> Path:
    """Download a Decathlon task unless it is there, and return its datalist ``dataset.json``.

    Hand the result to `load_cases` as ``datalist``. The data are CC-BY-SA 4.0 (Antonelli et al., Nature
    Communications 13, 2022).

    Args:
        task: such as ``Task04_Hippocampus``.
        root_dir: existing folder that the task is unpacked into.

    Raises:
        ValueError: unknown task.
        RuntimeError: the archive is damaged, or holds no datalist.
    """
    if task not in DecathlonDataset.resource:
        raise ValueError(f"unknown Decathlon task {task!r}, expected one of {', '.join(DecathlonDataset.resource)}.")
    datalist = Path(root_dir) / task / "dataset.json"
    if not datalist.is_file():
        url, md5 = DecathlonDataset.resource[task], DecathlonDataset.md5[task]
        download_and_extract(url, Path(root_dir) / f"{task}.tar", root_dir, hash_val=md5)
    if not datalist.is_file():
        raise RuntimeError(f"the archive of {task} holds no {datalist.name}; remove {task}.tar and try again.")
    return datalist
