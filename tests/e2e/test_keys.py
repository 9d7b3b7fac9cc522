"""Keys, roles and tenants: every route, from the wrong side too."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from service.api.routes import router
from tests.support import Server, photo, vultus

OPEN = {("GET", "/livez"), ("GET", "/readyz")}


def make_key(keys_file: Path, name: str, role: str, *galleries: str) -> str:
    options = [option for gallery in galleries for option in ("--gallery", gallery)]
    done = vultus(
        "keys", "add", name, "--role", role, *options, data_dir=keys_file.parent, VULTUS_API_KEYS_FILE=str(keys_file)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tenants(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, dict[str, httpx.Client], dict[str, str]]]:
    """A service with tenants a and b, a client for each key, and each tenant's enrolled face."""
    folder = tmp_path_factory.mktemp("keys")
    keys_file = folder / "keys.json"
    keys = {
        "root": make_key(keys_file, "root", "admin"),
        "a-read": make_key(keys_file, "a-read", "read", "a"),
        "a-write": make_key(keys_file, "a-write", "write", "a"),
        "a-admin": make_key(keys_file, "a-admin", "admin", "a"),
        "b-write": make_key(keys_file, "b-write", "write", "b"),
    }
    with Server(folder / "data", VULTUS_API_KEYS_FILE=str(keys_file)) as server:
        clients = {
            name: httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {key}"})
            for name, key in keys.items()
        }
        clients["nobody"] = httpx.Client(base_url=server.url, timeout=60)
        faces = {}
        for gallery, name in (("a", "obama.jpg"), ("b", "biden.jpg")):
            clients["root"].post("/galleries", json={"gallery": gallery}).raise_for_status()
            answer = clients["root"].post(
                "/enroll",
                data={"subject": "P", "gallery": gallery, "metadata": '{"secret": "marmalade"}'},
                files={"images": ("photo", photo(name))},
            )
            faces[gallery] = answer.json()["faces"][0]["face_id"]
        yield server, clients, faces
        for client in clients.values():
            client.close()


def routes() -> list[tuple[str, str]]:
    return sorted(
        (method, route.path.replace(":path", ""))
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    )


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_asks_for_a_key(tenants: Any, method: str, path: str) -> None:
    _, clients, faces = tenants
    url = path.format(gallery="a", subject="P", face_id=faces["a"])
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}):
        answer = clients["nobody"].request(method, url, headers=headers)
        if (method, path) in OPEN:
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


def calls(gallery: str, face_id: str) -> dict[str, dict[str, Any]]:
    """Every call that reaches into a gallery, with the role that it needs."""
    image = {"image": ("photo", photo("obama2.jpg"))}
    images = {"images": ("photo", photo("obama2.jpg"))}
    pair = {"image_a": ("photo", photo("obama2.jpg"))}
    return {
        "identify": {
            "role": "read",
            "method": "POST",
            "url": "/identify",
            "data": {"gallery": gallery},
            "files": image,
        },
        "verify": {
            "role": "read",
            "method": "POST",
            "url": "/verify",
            "data": {"gallery": gallery, "subject": "P"},
            "files": pair,
        },
        "similar": {
            "role": "read",
            "method": "POST",
            "url": "/search-similar",
            "data": {"gallery": gallery},
            "files": image,
        },
        "similar by face": {"role": "read", "method": "POST", "url": "/search-similar", "json": {"face_id": face_id}},
        "unknown": {
            "role": "read",
            "method": "POST",
            "url": "/search-unknown",
            "data": {"gallery": gallery},
            "files": images,
        },
        "gallery": {"role": "read", "method": "GET", "url": f"/galleries/{gallery}"},
        "subjects": {"role": "read", "method": "GET", "url": f"/subjects?gallery={gallery}"},
        "subject": {"role": "read", "method": "GET", "url": f"/subjects/P?gallery={gallery}"},
        "face": {"role": "read", "method": "GET", "url": f"/faces/{face_id}"},
        "operating points": {"role": "read", "method": "GET", "url": f"/operating-points?gallery={gallery}"},
        "enroll": {
            "role": "write",
            "method": "POST",
            "url": "/enroll",
            "data": {"gallery": gallery, "subject": "new", "allow_conflict": "true"},
            "files": images,
        },
        "patch": {
            "role": "write",
            "method": "PATCH",
            "url": f"/subjects/P?gallery={gallery}",
            "json": {"metadata": {"secret": "marmalade"}},
        },
        "delete subject": {"role": "write", "method": "DELETE", "url": f"/subjects/new?gallery={gallery}"},
        "delete face": {"role": "write", "method": "DELETE", "url": f"/faces/{face_id}"},
        "make gallery": {"role": "admin", "method": "POST", "url": "/galleries", "json": {"gallery": gallery}},
        "patch gallery": {
            "role": "admin",
            "method": "PATCH",
            "url": f"/galleries/{gallery}",
            "json": {"own_calibration": "stricter"},
        },
        "delete gallery": {"role": "admin", "method": "DELETE", "url": f"/galleries/{gallery}"},
    }


def send(client: httpx.Client, call: dict[str, Any]) -> httpx.Response:
    return client.request(**{name: value for name, value in call.items() if name != "role"})


@pytest.mark.parametrize("name", sorted(calls("b", "")))
@pytest.mark.parametrize("key", ["a-read", "a-write", "a-admin"])
def test_no_key_reaches_into_another_tenants_gallery(tenants: Any, key: str, name: str) -> None:
    _, clients, faces = tenants
    answer = send(clients[key], calls("b", faces["b"])[name])
    body = answer.json()
    if name in ("face", "similar by face") or (name == "delete face" and key != "a-read"):
        missing = send(clients[key], calls("b", "00000000-0000-0000-0000-000000000000")[name])
        assert (
            (answer.status_code, body["code"])
            == (404, "face_not_found")
            == (missing.status_code, missing.json()["code"])
        )
    else:
        assert (answer.status_code, body["code"]) == (403, "forbidden")
        # Nor does the answer tell whether there is such a gallery.
        nowhere = send(clients[key], calls("nowhere", faces["b"])[name])
        assert nowhere.status_code == 403
    assert "marmalade" not in answer.text


def test_searching_ones_own_face_in_anothers_gallery_is_forbidden(tenants: Any) -> None:
    _, clients, faces = tenants
    answer = clients["a-read"].post("/search-similar", json={"face_id": faces["a"], "gallery": "b"})
    assert answer.json()["code"] == "forbidden"


def test_lists_show_what_the_key_opens(tenants: Any) -> None:
    _, clients, _ = tenants
    listed = {
        key: [gallery["gallery"] for gallery in clients[key].get("/galleries").json()["galleries"]]
        for key in ("a-read", "b-write", "root")
    }
    assert listed == {"a-read": ["a"], "b-write": ["b"], "root": ["a", "b", "default"]}


@pytest.mark.parametrize("name", sorted(name for name, call in calls("a", "").items() if call["role"] != "read"))
def test_a_key_does_no_more_than_its_role(tenants: Any, name: str) -> None:
    _, clients, faces = tenants
    call = calls("a", faces["a"])[name]
    too_weak = ["a-read"] if call["role"] == "write" else ["a-read", "a-write"]
    for key in too_weak:
        assert send(clients[key], call).json()["code"] == "forbidden"


@pytest.mark.parametrize(
    "name", [n for n in calls("a", "") if n not in ("delete face", "make gallery", "delete gallery")]
)
def test_a_key_does_what_its_role_says(tenants: Any, name: str) -> None:
    _, clients, faces = tenants
    call = calls("a", faces["a"])[name]
    if name == "delete subject":
        send(clients["a-write"], calls("a", faces["a"])["enroll"])
    key = f"a-{call['role']}"
    assert send(clients[key], call).status_code in (200, 201, 204)


def test_metrics_tell_of_the_galleries_that_the_key_opens(tenants: Any) -> None:
    _, clients, faces = tenants
    for gallery in ("a", "b"):
        assert send(clients["root"], calls(gallery, faces[gallery])["identify"]).status_code == 200
    seen = {name: clients[name].get("/metrics").text for name in ("root", "a-read", "b-write")}
    for name, galleries in {"root": {"a", "b"}, "a-read": {"a"}, "b-write": {"b"}}.items():
        assert set(re.findall(r'gallery="([^"]+)"', seen[name])) == galleries
        assert 'vultus_http_requests_total{method="POST",route="/identify",status="200"}' in seen[name]


def test_a_removed_key_is_refused_from_the_next_request_on(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    make_key(keys_file, "stays", "read")
    key = make_key(keys_file, "goes", "read")
    with Server(tmp_path / "data", key=key, VULTUS_API_KEYS_FILE=str(keys_file)) as server:
        assert server.client.get("/galleries").status_code == 200
        done = vultus("keys", "remove", "goes", data_dir=tmp_path, VULTUS_API_KEYS_FILE=str(keys_file))
        assert done.returncode == 0
        assert server.client.get("/galleries").status_code == 401
        keys_file.write_text("{ half a file")
        assert server.client.get("/galleries").json()["code"] == "not_ready"


def test_the_keys_file_holds_no_key_and_is_its_owners(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    key = make_key(keys_file, "one", "write", "a", "b")
    assert key not in keys_file.read_text()
    assert keys_file.stat().st_mode & 0o777 == 0o600
    (entry,) = json.loads(keys_file.read_text())["keys"]
    assert (entry["name"], entry["role"], entry["galleries"]) == ("one", "write", ["a", "b"])
    again = vultus("keys", "add", "one", data_dir=tmp_path, VULTUS_API_KEYS_FILE=str(keys_file))
    assert again.returncode == 2 and "already" in again.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_address_without_keys_refuses_to_start(tmp_path: Path, host: str) -> None:
    done = vultus("serve", data_dir=tmp_path / "data", VULTUS_HOST=host, VULTUS_PORT="0")
    assert done.returncode == 2
    assert "there are no API keys" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_pages_of_other_origins_and_rebound_names_are_refused(shared_server: Server) -> None:
    client, port = shared_server.client, shared_server.port
    for headers in (
        {"host": "evil.example"},
        {"host": f"evil.example:{port}"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ):
        answer = client.get("/galleries", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), headers
    for headers in ({"host": f"localhost:{port}"}, {"origin": shared_server.url}):
        answer = client.get("/galleries", headers=headers)
        assert answer.status_code == 200, headers
        assert "access-control-allow-origin" not in answer.headers


def test_origins_that_are_set_may_call(tmp_path: Path) -> None:
    with Server(tmp_path / "data", VULTUS_CORS_ORIGINS="https://app.example") as server:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        assert (
            server.client.options("/identify", headers=asked).headers["access-control-allow-origin"] == asked["origin"]
        )
        assert server.client.get("/galleries", headers={"origin": "https://app.example"}).status_code == 200
        assert server.client.get("/galleries", headers={"origin": "https://other.example"}).status_code == 403


def test_the_log_holds_nothing_personal(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    key = make_key(keys_file, "k", "admin")
    with Server(tmp_path / "data", key=key, VULTUS_API_KEYS_FILE=str(keys_file), VULTUS_LOG_LEVEL="debug") as server:
        server.enroll("Zebedee", "obama.jpg", metadata='{"secret": "marmalade"}')
        server.client.get("/subjects/Zebedee", headers={"x-request-id": "request-77"})
        server.client.patch("/subjects/Zebedee", json={"metadata": {"other": "jam"}, "wrong": "treacle"})
        embedding = server.client.post("/embed", files={"image": ("photo", photo("obama.jpg"))}).json()
        server.client.get("/subjects/Zebedee", headers={"authorization": "Bearer guessed-key"})
        log = server.log.read_text()
    for secret in (
        key,
        "Zebedee",
        "marmalade",
        "jam",
        "treacle",
        "guessed-key",
        str(embedding["faces"][0]["embedding"][0]),
    ):
        assert secret not in log
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "request-77"]
    assert (line["route"], line["status"], line["method"]) == ("/subjects/{subject:path}", 200, "GET")


def test_a_defect_is_logged_without_what_it_was_about(tmp_path: Path) -> None:
    with Server(tmp_path / "data") as server:
        with sqlite3.connect(server.data_dir / "vultus.db") as database:
            database.execute("DROP TABLE subjects")
        database.close()
        answer = server.client.post(
            "/enroll",
            data={"subject": "Zebedee", "metadata": '{"secret": "marmalade"}'},
            files={"images": ("photo", photo("obama.jpg"))},
        )
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        log = server.log.read_text()
    assert answer.json()["request_id"] in log and "no such table" in log
    for secret in ("Zebedee", "marmalade", "JFIF"):
        assert secret not in log
