# SPDX-License-Identifier: Apache-2.0
"""Put a bundle and the settings of a federation into an NVFlare job: ``python make_job.py BUNDLE SETTINGS JOB``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "job"
KEY_METRICS = {"ahm_pretrain": "random_psnr", "ahm_segmentation": "dice", "ahm_classification": "macro_f1"}
MODELS = {"ahm_pretrain": "runs/pretrain/models"}  # the others keep theirs in "models"


def make_job(
    bundle: Path, settings: dict[str, Any], job: Path, *, rounds: int, local_epochs: int, clients: int
) -> None:
    """Write the job folder.

    NVFlare's server reads ``train.json`` alone, so that the settings go into the files themselves. Schedules span all
    rounds, hence ``max_epochs``.

    Args:
        bundle: folder of the bundle.
        settings: options as on the command line of the bundle; the same on all sites.
        job: folder to write, which must not exist.
        rounds: of federated averaging.
        local_epochs: of every site in every round.
        clients: that must have answered in each round.

    Raises:
        FileExistsError: when the job folder exists.
        FileNotFoundError: when there is no such bundle.
    """
    name = bundle.resolve().name
    settings = settings | {"max_epochs": rounds * local_epochs}
    files = {part: read(bundle / f"configs/{part}.json") | settings for part in ("train", "evaluate")}
    models = MODELS.get(name, "models")
    common = {"bundle": name, "key_metric": KEY_METRICS[name]}
    options = {
        "meta.json": {"name": name, "min_clients": clients},
        "app/config/config_fed_server.json": {**common, "min_clients": clients, "num_rounds": rounds},
        "app/config/config_fed_client.json": {
            **common,
            "local_epochs": local_epochs,
            "best_model": f"{models}/model.pt",
            "last_model": f"{models}/last.pt",
        },
    }
    shutil.copytree(TEMPLATE, job)
    for file, values in options.items():
        write(job / file, read(job / file) | values)
    shutil.copytree(bundle / "configs", job / "app" / name / "configs")
    for part, content in files.items():
        write(job / "app" / name / f"configs/{part}.json", content)


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="such as bundles/ahm_segmentation")
    parser.add_argument("settings", type=Path, help="JSON file with the options of all sites")
    parser.add_argument("job", type=Path, help="folder to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local_epochs", type=int, default=1)
    parser.add_argument("--clients", type=int, default=2)
    given = parser.parse_args()
    counts = {"rounds": given.rounds, "local_epochs": given.local_epochs, "clients": given.clients}
    make_job(given.bundle, read(given.settings), given.job, **counts)


if __name__ == "__main__":
    main()
