# SPDX-License-Identifier: Apache-2.0
"""Files are complete or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from ahm_engines.files import write_atomically


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'") as error:
        write_atomically(tmp_path / "results.json", full)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
