# SPDX-License-Identifier: Apache-2.0
"""What is asked of a DICOMweb server, and what is made of its answers."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid

from ahm_engines.pacs import Pacs, Series, choose_series
from tests.fixtures_data import PATIENT_NAME, write_series
from tests.fixtures_pacs import FakePacs, fake_pacs
from tests.integration.processes import free_port

STUDY, SERIES = "1.2.840.1", "1.2.840.1.5"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakePacs]:
    """A study of one MR series with three slices."""
    write_series(tmp_path / "in", slices=3, StudyInstanceUID=STUDY, SeriesInstanceUID=SERIES)
    with fake_pacs(tmp_path / "in") as running:
        yield running


def result_file(tmp_path: Path) -> Path:
    """Write one more instance of the study, of modality SEG."""
    write_series(tmp_path / "new", slices=1, StudyInstanceUID=STUDY, Modality="SEG")
    return next((tmp_path / "new").iterdir())


def test_series_are_told_without_the_patient(server: FakePacs) -> None:
    assert Pacs(server.url).series(STUDY) == [Series(SERIES, "MR", 3)]
    assert str(Series(SERIES, "MR", 3)) == f"{SERIES} (MR, 3 images)"


def test_a_study_that_is_not_there(server: FakePacs) -> None:
    with pytest.raises(ValueError, match=r"has no study 1\.2\.3\."):
        Pacs(server.url).series("1.2.3")


@pytest.mark.parametrize("uid", ["", "Doe^Jane", "1.2.", "1.2/../3", "1.2\n"])
def test_what_is_no_uid_is_not_asked_for(server: FakePacs, uid: str) -> None:
    with pytest.raises(ValueError, match="expected a DICOM UID"):
        Pacs(server.url).series(uid)
    assert server.requests == []


def test_a_series_arrives_as_it_is(server: FakePacs, tmp_path: Path) -> None:
    files = Pacs(server.url).retrieve(STUDY, Series(SERIES, "MR", 3), tmp_path / "out")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert [pydicom.dcmread(path) for path in files] == server.instances


def test_a_series_that_arrives_in_part_is_none(server: FakePacs, tmp_path: Path) -> None:
    server.sent = 2
    with pytest.raises(OSError, match="sent 2 of 3 images"):
        Pacs(server.url).retrieve(STUDY, Series(SERIES, "MR", 3), tmp_path / "out")


def test_a_connection_that_breaks_off(server: FakePacs, tmp_path: Path) -> None:
    server.sent = -2
    with pytest.raises(OSError, match="asked to send a series, cannot be reached: IncompleteRead"):
        Pacs(server.url).retrieve(STUDY, Series(SERIES, "MR", 0), tmp_path / "out")


def test_an_instance_is_stored_in_its_study(server: FakePacs, tmp_path: Path) -> None:
    path = result_file(tmp_path)
    Pacs(server.url).store(path)
    assert server.segmentations == [pydicom.dcmread(path)]


def test_a_file_that_goes_in_chunks(server: FakePacs, tmp_path: Path) -> None:
    write_series(tmp_path / "new", slices=1, size=(1000, 1000), StudyInstanceUID=STUDY, Modality="SEG")
    path = next((tmp_path / "new").iterdir())
    Pacs(server.url).store(path)
    assert server.segmentations == [pydicom.dcmread(path)]


def test_what_the_server_fails_to_store(server: FakePacs, tmp_path: Path) -> None:
    server.failure = 0xA700
    with pytest.raises(OSError, match=r"did not store instance .*: failure reason A700H"):
        Pacs(server.url).store(result_file(tmp_path))


def test_what_the_server_says_it_stored_and_dropped(server: FakePacs, tmp_path: Path) -> None:
    server.drops = True
    with pytest.raises(OSError, match=r"took instance .* and does not have it"):
        Pacs(server.url).store(result_file(tmp_path))


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "token, are missing or wrong"), (403, "may not"), (404, "ends in /dicom-web"), (500, ""), (503, "")],
)
def test_refusals_are_told_in_one_line_and_not_repeated(
    server: FakePacs, tmp_path: Path, status: int, words: str
) -> None:
    server.status = {"GET series": status, "POST studies": status}
    pacs = Pacs(server.url)
    for call in (lambda: pacs.series(STUDY), lambda: pacs.store(result_file(tmp_path))):
        server.requests.clear()
        with pytest.raises(OSError, match=f"answered {status} .*{words}") as error:
            call()
        assert len(server.requests) == 1
        assert "\n" not in str(error.value) and PATIENT_NAME not in str(error.value)


@pytest.mark.parametrize("page", [b"<html>please log in</html>", b"[1]", b'{"a"', b"[{}]"])
def test_a_page_that_is_no_dicomweb(server: FakePacs, tmp_path: Path, page: bytes) -> None:
    server.page = page
    pacs = Pacs(server.url)
    with pytest.raises(OSError, match=r"did not answer in DICOMweb\.$"):
        pacs.series(STUDY)
    with pytest.raises(OSError, match=r"did not answer in DICOMweb\.$"):
        pacs.retrieve(STUDY, Series(SERIES, "MR", 3), tmp_path / "out")


def test_a_server_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match=r"cannot be reached: ConnectionRefusedError: .*refused") as error:
        Pacs(f"http://127.0.0.1:{free_port()}").series(STUDY)
    assert "\n" not in str(error.value)
    assert caplog.text == ""


def test_a_server_without_tls(server: FakePacs) -> None:
    with pytest.raises(OSError, match="cannot be reached: SSLError"):
        Pacs(server.url.replace("http:", "https:")).series(STUDY)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes the certificate")
def test_a_certificate_of_the_house(server: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "house.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    made = subprocess.run([*make.split(), "-keyout", "-", "-out", "-"], check=True, capture_output=True)
    certificate.write_bytes(made.stdout)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with fake_pacs(tmp_path / "in", certificate) as secured:
        with pytest.raises(OSError, match=r"cannot be reached: .*self-signed certificate"):
            Pacs(secured.url).series(STUDY)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert Pacs(secured.url).series(STUDY) == [Series(SERIES, "MR", 3)]


def test_a_full_disk_is_not_blamed_on_the_server(
    server: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pydicom.dataset.Dataset, "save_as", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\]"):
        Pacs(server.url).retrieve(STUDY, Series(SERIES, "MR", 3), tmp_path / "out")


def test_who_asks(server: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~/.netrc serves those who give nothing, and does not get into the way of a token."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login stranger password pass")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for given, expected in (
        ({"user": "ward", "password": "geheim"}, "Basic " + base64.b64encode(b"ward:geheim").decode()),
        ({"token": "t0ken"}, "Bearer t0ken"),
        ({}, "Basic " + base64.b64encode(b"stranger:pass").decode()),
    ):
        server.tag = expected
        assert Pacs(server.url, **given).series(STUDY)
        server.tag = "another"
        with pytest.raises(OSError, match="answered 401"):
            Pacs(server.url, **given).series(STUDY)


@pytest.mark.parametrize("url", ["http://ward:geheim@127.0.0.1/dicom-web", "ftp://127.0.0.1", "127.0.0.1:8042", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError) as error:
        Pacs(url)
    assert "geheim" not in str(error.value)


def test_dicomweb_client_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicomweb_client", None)
    with pytest.raises(ImportError, match=r"monai-ahm\[pacs\]"):
        Pacs("http://127.0.0.1")


MR, CT, SEG, SR = (Series(generate_uid(), modality, 9) for modality in ("MR", "CT", "SEG", "SR"))
MORE = Series(generate_uid(), "MR", 5)


@pytest.mark.parametrize(
    ("found", "options", "chosen"),
    [
        ([MR, CT, SEG], {"modality": "MR"}, MR),
        ([MR, CT, SEG], {"modality": "CT"}, CT),
        ([SR, MR, SEG], {}, MR),
        ([MR, MORE], {"uid": MORE.uid}, MORE),
        ([MR, MORE], {"uid": MORE.uid, "modality": "MR"}, MORE),
    ],
)
def test_the_series_that_is_meant(found: list[Series], options: dict[str, str], chosen: Series) -> None:
    assert choose_series(found, **options) == chosen


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [
        ([MR, MORE, CT], {"modality": "MR"}, f"2 series .* --series:\n  {MR}\n  {MORE}$"),
        ([MR, CT, SEG], {}, "2 series could be meant"),
        ([CT, SEG], {"modality": "MR"}, f"expected images of modality MR, got\n  {CT}\n  {SEG}$"),
        ([SEG, SR], {}, "expected images, got"),
        ([SEG, MR], {"uid": SEG.uid}, "expected images, got"),
        ([CT, MR], {"uid": CT.uid, "modality": "MR"}, f"expected images of modality MR, got\n  {CT}$"),
        ([MR], {"uid": "1.2.3"}, f"has no series 1.2.3; it has\n  {MR}"),
    ],
)
def test_a_series_that_is_not_clear(found: list[Series], options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        choose_series(found, **options)
