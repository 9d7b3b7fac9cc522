"""`POST /evaluate`, `vultus evaluate` and `vultus-train evaluate` on one folder; and ZIPs that mean harm."""

from __future__ import annotations

import base64
import io
import json
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.api.schemas import EvaluateAnswer
from service.cli import app
from tests.support import Server, photo, vultus

ROOT = Path(__file__).resolve().parent.parent.parent


def shrunk(name: str, side: int = 320, **change: Any) -> bytes:
    """A photo of tests/images, small and as a PNG, turned or mirrored."""
    image = Image.open(io.BytesIO(photo(name))).convert("RGB")
    image.thumbnail((side, side))
    if change.get("mirrored"):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "crop" in change:
        image = image.crop(change["crop"])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def nothing() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(out, "PNG")
    return out.getvalue()


def two_faces() -> bytes:
    left, right = (Image.open(io.BytesIO(shrunk(name))) for name in ("obama.jpg", "biden.jpg"))
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    out = io.BytesIO()
    both.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """Three people, of whom one cannot be enrolled, with every way to fail; three photos of two strangers."""
    astronaut = shrunk("astronaut.png")
    return {
        "Barack Obama/1.png": shrunk("obama.jpg"),
        "Barack Obama/2.png": shrunk("obama2.jpg"),
        "Barack Obama/3.png": nothing(),
        "Barack Obama/4.jpg": b"no photo at all",
        "Joe Biden/1.png": shrunk("biden.jpg"),
        "Joe Biden/2.png": shrunk("biden.jpg", mirrored=True),
        "Joe Biden/3.png": two_faces(),
        "Joe Biden/notes.txt": b"no photo by its name",
        "Nobody/1.png": nothing(),
        "Nobody/2.png": shrunk("obama2.jpg", mirrored=True),
        "strangers/Collins/1.png": astronaut,
        "strangers/Collins/2.png": shrunk("astronaut.png", mirrored=True),
        "strangers/empty.png": nothing(),
    }


GROUPS = "person-or-file,group\nBarack Obama,A\nJoe Biden,B\nstrangers/Collins,B\n"


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def send(server: Server, data: bytes, **fields: Any) -> httpx.Response:
    return server.client.post("/evaluate", data=fields, files={"archive": ("photos.zip", data)})


def traces(server: Server) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_size) for path in server.data_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def answer(shared_server: Server, photos: dict[str, bytes]) -> dict[str, Any]:
    before = traces(shared_server), shared_server.client.get("/galleries").json()
    found = send(shared_server, zipped(photos), fpr=["0.1", "0.01"], groups=GROUPS, picture="svg")
    assert found.status_code == 200, found.text
    # Nothing of it is in the data folder, and nobody is enrolled.
    assert (traces(shared_server), shared_server.client.get("/galleries").json()) == before
    body: dict[str, Any] = found.json()
    return body


def test_an_archive_is_measured(answer: dict[str, Any]) -> None:
    EvaluateAnswer.model_validate(answer)
    assert (answer["people"], answer["gallery_size"], answer["templates"]) == (3, 2, 2)
    assert answer["enrolled"] == {"photos": 3, "failed": 1, "codes": {"no_face": 1}}
    assert answer["probes"]["photos"] == 6
    assert answer["probes"]["codes"] == {"no_face": 1, "several_faces": 1, "unsupported_media_type": 1}
    assert answer["strangers"] == {"photos": 3, "failed": 1, "codes": {"no_face": 1}}
    assert answer["ignored"] == 1
    assert {(failure["file"], failure["use"]) for failure in answer["failures"]} == {
        ("Barack Obama/3.png", "probe"),
        ("Barack Obama/4.jpg", "probe"),
        ("Joe Biden/3.png", "probe"),
        ("Nobody/1.png", "enrolled"),
        ("strangers/empty.png", "stranger"),
    }
    loose, strict = answer["points"]
    assert (loose["fpr"], strict["fpr"]) == (0.1, 0.01)
    assert loose["threshold"] < strict["threshold"]
    # Two of six are found; the one of Nobody is taken for Obama, whose face it shows, or for nobody.
    assert (strict["matches"], strict["fnir"]["errors"], strict["fnir"]["trials"]) == (2, 4, 6)
    assert (strict["fpir"]["errors"], strict["fpir"]["trials"], strict["fpir"]["people"]) == (0, 2, 1)
    assert not strict["fpir"]["supported"]
    assert "1 person cannot show a rate of 0.01" in strict["fpir"]["note"]
    assert any("1 person could not be enrolled" in note for note in answer["notes"])
    assert [(group["group"], group["fnir"]["trials"]) for group in answer["groups"]] == [
        ("A", 3),
        ("A", 3),
        ("B", 2),
        ("B", 2),
    ]
    assert answer["det"][0]["fpir"] == 0
    assert base64.b64decode(answer["picture"].removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")


def test_json_says_the_same_as_a_form(shared_server: Server, photos: dict[str, bytes], answer: dict[str, Any]) -> None:
    encoded = base64.b64encode(zipped(photos, zipfile.ZIP_STORED)).decode()
    body = {"archive": encoded, "fpr": [0.1, 0.01], "groups": GROUPS}
    found = shared_server.client.post("/evaluate", json=body)
    assert found.json() == answer | {"picture": None}


def test_the_command_and_the_crops_count_the_same(
    photos: dict[str, bytes], answer: dict[str, Any], tmp_path: Path
) -> None:
    folder, crops = tmp_path / "photos", tmp_path / "crops"
    for name, data in photos.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (tmp_path / "groups.csv").write_text(GROUPS)
    fprs = ("--fpr", "0.1", "--fpr", "0.01")
    done = vultus(
        *("evaluate", str(folder), *fprs, "--groups", str(tmp_path / "groups.csv")),
        *("--out", str(tmp_path / "out"), "--json", str(tmp_path / "told.json")),
        data_dir=tmp_path / "data",
    )
    assert done.returncode == 0, done.stderr
    assert "3 people, 2 enrolled" in done.stdout
    assert "photos" in done.stderr
    assert not (tmp_path / "data").exists()
    assert (tmp_path / "out/det.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/det.svg").read_bytes() == base64.b64decode(answer["picture"].partition(",")[2])
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert told == json.loads((tmp_path / "told.json").read_text())
    assert told == {key: value for key, value in answer.items() if key != "picture"}
    layout = ("--layout", "folders", "--role", "validation", "--like-service", "--jobs", "2")
    for arguments in (
        ("prepare", "--data", str(folder), "--out", str(crops), *layout),
        ("evaluate", "--identification", "--crops", str(crops), *fprs, "--json", str(tmp_path / "counted.json")),
    ):
        made = subprocess.run(
            [sys.executable, "-m", "training.cli", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
    counted = json.loads((tmp_path / "counted.json").read_text())
    # Files that are no photos are not prepared, and groups are not asked for.
    left = {"ignored": 0, "groups": [], "notes": told["notes"][:1]}
    assert rounded(counted) == rounded(told | left)


def rounded(value: Any) -> Any:
    """Without what depends on how many faces are embedded in one run."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def entry(name: str, data: bytes = b"x", mode: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("placeholder" + "x" * len(name))
        info.filename = name
        info.external_attr = mode << 16
        archive.writestr(info, data)
        archive.writestr("strangers/1.png", b"x")
    return out.getvalue()


def bomb() -> bytes:
    """300 MiB of zeros in 300 KiB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("A/1.png", "w") as file:
        for _ in range(300):
            file.write(bytes(2**20))
    return out.getvalue()


def lying_bomb() -> bytes:
    """The same, said to be a thousand bytes."""
    data = bytearray(bomb())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 1000)
    return bytes(data) + b""


def encrypted() -> bytes:
    data = bytearray(zipped({"A/1.png": b"secret", "B/1.png": b"x"}))
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def damaged() -> bytes:
    data = bytearray(zipped({"A/1.png": b"q" * 5000, "B/1.png": b"x"}, zipfile.ZIP_STORED))
    data[2000] ^= 1
    return bytes(data)


def overstated() -> bytes:
    """An end record that promises 65,535 entries and a list of 4 GiB."""
    data = bytearray(zipped({"A/1.png": b"x", "B/1.png": b"x"}))
    end = data.rindex(b"PK\x05\x06")
    data[end + 8 : end + 16] = b"\xff" * 8
    return bytes(data)


GOOD = {"A/1.png": b"x", "strangers/1.png": b"x"}
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "invalid_archive"),
    "no ZIP": (lambda: photo("obama2.jpg"), "invalid_archive"),
    "truncated": (lambda: zipped(GOOD)[:-30], "invalid_archive"),
    "without its beginning": (lambda: zipped(GOOD)[60:], "invalid_archive"),
    "damaged": (damaged, "invalid_archive"),
    "overstated": (overstated, "invalid_archive"),
    "a bomb": (bomb, "image_too_large"),
    "a lying bomb": (lying_bomb, "invalid_archive"),
    "10,001 files": (lambda: zipped({f"A/{i}.png": b"" for i in range(10_001)}), "invalid_archive"),
    "encrypted": (encrypted, "invalid_archive"),
    "up and out": (lambda: entry("../../etc/cron.d/A.png"), "invalid_archive"),
    "up inside": (lambda: entry("A/../../B/1.png"), "invalid_archive"),
    "absolute": (lambda: entry("/etc/A.png"), "invalid_archive"),
    "backslashes": (lambda: entry("A\\1.png"), "invalid_archive"),
    "a NUL in a name": (lambda: entry("A/1\0.png"), "invalid_archive"),
    "a link": (lambda: entry("A/1.png", b"/etc/passwd", stat.S_IFLNK | 0o777), "invalid_archive"),
    "a device": (lambda: entry("A/1.png", b"", stat.S_IFCHR | 0o666), "invalid_archive"),
    "LZMA": (lambda: zipped(GOOD, zipfile.ZIP_LZMA), "invalid_archive"),
    "bzip2": (lambda: zipped(GOOD, zipfile.ZIP_BZIP2), "invalid_archive"),
    "a ZIP in a ZIP": (lambda: zipped({"inner.zip": zipped(GOOD)}), "invalid_archive"),
    "one folder around all": (lambda: zipped({f"photos/{name}": b"x" for name in GOOD}), "invalid_archive"),
    "no photos": (lambda: zipped({"A/1.txt": b"x", "B/1.csv": b"y"}), "invalid_archive"),
    "no people": (lambda: zipped({"strangers/1.png": b"x"}), "invalid_archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_told_what_it_is(shared_server: Server, name: str) -> None:
    data, code = HOSTILE[name]
    found = send(shared_server, data())
    assert (found.json()["code"], found.headers["content-type"]) == (code, "application/problem+json"), found.text
    assert found.status_code == {"invalid_archive": 422, "image_too_large": 413}[code]
    assert shared_server.client.get("/readyz").status_code == 200


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(shared_server: Server) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("A/1.png", "B/1.png", "A/1.png"):
            archive.writestr(name, b"x")
    assert send(shared_server, out.getvalue()).json()["code"] == "invalid_archive"


def test_photos_that_mean_harm_are_failures_of_their_own(shared_server: Server) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    wide = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(60_001))) + chunk(b"IEND", b"")
    found = send(
        shared_server,
        zipped({"A/1.png": wide, "A/2.png": b"", "A/3.png": zipped(GOOD), "B/1.png": bytes(11 * 2**20)}),
        fpr="0.1",
    )
    assert found.status_code == 200, found.text
    assert [(failure["file"], failure["code"]) for failure in found.json()["failures"]] == [
        ("A/1.png", "too_many_pixels"),
        ("A/2.png", "invalid_image"),
        ("A/3.png", "unsupported_media_type"),
        ("B/1.png", "image_too_large"),
    ]
    assert found.json()["points"][0]["fnir"]["rate"] == 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"fpr": "0"}, "invalid_request"),
        ({"fpr": ["0.1", "often"]}, "invalid_request"),
        ({"fpr": "1e-9"}, "fpr_unsupported"),
        ({"enrol": "0"}, "invalid_request"),
        ({"enrol": "21"}, "invalid_request"),
        ({"strangers": "a/b"}, "invalid_request"),
        ({"groups": "A,x,y"}, "invalid_request"),
        ({"picture": "gif"}, "invalid_request"),
        ({"gallery": "default"}, "invalid_request"),
        ({"enrol": ["1", "2"]}, "invalid_request"),
    ],
)
def test_a_bad_field_is_told(shared_server: Server, fields: dict[str, Any], code: str) -> None:
    assert send(shared_server, zipped(GOOD), **fields).json()["code"] == code


def test_others_are_answered_meanwhile_and_a_second_evaluation_waits(
    shared_server: Server, photos: dict[str, bytes]
) -> None:
    many = zipped(
        {f"{name.partition('/')[0]}/{i}-{Path(name).name}": data for name, data in photos.items() for i in range(8)}
    )
    answers: list[httpx.Response] = []

    def long() -> None:
        with httpx.Client(base_url=shared_server.url, timeout=300) as client:
            # One of the others below may have the place for a moment.
            while not answers or answers[-1].status_code == 429:
                answers.append(client.post("/evaluate", files={"archive": ("a", many)}))

    thread = threading.Thread(target=long)
    thread.start()
    refused = None
    while thread.is_alive() and refused is None:
        assert shared_server.client.post("/detect", files={"image": ("a", nothing())}).status_code == 200
        second = send(shared_server, b"")
        refused = second if second.status_code == 429 else None
    thread.join()
    assert refused is not None
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("overloaded", "30")
    assert answers[-1].status_code == 200
    assert send(shared_server, b"").json()["code"] == "invalid_archive"


def test_what_nobody_waits_for_is_given_up(shared_server: Server) -> None:
    face = shrunk("astronaut.png", 120)
    many = zipped({f"A/{i}.png": face for i in range(2000)} | {"B/1.png": b"x"}, zipfile.ZIP_STORED)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{shared_server.url}/evaluate", files={"archive": ("a", many)}, timeout=httpx.Timeout(60, read=1))
    while (again := send(shared_server, b"")).status_code == 429:
        time.sleep(0.1)
    assert again.json()["code"] == "invalid_archive"
    assert '"status": 499' in shared_server.log.read_text()


def test_only_admins_may_evaluate(tmp_path: Path, photos: dict[str, bytes]) -> None:
    keys = str(tmp_path / "keys.json")
    made = {
        role: vultus("keys", "add", role, "--role", role, data_dir=tmp_path, VULTUS_API_KEYS_FILE=keys).stdout.strip()
        for role in ("write", "admin")
    }
    with Server(tmp_path / "data", VULTUS_API_KEYS_FILE=keys) as server:
        codes = {
            role: server.client.post(
                "/evaluate", files={"archive": ("a", b"")}, headers={"authorization": f"Bearer {key}"}
            ).json()["code"]
            for role, key in made.items()
        }
    assert codes == {"write": "forbidden", "admin": "invalid_archive"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "does not exist"),
        ((".",), "folder"),
        (("GOOD", "--fpr", "2"), "between 0 and 1"),
        (("GOOD", "--fpr", "0.00001"), "calibration supports"),
        (("GOOD", "--groups", "GROUPS"), "line 1 of the groups"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    for name, data in GOOD.items():
        (tmp_path / "good" / name).parent.mkdir(parents=True)
        (tmp_path / "good" / name).write_bytes(data)
    (tmp_path / "groups.csv").write_text("A")
    (tmp_path / "empty").mkdir()
    places = {"GOOD": tmp_path / "good", "GROUPS": tmp_path / "groups.csv", ".": tmp_path / "empty"}
    done = CliRunner().invoke(app, ["evaluate", *(str(places.get(one, one)) for one in arguments)])
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
