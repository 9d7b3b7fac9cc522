"""More than the service can take is refused at once, and what was accepted is answered."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import Server, photo


class Connection:
    """A connection that sends a request in parts."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def head(self, *fields: str) -> None:
        lines = ("POST /detect HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *fields, "", "")
        self.send("\r\n".join(lines).encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], Any]:
        status = int(self._file.readline().split()[1])
        fields: dict[str, str] = {}
        while line := self._file.readline().strip().decode():
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        return status, fields, json.loads(self._file.read(int(fields["content-length"])))


def await_in_progress(server: Server, count: int) -> None:
    while f"vultus_requests_in_progress {count}.0" not in server.client.get("/metrics").text:
        pass


def crowd(server: Server, count: int) -> list[httpx.Response]:
    """The answers to so many photos that are sent at once, each by a client of its own."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers.append(client.post("/detect", files={"image": ("photo", photo("biden.jpg"))}))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_beyond_the_queue_the_answer_is_429_and_the_load_passes(tmp_path: Path) -> None:
    with Server(tmp_path / "data", VULTUS_MAX_QUEUE="2") as server:
        answers = crowd(server, 24)
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.json()["code"] for answer in refused} == {"overloaded"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(len(answer.json()["faces"]) == 1 for answer in answers if answer.status_code == 200)
        server.identify("obama.jpg")
        metrics = server.client.get("/metrics").text
        assert "vultus_requests_in_progress 0.0" in metrics
        assert 'vultus_http_requests_total{method="POST",route="/detect",status="429"}' in metrics


def test_faces_of_many_requests_at_once_get_their_own_answers(shared_server: Server) -> None:
    shared_server.client.post("/galleries", json={"gallery": "crowd"}).raise_for_status()
    expected = {"obama2.jpg": "Obama", "biden.jpg": "Biden", "astronaut.png": None}
    shared_server.enroll("Obama", "obama.jpg", gallery="crowd")
    shared_server.enroll("Biden", "biden.jpg", gallery="crowd")
    wrong: list[str] = []

    def ask(name: str) -> None:
        (face,) = shared_server.identify(name, gallery="crowd")["faces"]
        if face["subject"] != expected[name]:
            wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in list(expected) * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_refusal_does_not_wait_for_the_body_and_keeps_the_connection(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "data", VULTUS_MAX_QUEUE="1") as server,
        Connection(server) as first,
        Connection(server) as second,
    ):
        body = b'{"image": "bm8gcGhvdG8="}'
        first.head(f"content-length: {len(body)}")
        await_in_progress(server, 1)
        second.head(f"content-length: {len(body)}")
        status, fields, problem = second.answer()
        assert (status, problem["code"]) == (429, "overloaded")
        assert int(fields["retry-after"]) >= 1
        first.send(body)
        assert first.answer()[0] == 415
        # The refused body comes late, and the next request on the same connection is understood.
        second.send(body)
        second.head(f"content-length: {len(body)}")
        second.send(body)
        assert second.answer()[0] == 415


def test_what_waits_too_long_is_refused(tmp_path: Path) -> None:
    with Server(tmp_path / "data", VULTUS_THREADS="1", VULTUS_MAX_WAIT="0.001") as server:
        answers = crowd(server, 12)
        assert {answer.status_code for answer in answers} == {200, 429}
        server.identify("biden.jpg")


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_bounded_together(tmp_path: Path, chunked: bool) -> None:
    with (
        Server(tmp_path / "data", VULTUS_MAX_REQUEST_BYTES="1000") as server,
        Connection(server) as first,
        Connection(server) as second,
        Connection(server) as third,
    ):
        for connection in (first, second):
            if chunked:
                connection.head("transfer-encoding: chunked")
                connection.send(b"384\r\n" + b" " * 900 + b"\r\n")
            else:
                connection.head("content-length: 900")
        await_in_progress(server, 2)
        answer = server.client.post("/detect", content=b" " * 300, headers={"content-type": "application/json"})
        while chunked and answer.status_code != 429:
            # What was sent in chunks counts only when it has arrived.
            answer = server.client.post("/detect", content=b" " * 300, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
        third.head("content-length: 100")
        third.send(b" " * 100)
        assert third.answer()[2]["code"] == "invalid_request"


def test_what_a_broken_connection_held_is_given_back(tmp_path: Path) -> None:
    with Server(tmp_path / "data", VULTUS_MAX_REQUEST_BYTES="1000") as server:
        for _ in range(5):
            with Connection(server) as connection:
                connection.head("content-length: 900")
                await_in_progress(server, 1)
            await_in_progress(server, 0)
        answer = server.client.post("/detect", content=b" " * 900, headers={"content-type": "application/json"})
        assert answer.json()["code"] == "invalid_request"
