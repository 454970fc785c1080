# SPDX-License-Identifier: Apache-2.0
"""Where the bundles are, and how they read a checkpoint."""

from __future__ import annotations

from pathlib import Path

from monai.bundle import ConfigParser

__all__ = ["bundles_folder", "inference_of"]


def bundles_folder(folder: str | Path | None = None) -> Path:
    """Return the folder of the bundles: the one given, ``bundles`` here, or that beside the installed packages.

    Raises:
        FileNotFoundError: when there is none.
    """
    places = [Path(folder)] if folder else [Path("bundles"), Path(__file__).parents[1] / "bundles"]
    for place in places:
        if (place / "ahm_pretrain" / "configs" / "train.json").is_file():
            return place.absolute()
    raise FileNotFoundError(
        f"no bundles in {', '.join(map(str, places))}: run from the project's folder, or pass --bundles_dir."
    )


def inference_of(bundle: str | Path, checkpoint: str | Path, *, device: str = "cpu") -> ConfigParser:
    """Return a bundle's inference.json for a checkpoint, whose settings fill it; nothing is built or loaded yet.

    Args:
        bundle: its folder.
        checkpoint: of the training of this bundle.
        device: where its networks will be.
    """
    parser = ConfigParser()
    parser.read_config(Path(bundle) / "configs" / "inference.json")
    parser.update({"bundle_root": str(bundle), "checkpoint": str(checkpoint), "device": device})
    return parser
