# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m ahm_engines.monai_label``: put a bundle into an app of MONAI Label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ahm_engines.monai_label.bundles import add_bundle
from ahm_engines.options import entries, names

FAILED = 1  # exit code
console = Console()


def main(
    app: Annotated[Path, typer.Argument(help="Folder of the app; one of ours is made where there is none.")],
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    checkpoint: Annotated[Path | None, typer.Option(help="A trained model, to predict with and to train on.")] = None,
    pretrained: Annotated[Path | None, typer.Option(help="A pretraining, for a model that is to be trained.")] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes of such a model, with commas.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="One more entry: max_epochs=20.")] = None,
) -> None:
    """Put a bundle into an app of MONAI Label, with weights, and with the settings and class names of these."""
    try:
        target = add_bundle(
            app,
            bundle,
            checkpoint=checkpoint,
            pretrained=pretrained,
            classes=None if classes is None else names(classes),
            name=name,
            changes=entries(changes or []),
        )
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        raise typer.Exit(FAILED) from None
    console.print(f"{target} is ready: monailabel start_server --app {app} --studies SCANS", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
