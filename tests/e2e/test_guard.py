"""Nobody is enrolled under two names, or with somebody else's photos, by mistake."""

from __future__ import annotations

import base64
import threading

import httpx
import pytest

from tests.support import Server, photo

NAMES = ["obama.jpg", "obama2.jpg", "obama3.jpg"]


@pytest.fixture
def gallery(shared_server: Server, request: pytest.FixtureRequest) -> str:
    """A gallery of the test's own in which obama.jpg is Ann and biden.jpg is Bob."""
    name = f"guard-{abs(hash(request.node.name))}"
    shared_server.client.post("/galleries", json={"gallery": name}).raise_for_status()
    shared_server.enroll("Ann", "obama.jpg", gallery=name)
    shared_server.enroll("Bob", "biden.jpg", gallery=name)
    return name


def send(server: Server, gallery: str, subject: str, *names: str, **fields: str) -> httpx.Response:
    return server.client.post(
        "/enroll",
        data={"subject": subject, "gallery": gallery, **fields},
        files=[("images", ("photo", photo(name))) for name in names],
    )


def held(server: Server, gallery: str) -> dict[str, int]:
    """How many faces each subject has; the index agrees."""
    page = server.client.get("/subjects", params={"gallery": gallery}).json()
    found = {subject["subject"]: len(subject["faces"]) for subject in page["subjects"]}
    assert server.client.get("/operating-points", params={"gallery": gallery}).json()["templates"] == sum(
        found.values()
    )
    return found


def test_a_new_subject_who_is_enrolled_already_is_refused_and_told_who_it_is(
    shared_server: Server, gallery: str
) -> None:
    answer = send(shared_server, gallery, "Carl", "obama2.jpg", "obama3.jpg", metadata='{"n": 1}')
    body = answer.json()
    assert (answer.status_code, body["code"]) == (409, "subject_conflict")
    assert [(item["index"], item["subject"]) for item in body["conflicts"]] == [(0, "Ann"), (1, "Ann")]
    (face,) = shared_server.client.get("/subjects/Ann", params={"gallery": gallery}).json()["faces"]
    for item in body["conflicts"]:
        assert item["face_id"] == face["face_id"]
        assert item["similarity"] >= item["threshold"]
    assert held(shared_server, gallery) == {"Ann": 1, "Bob": 1}


def test_the_caller_may_know_better(shared_server: Server, gallery: str) -> None:
    image = base64.b64encode(photo("obama2.jpg")).decode()
    call = {"subject": "Carl", "images": [image], "gallery": gallery}
    assert shared_server.client.post("/enroll", json=call).status_code == 409
    assert shared_server.client.post("/enroll", json=call | {"allow_conflict": "often"}).status_code == 422
    assert shared_server.client.post("/enroll", json=call | {"allow_conflict": True}).status_code == 201
    assert send(shared_server, gallery, "Dora", "obama3.jpg", allow_conflict="true").status_code == 201
    assert held(shared_server, gallery) == {"Ann": 1, "Bob": 1, "Carl": 1, "Dora": 1}


def test_a_photo_of_somebody_else_is_not_added_to_a_subject(shared_server: Server, gallery: str) -> None:
    answer = send(shared_server, gallery, "Bob", "obama2.jpg", metadata='{"n": 1}')
    assert answer.json()["conflicts"][0]["subject"] == "Ann"
    assert shared_server.client.get("/subjects/Bob", params={"gallery": gallery}).json()["metadata"] == {}
    # One's own photos are no conflict, nor is a subject that looks like it once it was allowed.
    assert send(shared_server, gallery, "Ann", "obama2.jpg").status_code == 201
    assert send(shared_server, gallery, "Carl", "obama3.jpg", allow_conflict="true").status_code == 201
    assert send(shared_server, gallery, "Ann", "obama.jpg", "obama2.jpg").status_code == 201
    assert held(shared_server, gallery) == {"Ann": 2, "Bob": 1, "Carl": 1}


def test_other_galleries_are_no_conflict(shared_server: Server, gallery: str) -> None:
    shared_server.client.post("/galleries", json={"gallery": f"{gallery}-2"}).raise_for_status()
    assert send(shared_server, f"{gallery}-2", "Carl", "obama2.jpg").status_code == 201


def test_a_photo_that_does_not_match_its_siblings_is_rejected(shared_server: Server, gallery: str) -> None:
    more = send(shared_server, gallery, "Ann", "biden.jpg", "obama2.jpg", "obama3.jpg")
    assert more.status_code == 201
    assert [(item["index"], item["code"]) for item in more.json()["rejected"]] == [(0, "identity_mismatch")]
    assert held(shared_server, gallery) == {"Ann": 3, "Bob": 1}


def test_of_two_photos_that_do_not_match_the_first_stays(shared_server: Server, gallery: str) -> None:
    answer = send(shared_server, gallery, "Eve", "astronaut.png", "obama2.jpg")
    assert answer.status_code == 201
    assert [(item["index"], item["code"]) for item in answer.json()["rejected"]] == [(1, "identity_mismatch")]
    # What is rejected is not looked up; what stays is.
    assert send(shared_server, gallery, "Fay", "obama2.jpg", "astronaut.png").json()["conflicts"][0]["index"] == 0
    assert held(shared_server, gallery) == {"Ann": 1, "Bob": 1, "Eve": 1}


def enroll_at_once(
    server: Server, gallery: str, number: int, start: threading.Barrier, answers: list[httpx.Response]
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        start.wait()
        answers.append(
            client.post(
                "/enroll",
                data={"subject": f"p{number}", "gallery": gallery},
                files={"images": ("photo", photo(NAMES[number % 3]))},
            )
        )


def test_of_many_who_enrol_one_person_at_once_one_wins(shared_server: Server) -> None:
    for turn in range(2):
        gallery = f"race-{turn}"
        shared_server.client.post("/galleries", json={"gallery": gallery}).raise_for_status()
        answers: list[httpx.Response] = []
        start = threading.Barrier(15)

        threads = [
            threading.Thread(target=enroll_at_once, args=(shared_server, gallery, number, start, answers))
            for number in range(15)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 14
        (winner,) = [answer.json()["subject"] for answer in answers if answer.status_code == 201]
        losers = [answer.json() for answer in answers if answer.status_code == 409]
        assert {item["subject"] for body in losers for item in body["conflicts"]} == {winner}
        assert held(shared_server, gallery) == {winner: 1}


def test_a_deleted_person_is_no_conflict(shared_server: Server, gallery: str) -> None:
    assert send(shared_server, gallery, "Carl", "obama2.jpg").status_code == 409
    shared_server.client.delete("/subjects/Ann", params={"gallery": gallery}).raise_for_status()
    assert send(shared_server, gallery, "Carl", "obama2.jpg").status_code == 201


def test_the_best_similarities_of_probes_are_in_the_metrics_until_the_gallery_is_gone(
    shared_server: Server, gallery: str
) -> None:
    assert shared_server.client.get("/operating-points", params={"gallery": gallery}).json()["drift"] == {
        "probes": 0,
        "expected": 0.375,
        "measured": None,
        "warning": None,
    }
    for name in ("obama2.jpg", "astronaut.png", "astronaut.png"):
        shared_server.identify(name, gallery=gallery)
    strange = {"images": ("photo", photo("astronaut.png"))}
    shared_server.client.post("/search-unknown", data={"gallery": gallery}, files=strange).raise_for_status()
    series = f'gallery="{gallery}"'
    lines = [line for line in shared_server.client.get("/metrics").text.splitlines() if series in line]
    counts = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert counts[f'vultus_probe_similarity_count{{decision="unknown",{series}}}'] == 3
    assert counts[f'vultus_probe_similarity_count{{decision="match",{series}}}'] == 1
    assert counts[f'vultus_probe_similarity_bucket{{decision="match",{series},le="0.95"}}'] == 0
    assert counts[f'vultus_probe_similarity_bucket{{decision="match",{series},le="0.975"}}'] == 1
    shared_server.client.delete(f"/galleries/{gallery}").raise_for_status()
    assert series not in shared_server.client.get("/metrics").text
