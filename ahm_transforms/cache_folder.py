# SPDX-License-Identifier: Apache-2.0
"""A folder that keeps what was made of cases."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ahm_transforms.fingerprint import fingerprint

__all__ = ["CacheFolder"]


class CacheFolder:
    """Files called by the fingerprints of cases, without names of files or patients.

    Several processes and threads may use one folder; nothing in it is ever removed.

    Args:
        folder: where they are; it is made if need be.
        made_by: what else decides the content of a file, see `fingerprint`.
        suffix: of the files.

    Raises:
        OSError: when the folder cannot be made.
    """

    def __init__(self, folder: str | Path, *made_by: Any, suffix: str) -> None:
        self.folder = Path(folder)
        self.made_by = made_by
        self.suffix = suffix
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cache_dir: expected a folder to write to, got {folder} ({error.strerror}).") from error

    def path(self, case: Mapping[str, Any]) -> Path:
        """Return where the file of a case is, or would be."""
        return self.folder / f"{fingerprint(case, *self.made_by)}{self.suffix}"

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """Give a temporary file to fill, which becomes ``path`` in one step when that ends without an error.

        Raises:
            OSError: when it cannot be written; torch says so by a RuntimeError.
        """
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            raise OSError(f"cache_dir: cannot write to {self.folder} ({error}).") from error
        finally:
            temporary.unlink(missing_ok=True)
