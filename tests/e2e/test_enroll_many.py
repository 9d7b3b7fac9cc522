"""`vultus enroll DIR` and `POST /enroll/batch`: many people at once, also when it is cut short."""

from __future__ import annotations

import http.client
import io
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support import Server, environment, photo, vultus


def faces(number: int) -> bytes:
    """A photo that differs from the others in its bytes, of one of two people."""
    image = Image.open(io.BytesIO(photo("obama.jpg" if number % 2 else "biden.jpg"))).convert("RGB")
    image.thumbnail((300 + number, 300 + number))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def empty() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(out, "PNG")
    return out.getvalue()


TREE: dict[str, bytes] = {
    "Barack Obama/1.jpg": photo("obama.jpg"),
    "Barack Obama/2.jpg": photo("obama2.jpg"),
    "Barack Obama/not.png": empty(),
    "Joe Biden/1.jpg": photo("biden.jpg"),
    "Joe Biden/notes.txt": b"not a photo",
}


def laid(folder: Path, tree: Mapping[str, bytes]) -> Path:
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zipped(tree: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return out.getvalue()


def enrolled(server: Server, gallery: str = "default") -> dict[str, int]:
    """How many faces each subject has."""
    found: dict[str, int] = {}
    cursor: dict[str, str] = {}
    while True:
        page = server.client.get("/subjects", params={"gallery": gallery, **cursor}).json()
        found |= {subject["subject"]: len(subject["faces"]) for subject in page["subjects"]}
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


def on_disk(server: Server) -> int:
    """How many faces there are, without asking a service that may be too busy to say so in time."""
    with closing(sqlite3.connect(f"file:{server.data_dir / 'vultus.db'}?mode=ro", uri=True)) as database:
        (count,) = database.execute("SELECT count(*) FROM faces").fetchone()
        return int(count)


def gallery(server: Server, name: str) -> str:
    server.client.post("/galleries", json={"gallery": name}).raise_for_status()
    return name


def run(server: Server, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return vultus("enroll", *arguments, data_dir=server.data_dir.parent / "none", VULTUS_URL=server.url, **variables)


def sent(server: Server, tree: Mapping[str, bytes] | bytes, **fields: str) -> httpx.Response:
    data = tree if isinstance(tree, bytes) else zipped(tree)
    return server.client.post("/enroll/batch", data=fields, files={"archive": ("photos.zip", data)})


# --- the command


def test_a_folder_is_enrolled_and_what_was_not_is_said(shared_server: Server, tmp_path: Path) -> None:
    name = gallery(shared_server, "folder")
    for _ in range(2):
        done = run(shared_server, str(laid(tmp_path, TREE)), "--gallery", name)
        assert done.returncode == 1, done.stderr
        (line,) = done.stdout.splitlines()
        assert line.split("\t")[:2] == ["Barack Obama/not.png", "no_face"]
        assert "3 photos are enrolled, 1 are not; 1 other files." in done.stderr
        assert enrolled(shared_server, name) == {"Barack Obama": 2, "Joe Biden": 1}


def test_everything_enrolled_is_status_0(shared_server: Server, tmp_path: Path) -> None:
    done = run(
        shared_server, str(laid(tmp_path, {"A/1.jpg": photo("obama.jpg")})), "--gallery", gallery(shared_server, "a")
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_conflicts_and_strangers_among_the_photos_are_refused(shared_server: Server, tmp_path: Path) -> None:
    name = gallery(shared_server, "conflicts")
    shared_server.enroll("Joe Biden", "biden.jpg", gallery=name)
    tree = {
        "Joseph/1.jpg": photo("biden.jpg"),
        "Barack/1.jpg": photo("obama.jpg"),
        "Barack/2.jpg": photo("obama2.jpg"),
        "Barack/3.jpg": photo("astronaut.png"),
        "\x07bell/1.jpg": photo("obama3.jpg"),
    }
    done = run(shared_server, str(laid(tmp_path, tree)), "--gallery", name)
    assert done.returncode == 1
    assert [line.split("\t")[:2] for line in done.stdout.splitlines()] == [
        ["\x07bell/1.jpg", "invalid_request"],
        ["Barack/3.jpg", "identity_mismatch"],
        ["Joseph/1.jpg", "subject_conflict"],
    ]
    assert "Shows 'Joe Biden', enrolled already." in done.stdout
    assert enrolled(shared_server, name) == {"Joe Biden": 1, "Barack": 2}
    done = run(shared_server, str(tmp_path), "--gallery", name, "--allow-conflict")
    assert enrolled(shared_server, name) == {"Joe Biden": 1, "Barack": 2, "Joseph": 1}


@pytest.mark.parametrize(
    ("tree", "arguments", "says"),
    [
        ({"top.jpg": b""}, (), "no photos in folders"),
        (TREE, ("--gallery", "nowhere"), "gallery_not_found"),
        (TREE, ("--url", "http://127.0.0.1:9"), "does not answer"),
        (TREE, ("--url", "nonsense"), "does not answer"),
    ],
)
def test_what_keeps_it_from_working_is_status_2(
    shared_server: Server, tmp_path: Path, tree: dict[str, bytes], arguments: tuple[str, ...], says: str
) -> None:
    done = run(shared_server, str(laid(tmp_path, tree)), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_is_needed_where_there_are_keys(tmp_path: Path) -> None:
    keys = {"VULTUS_API_KEYS_FILE": str(tmp_path / "keys.json")}
    secrets = {
        role: vultus("keys", "add", role, "--role", role, data_dir=tmp_path, **keys).stdout.strip()
        for role in ("read", "write")
    }
    folder = laid(tmp_path / "photos", {"A/1.jpg": photo("obama.jpg")})
    with Server(tmp_path / "data", **keys) as server:
        for key, code in (("", "unauthorized"), (secrets["read"], "forbidden")):
            done = run(server, str(folder), VULTUS_KEY=key)
            assert done.returncode == 2
            assert code in done.stderr
            answer = httpx.post(f"{server.url}/enroll/batch", headers={"authorization": f"Bearer {key or 'none'}"})
            assert answer.json()["code"] == code
        assert run(server, str(folder), VULTUS_KEY=secrets["write"]).returncode == 0


def test_killed_and_run_again_nothing_is_twice_and_nothing_missing(tmp_path: Path) -> None:
    folder = laid(
        tmp_path / "photos",
        {f"person {one}/{photo}.jpg": faces(20 * one + 2 * photo + one % 2) for one in range(30) for photo in range(4)},
    )
    with Server(tmp_path / "data") as server:
        command = [
            sys.executable,
            "-m",
            "service.cli",
            "enroll",
            str(folder),
            "--url",
            server.url,
            "--allow-conflict",
            "--jobs",
            "1",
        ]
        for end in (signal.SIGKILL, signal.SIGINT):
            before = on_disk(server)
            process = subprocess.Popen(
                command, env=environment(tmp_path / "none"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while on_disk(server) <= before:
                assert process.poll() is None
            process.send_signal(end)
            assert process.wait(60) != 0
        # The service dies too, in the middle of it.
        process = subprocess.Popen(
            command, env=environment(tmp_path / "none"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = on_disk(server)
        while on_disk(server) <= before and process.poll() is None:
            pass
        server.kill()
        process.wait(60)
        server.start()
        done = run(server, str(folder), "--allow-conflict")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert enrolled(server) == {f"person {one}": 4 for one in range(30)}
        assert server.identify("obama2.jpg")["templates"] == 120


def test_a_busy_service_is_waited_for(tmp_path: Path) -> None:
    folder = laid(tmp_path / "photos", {f"person {one}/1.jpg": faces(one) for one in range(10)})
    with Server(tmp_path / "data", VULTUS_MAX_QUEUE="1") as server:
        done = run(server, str(folder), "--allow-conflict", "--jobs", "4")
        assert done.returncode == 0, done.stderr
        assert len(enrolled(server)) == 10
        assert 'route="/enroll",status="429"' in server.client.get("/metrics").text


# --- the endpoint


def test_a_batch_answers_for_each_person_and_goes_on_where_it_was(shared_server: Server) -> None:
    name = gallery(shared_server, "batch")
    shared_server.enroll("Eileen", "astronaut.png", gallery=name)
    tree = TREE | {"Somebody/1.png": photo("astronaut.png"), "Somebody/2.jpg": photo("obama3.jpg")}
    answers = [sent(shared_server, tree, gallery=name).json() for _ in range(2)]
    assert answers[0] == answers[1]
    body = answers[0]
    assert (body["gallery"], body["faces"], body["ignored"]) == (name, 3, 1)
    people: dict[str, Any] = {person["subject"]: person for person in body["people"]}
    assert {subject: person["faces"] for subject, person in people.items()} == {
        "Barack Obama": 2,
        "Joe Biden": 1,
        "Somebody": 0,
    }
    assert [(item["file"], item["code"]) for item in people["Barack Obama"]["rejected"]] == [
        ("Barack Obama/not.png", "no_face")
    ]
    (conflict,) = people["Somebody"]["conflicts"]
    assert (conflict["file"], conflict["subject"]) == ("Somebody/1.png", "Eileen")
    assert [(item["file"], item["code"]) for item in people["Somebody"]["rejected"]] in (
        [("Somebody/2.jpg", "subject_conflict")],
        [("Somebody/2.jpg", "identity_mismatch")],
    )
    assert enrolled(shared_server, name) == {"Eileen": 1, "Barack Obama": 2, "Joe Biden": 1}


def test_more_photos_of_a_person_than_one_enrolment_takes(shared_server: Server) -> None:
    name = gallery(shared_server, "lots")
    body = sent(shared_server, {f"A/{one}.jpg": faces(2 * one) for one in range(23)}, gallery=name).json()
    (person,) = body["people"]
    assert person["faces"] + len(person["rejected"]) == 23
    assert enrolled(shared_server, name) == {"A": person["faces"]}
    assert person["faces"] > 20


def test_a_damaged_file_is_named_and_the_others_are_enrolled(shared_server: Server) -> None:
    name = gallery(shared_server, "damaged")
    data = zipped({"A/1.jpg": photo("obama.jpg"), "A/2.jpg": b"x" * 5000, "B/1.jpg": photo("biden.jpg")})
    body = sent(shared_server, data.replace(b"x" * 5000, b"x" * 4999 + b"y"), gallery=name).json()
    assert [(item["file"], item["code"]) for item in body["people"][0]["rejected"]] == [("A/2.jpg", "invalid_archive")]
    assert enrolled(shared_server, name) == {"A": 1, "B": 1}


@pytest.mark.parametrize(
    ("tree", "code"),
    [
        (b"no archive", "invalid_archive"),
        ({"1.jpg": photo("obama.jpg")}, "invalid_archive"),
        ({"A/1.jpg": photo("obama.jpg"), "../B/1.jpg": photo("biden.jpg")}, "invalid_archive"),
        ({"A/1.jpg": photo("obama.jpg"), "/B/1.jpg": photo("biden.jpg")}, "invalid_archive"),
        ({"A/1.jpg": photo("obama.jpg"), "\x07/1.jpg": photo("biden.jpg")}, "invalid_archive"),
        ({"A/1.jpg": photo("obama.jpg"), f"{'B' * 300}/1.jpg": photo("biden.jpg")}, "invalid_archive"),
    ],
)
def test_a_hostile_archive_enrols_nobody(shared_server: Server, tree: dict[str, bytes] | bytes, code: str) -> None:
    before = shared_server.client.get("/galleries/default").json()["templates"]
    answer = sent(shared_server, tree)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert shared_server.client.get("/galleries/default").json()["templates"] == before


def test_an_archive_that_unpacks_to_too_much_enrols_nobody(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("A/1.jpg", photo("obama.jpg"))
        archive.writestr("A/2.jpg", bytes(3_000_000))
    with Server(tmp_path / "data", VULTUS_MAX_REQUEST_BYTES="2000000") as server:
        answer = sent(server, out.getvalue())
        assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")
        assert enrolled(server) == {}


def test_no_gallery_no_batch(shared_server: Server) -> None:
    assert sent(shared_server, TREE, gallery="nowhere").json()["code"] == "gallery_not_found"


def test_of_two_batches_at_once_one_is_told_to_wait_and_a_caller_who_leaves_ends_it(tmp_path: Path) -> None:
    tree = {f"person {one:02}/{each}.jpg": faces(2 * one + 100 * each) for one in range(40) for each in range(2)}
    with Server(tmp_path / "data") as server:
        form = {"data": {"allow_conflict": "true"}, "files": {"archive": ("a", zipped(tree))}}
        request = httpx.Request("POST", f"{server.url}/enroll/batch", **form)
        first = http.client.HTTPConnection("127.0.0.1", server.port)
        first.request("POST", request.url.path, request.read(), dict(request.headers))
        while not enrolled(server):
            time.sleep(0.01)
        second = sent(server, TREE)
        assert (second.status_code, second.json()["code"]) == (429, "overloaded")
        assert int(second.headers["retry-after"]) >= 1
        # Other requests go on beside it.
        server.identify("obama.jpg")
        first.close()
        while (answer := sent(server, TREE, allow_conflict="true")).status_code == 429:
            time.sleep(0.1)
        assert answer.json()["faces"] == 3
        held = enrolled(server)
        assert 0 < sum(subject.startswith("person") for subject in held) < 40
        assert sent(server, tree, allow_conflict="true").json()["faces"] == 80
        assert sum(enrolled(server).values()) == 83
