# SPDX-License-Identifier: Apache-2.0
"""A small DICOMweb server that fails in the ways of real ones when told so, and a model with known results."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pydicom

from tests.bundles.ahm_segmentation.segmenting import write_threshold

BOUNDARY = "next-part"
UNITS = "studies", "series", "instances"


class FakePacs(ThreadingHTTPServer):
    """Keeps instances and every request; ``url`` is its address.

    Attributes:
        status: what to answer instead, by method and last word of the path, such as ``"GET series"``.
        page: a body that is no DICOMweb, for every answer.
        sent: how many instances of a series to send; a negative number breaks the connection after as many.
        drops: whether it says that it stored what it did not.
        failure: the reason of failure that it gives for all that shall be stored.
        tag: ask for this header value, and refuse others.
    """

    daemon_threads = True

    def __init__(self, instances: Sequence[pydicom.Dataset] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/dicom-web"
        self.instances = list(instances)
        self.requests: list[str] = []
        self.status: dict[str, int] = {}
        self.page = b""
        self.sent: int | None = None
        self.drops = False
        self.failure = 0
        self.tag = ""

    @property
    def segmentations(self) -> list[pydicom.Dataset]:
        """What was stored as DICOM SEG."""
        return [instance for instance in self.instances if instance.Modality == "SEG"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""


@contextmanager
def fake_pacs(folder: Path, certificate: Path | None = None) -> Iterator[FakePacs]:
    """Serve the DICOM files of a folder until the block ends, by TLS if there is a certificate with its key."""
    with FakePacs([pydicom.dcmread(path) for path in sorted(folder.iterdir())]) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.url = server.url.replace("http:", "https:")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def encoded(dataset: pydicom.Dataset) -> bytes:
    """Return a data set as the bytes of its file."""
    stream = BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def find_bright(path: Path, dims: int = 3, **settings: Any) -> list[str]:
    """Write a checkpoint that marks what is bright, and return the options of ``ahm pacs`` that choose it."""
    network = write_threshold(path, dims, **settings)["network_def"]
    return ["--checkpoint", str(path), "--set", f"network_def={json.dumps(network)}"]


def bright(images: list[pydicom.Dataset]) -> dict[str, np.ndarray]:
    """Return what the network must find in each slice: all above the middle of the 1st and 99th percentiles."""
    values = np.stack([image.pixel_array for image in images]).astype(float)
    low, high = np.percentile(values, [1, 99])
    return {str(image.SOPInstanceUID): slice_ > (low + high) / 2 for image, slice_ in zip(images, values, strict=True)}


def assert_marks(seg: pydicom.Dataset, expected: dict[str, np.ndarray], *, borderline: int = 0) -> None:
    """Every frame of a DICOM SEG with one segment marks what it should in the slice that it refers to.

    ``borderline`` voxels of a frame may differ: where many have the value of the threshold, rounding decides.
    """
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    assert len(frames) == sum(found.any() for found in expected.values())
    for groups, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert (frame != expected[str(source.ReferencedSOPInstanceUID)]).sum() <= borderline


class _Handler(BaseHTTPRequestHandler):
    server: FakePacs

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        kind = path.split("/")[-1]
        name = f"GET {kind if kind in UNITS else 'files'}"
        if self._refused(name):
            return
        below = [x for x in self.server.instances if all(uid in _uids(x) for uid in re.findall(r"/([\d.]+)", path))]
        if wanted := re.search(r"(?:SOPInstanceUID|00080018)=([\d.]+)", query):
            below = [instance for instance in below if instance.SOPInstanceUID == wanted[1]]
        if name == "GET files":
            self._send_files(below)
        else:
            self._send(json.dumps(_series(below) if kind == "series" else [x.to_json_dict() for x in below]).encode())

    def do_POST(self) -> None:
        body = self._body()
        if self._refused("POST studies"):
            return
        parts = body.split(b"--" + self.headers["Content-Type"].split('boundary="')[1].rstrip('"').encode())[1:-1]
        given = [pydicom.dcmread(BytesIO(part.split(b"\r\n\r\n", 1)[1])) for part in parts]
        answer = pydicom.Dataset()
        items = [_reference(instance, self.server.failure) for instance in given]
        if self.server.failure:
            answer.FailedSOPSequence = items
        else:
            answer.ReferencedSOPSequence = items
            self.server.instances += [] if self.server.drops else given
        self._send(answer.to_json().encode(), 202 if self.server.failure else 200)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _refused(self, name: str) -> bool:
        self.server.requests.append(name)
        status = self.server.status.get(name)
        if self.server.tag and self.headers.get("Authorization") != self.server.tag:
            status = 401
        if status:
            self._send(b"Doe^Jane is not here", status, "text/plain")
        elif self.server.page:
            self._send(self.server.page, kind="text/html")
        return bool(status or self.server.page)

    def _send(self, body: bytes, status: int = 200, kind: str = "application/dicom+json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_files(self, instances: Sequence[pydicom.Dataset]) -> None:
        count = self.server.sent if self.server.sent is not None else len(instances)
        start = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        parts = [start + encoded(instance) + b"\r\n" for instance in instances[: abs(count)]]
        body = b"".join(parts) + f"--{BOUNDARY}--".encode()
        self.send_response(200)
        self.send_header("Content-Type", f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"')
        self.send_header("Content-Length", str(len(body) + (1000 if count < 0 else 0)))
        self.end_headers()
        self.wfile.write(body)


def _uids(instance: pydicom.Dataset) -> tuple[str, ...]:
    return str(instance.StudyInstanceUID), str(instance.SeriesInstanceUID), str(instance.SOPInstanceUID)


def _series(instances: Sequence[pydicom.Dataset]) -> list[dict[str, Any]]:
    rows = {}
    for uid in dict.fromkeys(_uids(instance)[1] for instance in instances):
        members = [instance for instance in instances if _uids(instance)[1] == uid]
        row = pydicom.Dataset()
        row.SeriesInstanceUID, row.Modality = uid, members[0].Modality
        row.PatientName, row.NumberOfSeriesRelatedInstances = members[0].PatientName, len(members)
        rows[uid] = row.to_json_dict()
    return list(rows.values())


def _reference(instance: pydicom.Dataset, failure: int) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    if failure:
        item.FailureReason = failure
    return item
