"""A client of a running service, for the enrolment of whole folders."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.layout import Lot

_TRIES = 3
_LONGEST_PAUSE = 60.0
_OF_THE_PHOTOS = {"identity_mismatch", "image_too_large", "invalid_request", "subject_conflict"}
"""Codes that speak of what was sent; the photo codes come with ``rejected``. All others would come again each time."""

_ANOTHER = "Another photo of this person shows somebody else, and nothing of these was stored."


class ClientError(RuntimeError):
    """The service cannot be used, and the message says why. What it has accepted stays."""


@dataclass(frozen=True)
class Refused:
    """A photo that was not enrolled. ``code``: as in the API."""

    file: str
    code: str
    detail: str


@dataclass(frozen=True)
class LotResult:
    """What became of a lot: how many of its photos are enrolled now, and the others."""

    enrolled: int
    refused: tuple[Refused, ...]


class Client:
    """A service at ``url``, asked with ``key`` if it has keys. Safe to use from several threads."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=180)
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def enroll(
        self, folder: Path, lots: Sequence[Lot], gallery: str, *, allow_conflict: bool = False, jobs: int = 4
    ) -> Iterator[LotResult]:
        """Enrol lots of photos below ``folder``, ``jobs`` at a time, and yield what became of each as it is done.

        A photo that its subject has already is not worked on again, so that the same call goes on where another has
        stopped. While the service is busy its ``Retry-After`` is waited for. Raises ``ClientError`` where the next lot
        would fare no better, and ``OSError`` for a file that cannot be read.
        """
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = [pool.submit(self._enroll, folder, lot, gallery, allow_conflict) for lot in lots]
            for future in as_completed(futures):
                yield future.result()
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def _enroll(self, folder: Path, lot: Lot, gallery: str, allow_conflict: bool) -> LotResult:
        photos = [(file, (folder / file).read_bytes()) for file in lot.files]
        answer = self._post(
            "/enroll",
            data={"subject": lot.person, "gallery": gallery, "allow_conflict": str(allow_conflict).lower()},
            files=[("images", (f"{number}", data)) for number, (_, data) in enumerate(photos)],
        )
        body = _json(answer)
        refused = [Refused(lot.files[item["index"]], item["code"], item["detail"]) for item in body.get("rejected", ())]
        if answer.status_code == 201:
            return LotResult(len(lot.files) - len(refused), tuple(refused))
        if not refused:
            if body.get("code") not in _OF_THE_PHOTOS:
                raise ClientError(f"{body.get('title')} ({body.get('code')}): {body.get('detail')}")
            conflicts = body.get("conflicts", ())
            details = dict.fromkeys(lot.files, _ANOTHER if conflicts else body["detail"])
            details |= {lot.files[item["index"]]: f"Shows {item['subject']!r}, enrolled already." for item in conflicts}
            refused = [Refused(file, body["code"], detail) for file, detail in details.items()]
        return LotResult(0, tuple(refused))

    def _post(self, path: str, **content: Any) -> httpx.Response:
        failed = 0
        while True:
            try:
                answer = self._http.post(path, **content)
            except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
                failed += 1
                if failed == _TRIES or self._stopped.is_set():
                    raise ClientError(f"{self._http.base_url} does not answer: {exc}") from exc
                pause = 1.0
            else:
                if answer.status_code not in (429, 503):
                    return answer
                stated = answer.headers.get("retry-after", "")
                pause = min(float(stated) if stated.isdecimal() else 1.0, _LONGEST_PAUSE)
            # Not all at once again.
            if self._stopped.wait(pause * random.uniform(1, 1.5)):  # noqa: S311
                raise ClientError("Stopped.")


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ClientError(f"{answer.url} answers with status {answer.status_code} and is no Vultus service.")
    return body
