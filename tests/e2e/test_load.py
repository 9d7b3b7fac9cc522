"""More than the service can take is refused at once, and what was accepted is answered."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx

from tests.support import Server, photo


def test_beyond_the_queue_the_answer_is_429_and_the_load_passes(tmp_path: Path) -> None:
    with Server(tmp_path / "data", VULTUS_MAX_QUEUE="2") as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answers.append(client.post("/detect", files={"image": ("photo", photo("biden.jpg"))}))

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
