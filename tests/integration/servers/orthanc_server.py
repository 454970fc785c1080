# SPDX-License-Identifier: Apache-2.0
"""A PACS for tests: Orthanc with its DICOMweb plugin, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.processes import free_port, missing, serving

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")  # where Debian keeps it
USER, PASSWORD = "ward", "not a secret"
DROP_SEG = """
function ReceivedInstanceFilter(dicom, origin, info)
    return dicom.Modality ~= 'SEG'
end
"""
READ_ONLY = """
function IncomingHttpRequestFilter(method, uri, ip, username, httpHeaders)
    return method == 'GET'
end
"""


@contextmanager
def orthanc(folder: Path, *, password: bool = False, lua: str = "") -> Iterator[str]:
    """Run Orthanc until the block ends, and give the address of its DICOMweb; a later one finds the same images.

    Debian's version listens on all interfaces, and answers this machine only.

    Args:
        folder: for its files, its index and its log.
        password: whether ``USER`` must say ``PASSWORD``.
        lua: its rules.
    """
    program = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None or not PLUGIN.exists():
        missing("Orthanc with its DICOMweb plugin")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (folder / "rules.lua").write_text(lua)
    configuration = {
        "StorageDirectory": str(folder / "images"),
        "IndexDirectory": str(folder / "images"),
        "Plugins": [str(PLUGIN)],
        "LuaScripts": [str(folder / "rules.lua")],
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": password,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    url = f"http://127.0.0.1:{port}"
    with serving([str(program), str(folder / "orthanc.json")], url, folder / "orthanc.log"):
        yield f"{url}/dicom-web"
