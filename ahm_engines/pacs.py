# SPDX-License-Identifier: Apache-2.0
"""A picture archive (PACS) by DICOMweb: look for series, fetch one, store a result and be sure that it is there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pydicom

__all__ = ["Pacs", "Series", "choose_series"]

# Modalities of what is said about images, or made of them.
NOT_IMAGES = ("DOC", "KO", "PLAN", "PR", "REG", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT", "SEG", "SR")
HINTS = {
    401: "user and password, or token, are missing or wrong",
    403: "this user may not do that",
    404: "nothing is there: is this the address of DICOMweb itself (that of Orthanc ends in /dicom-web)?",
}


class Series(NamedTuple):
    """What a PACS tells of a series without a word about the patient; ``images`` is 0 where it does not count them."""

    uid: str
    modality: str
    images: int

    def __str__(self) -> str:
        return f"{self.uid} ({self.modality or 'no modality'}, {self.images or '?'} images)"


class Pacs:
    """A DICOMweb server. Nothing is asked twice: what it refuses, or does not answer, is an error at once.

    TLS certificates and proxies are those of the environment, as `requests` reads it.

    Args:
        url: where its DICOMweb services are, such as ``https://pacs.example/dicom-web``.
        user, password: for HTTP basic authentication, if ``user`` is given.
        token: bearer token, if given.
        timeout_s: how long the server may be silent.

    Raises:
        ImportError: dicomweb-client is not installed.
        ValueError: no such address, or one with a password in it.
        OSError: from all methods, when the server cannot be reached, refuses, or speaks no DICOMweb.
    """

    def __init__(
        self,
        url: str,
        *,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        timeout_s: float = 60,
    ) -> None:
        if "@" in urlsplit(url).netloc:
            raise ValueError("the address must hold no user or password: everybody on this machine could read them.")
        self.url = url.rstrip("/")
        self._client = _client(self.url, _credentials(user, password, token), timeout_s)

    def series(self, study_uid: str) -> list[Series]:
        """Return the series of a study.

        Raises:
            ValueError: the UID is none, or there is no such study.
        """
        _check_uid("study", study_uid)
        with self._asking("list the series of a study"):
            found = self._client.search_for_series(study_uid, fields=["NumberOfSeriesRelatedInstances"])
            series = [_series(pydicom.Dataset.from_json(item)) for item in found]
        if not series:
            raise ValueError(f"{self.url} has no study {study_uid}.")
        return series

    def retrieve(self, study_uid: str, series: Series, folder: Path) -> list[Path]:
        """Write the files of a series into a new folder, one by one as they come.

        Raises:
            OSError: also when fewer came than the server had counted.
        """
        folder.mkdir(parents=True)
        files: list[Path] = []
        with self._asking("send a series"):
            for instance in self._client.iter_series(study_uid, series.uid):
                files.append(folder / f"{len(files):06d}.dcm")
                instance.save_as(files[-1], enforce_file_format=True)
        if series.images and len(files) != series.images:
            raise OSError(f"{self.url} sent {len(files)} of {series.images} images of series {series.uid}.")
        return files

    def store(self, path: Path) -> None:
        """Store a file in the study that it names, and look whether it is there.

        Servers may drop what a rule of theirs does not like and still answer that they took it: Orthanc does.

        Raises:
            OSError: it is not there.
        """
        dataset = pydicom.dcmread(path)
        names = (str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID))
        uid = str(dataset.SOPInstanceUID)
        with self._asking(f"store instance {uid}"):
            answer = self._client.store_instances([dataset], names[0])
        if failed := answer.get("FailedSOPSequence"):
            reason = int(failed[0].get("FailureReason", 0))
            raise OSError(f"{self.url} did not store instance {uid}: failure reason {reason:04X}H.")
        with self._asking(f"find instance {uid}, which it was just given"):
            found = self._client.search_for_instances(*names, search_filters={"SOPInstanceUID": uid})
        if not found:
            raise OSError(
                f"{self.url} took instance {uid} and does not have it: a rule of the server drops such objects, or it "
                "lists them later. Look before you store another one."
            )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Say in one line what went wrong; what the server wrote may be about patients and is not repeated."""
        import requests  # comes with dicomweb-client

        try:
            yield
        except requests.HTTPError as error:
            raise OSError(f"{self.url}, asked to {what}, answered {_status(error.response)}.") from error
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise OSError(f"{self.url}, asked to {what}, cannot be reached: {_deepest(error)}.") from error
        except requests.RequestException as error:
            raise OSError(f"{self.url}, asked to {what}, did not answer in DICOMweb.") from error
        except OSError:  # of this machine's disk
            raise
        except Exception as error:  # whatever a page of another kind makes the client stumble over
            raise OSError(f"{self.url}, asked to {what}, did not answer in DICOMweb.") from error


def choose_series(found: Sequence[Series], *, uid: str | None = None, modality: str | None = None) -> Series:
    """Return the one series that is meant.

    Args:
        found: the series of a study.
        uid: take this one.
        modality: take none of another modality; without it, any images will do.

    Raises:
        ValueError: when there is none, or more than one; the message lists what there is.
    """
    known = [series for series in found if uid in (None, series.uid)]
    if not known:
        raise ValueError(f"the study has no series {uid}; it has\n{_lines(found)}")
    fit = [s for s in known if (s.modality == modality if modality else s.modality not in NOT_IMAGES)]
    if not fit:
        raise ValueError(f"expected images{f' of modality {modality}' if modality else ''}, got\n{_lines(known)}")
    if len(fit) > 1:
        raise ValueError(f"{len(fit)} series could be meant; name one with --series:\n{_lines(fit)}")
    return fit[0]


def _lines(found: Sequence[Series]) -> str:
    return "\n".join(f"  {series}" for series in found)


def _client(url: str, auth: Any, timeout_s: float) -> Any:
    try:
        from dicomweb_client import DICOMwebClient  # optional
        from dicomweb_client.session_utils import create_session_from_auth
    except ImportError as error:
        raise ImportError('DICOMweb is spoken by dicomweb-client: pip install "monai-ahm[pacs]".') from error
    client = DICOMwebClient(url, session=create_session_from_auth(auth), timeout=timeout_s)
    client.set_http_retry_params(retry=False)  # a file sent in chunks would be empty the second time
    logging.getLogger("retrying").setLevel(logging.ERROR)  # it writes the traceback of what is raised anyway
    return client


def _credentials(user: str | None, password: str | None, token: str | None) -> Any:
    if token:
        return _Bearer(token)
    return (user, password or "") if user else None


class _Bearer:
    """Authentication by token; a header set by hand would give way to a password in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def _series(told: pydicom.Dataset) -> Series:
    count = told.get("NumberOfSeriesRelatedInstances") or 0
    return Series(str(told.SeriesInstanceUID), str(told.get("Modality", "")), int(count))


def _status(response: Any) -> str:
    hint = HINTS.get(response.status_code)
    return f"{response.status_code} {response.reason}{f' ({hint})' if hint else ''}"


def _check_uid(name: str, uid: str) -> None:
    if not re.fullmatch(r"\d+(\.\d+)*", uid, re.ASCII):
        raise ValueError(f"{name}: expected a DICOM UID such as 1.2.840.10008.1, got {uid!r}.")


def _deepest(error: BaseException) -> str:
    """Return what the network said, below the layers that passed it on."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"
