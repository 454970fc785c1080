# SPDX-License-Identifier: Apache-2.0
"""Write files so that an interrupted run never leaves half of one."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock_folder", "unlock_folder", "writable_folder", "write_atomically", "write_csv", "write_json"]

LOCK = ".lock"
logger = logging.getLogger(__name__)


def writable_folder(folder: str | Path) -> Path:
    """Make a folder if need be, and be sure that files can be written there.

    Raises:
        OSError: naming the folder and what to do.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # no name of its own: processes of several machines may look at once
    except OSError as error:
        raise OSError(f"{path}: cannot write to this output folder ({error.strerror}); choose another one.") from error
    return path


def lock_folder(folder: str | Path) -> int | None:
    """Keep other processes out of a folder until this one ends or unlocks it; this one may lock it again.

    Returns:
        What :func:`unlock_folder` takes; ``None`` where there can be no lock, and nobody is kept out.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return None
    file = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the workers of a DataLoader would inherit
    except BlockingIOError as error:
        os.close(file)
        raise BlockingIOError(
            f"{folder}: another process is at work in this folder, or has not ended since; choose another output_dir."
        ) from error
    except OSError:
        logger.debug("%s: the file system has no locks.", folder)
    return file


def unlock_folder(folder: str | Path, file: int) -> None:
    """Let others in again."""
    (Path(folder) / LOCK).unlink(missing_ok=True)
    os.close(file)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Args:
        path: the file; an older one stays untouched until the new one is complete.
        write: gets the open binary file.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk is noticed without a name
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write readable JSON atomically; what JSON does not know is written as text."""
    text = json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write comma-separated values atomically; NaN stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
    return write_atomically(path, lambda file: file.write(text.getvalue().encode()))
