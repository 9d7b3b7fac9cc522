"""The main job on real photos: enrol, identify, verify, similar, unknown."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from tests.support import Server, photo

OBAMAS = ["obama.jpg", "obama2.jpg", "obama3.jpg"]
ALL = [*OBAMAS, "biden.jpg", "astronaut.png"]


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("main") / "data") as server:
        server.enroll("Barack Obama", "obama.jpg")
        server.enroll("Joe Biden", "biden.jpg")
        yield server


def post(server: Server, path: str, files: list[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    answer = server.client.post(path, data=fields, files=[(name, ("photo", photo(file))) for name, file in files])
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("name", ["obama2.jpg", "obama3.jpg"])
def test_an_enrolled_person_is_recognised_in_other_photos(enrolled: Server, name: str) -> None:
    body = enrolled.identify(name)
    (face,) = body["faces"]
    assert (face["decision"], face["subject"]) == ("match", "Barack Obama")
    assert body["gallery_size"] == 2 and body["fpr"] == 0.01 and body["extrapolated"] is False
    best, second = face["candidates"]
    assert best["subject"] == "Barack Obama" and second["subject"] == "Joe Biden"
    assert best["similarity"] >= body["threshold"] > second["similarity"]
    assert best["probability"] > 0.5 > second["probability"]
    assert face["similarity"] == best["similarity"] and face["probability"] == best["probability"]
    assert face["margin"] == pytest.approx(best["similarity"] - second["similarity"])
    # However few candidates are asked for, the margin is the same.
    (alone,) = enrolled.identify(name, top_k=1)["faces"]
    assert alone["margin"] == face["margin"] and len(alone["candidates"]) == 1


def test_a_stranger_is_unknown(enrolled: Server) -> None:
    (face,) = enrolled.identify("astronaut.png")["faces"]
    assert (face["decision"], face["subject"]) == ("unknown", None)
    assert len(face["candidates"]) == 2
    assert face["similarity"] == face["candidates"][0]["similarity"] and face["margin"] > 0


def test_an_empty_gallery_knows_nobody(enrolled: Server) -> None:
    enrolled.client.post("/galleries", json={"gallery": "empty"}).raise_for_status()
    body = enrolled.identify("obama.jpg", gallery="empty")
    (face,) = body["faces"]
    assert (face["decision"], face["candidates"], body["gallery_size"]) == ("unknown", [], 0)
    assert face["similarity"] is face["margin"] is face["probability"] is None


def test_verification(enrolled: Server) -> None:
    same = post(enrolled, "/verify", [("image_a", "obama.jpg"), ("image_b", "obama2.jpg")])
    other = post(enrolled, "/verify", [("image_a", "obama.jpg"), ("image_b", "biden.jpg")])
    assert same["match"] is True and other["match"] is False
    assert same["fpr"] == 0.001 and same["similarity"] >= same["threshold"] > other["similarity"]
    subject = post(enrolled, "/verify", [("image_a", "obama3.jpg")], subject="Barack Obama")
    assert subject["match"] is True and subject["face_id"]
    assert post(enrolled, "/verify", [("image_a", "astronaut.png")], subject="Joe Biden")["match"] is False


def test_similar_faces_by_photo_and_by_face(enrolled: Server) -> None:
    (face,) = post(enrolled, "/search-similar", [("image", "obama2.jpg")])["faces"]
    assert [item["subject"] for item in face["similar"]] == ["Barack Obama", "Joe Biden"]
    answer = enrolled.client.post("/search-similar", json={"face_id": face["similar"][0]["face_id"]})
    (stored,) = answer.json()["faces"]
    assert [item["subject"] for item in stored["similar"]] == ["Joe Biden"]
    nothing = post(enrolled, "/search-similar", [("image", "obama2.jpg")], min_similarity="0.999")
    assert nothing["faces"][0]["similar"] == []


def test_strangers_in_a_photo_set_are_grouped_by_person(server: Server) -> None:
    server.enroll("Joe Biden", "biden.jpg")
    broken = ("images", ("photo", b"\0not a photo"))
    files = [("images", ("photo", photo(name))) for name in ALL]
    answer = server.client.post("/search-unknown", files=[*files, broken])
    body = answer.json()
    assert answer.status_code == 200, body
    assert (body["photos"], body["faces"]) == (6, 5)
    assert [(item["index"], item["code"]) for item in body["rejected"]] == [(5, "invalid_image")]
    (known,) = body["known"]
    assert known["subject"] == "Joe Biden" and known["faces"][0]["image_index"] == 3
    groups = {tuple(face["image_index"] for face in group["faces"]) for group in body["unknown"]}
    assert groups == {(0, 1, 2), (4,)}


def collage() -> Image.Image:
    """Four photos, two by two, each shrunk to fit 600×600."""
    sheet = Image.new("RGB", (1200, 1200), "grey")
    for number, name in enumerate(["obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"]):
        tile = ImageOps.contain(Image.open(io.BytesIO(photo(name))).convert("RGB"), (600, 600))
        sheet.paste(tile, (600 * (number % 2), 600 * (number // 2)))
    return sheet


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(out, "JPEG", quality=92, exif=exif)
    return out.getvalue()


TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# The EXIF orientation that undoes a rotation of the pixels by so many degrees anticlockwise.
ORIENTATIONS = {90: 6, 180: 3, 270: 8}


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("exif", [False, True])
def test_every_face_of_a_collage_is_answered_on_its_own_however_it_lies(
    enrolled: Server, turn: int, exif: bool
) -> None:
    sheet = collage().transpose(TURNS[turn]) if turn else collage()
    body = enrolled.identify(jpeg(sheet, ORIENTATIONS.get(turn) if exif else None))
    answers = sorted(str(face["subject"]) for face in body["faces"])
    assert answers == ["Barack Obama", "Barack Obama", "Joe Biden", "None"]
    # Boxes lie in the photo as it is seen after EXIF correction: the astronaut in its lower right quarter.
    upright = {0: (1, 1), 90: (1, 0), 180: (0, 0), 270: (0, 1)}
    column, row = (1, 1) if exif else upright[turn]
    (stranger,) = [face for face in body["faces"] if face["subject"] is None]
    box = stranger["box"]
    assert (int(box["x"] + box["width"] / 2) // 600, int(box["y"] + box["height"] / 2) // 600) == (column, row)


@pytest.mark.parametrize("turn", [90, 180, 270])
@pytest.mark.parametrize("name", ["obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"])
@pytest.mark.parametrize("exif", [False, True])
def test_a_rotated_photo_gets_the_same_answer(enrolled: Server, name: str, turn: int, exif: bool) -> None:
    straight = enrolled.identify(name)["faces"]
    turned = jpeg(
        Image.open(io.BytesIO(photo(name))).convert("RGB").transpose(TURNS[turn]), ORIENTATIONS[turn] * exif or None
    )
    faces = enrolled.identify(turned)["faces"]
    assert [(face["decision"], face["subject"]) for face in faces] == [
        (face["decision"], face["subject"]) for face in straight
    ]


def test_json_and_multipart_are_answered_alike(enrolled: Server) -> None:
    encoded = base64.b64encode(photo("obama2.jpg")).decode()
    by_form = enrolled.identify("obama2.jpg")
    by_json = enrolled.client.post("/identify", json={"image": encoded}).json()
    data_url = enrolled.client.post("/identify", json={"image": f"data:image/jpeg;base64,{encoded}"}).json()
    assert by_form == by_json == data_url


def test_detect_and_embed(enrolled: Server) -> None:
    (face,) = post(enrolled, "/detect", [("image", "obama.jpg")])["faces"]
    assert set(face) == {"box", "landmarks", "detection_score", "quality"}
    body = post(enrolled, "/embed", [("image", "obama.jpg")])
    embedding = body["faces"][0]["embedding"]
    assert sum(value * value for value in embedding) == pytest.approx(1, abs=1e-4)
    blank = io.BytesIO()
    Image.new("RGB", (300, 300), "white").save(blank, "PNG")
    nobody = {"image": ("photo", blank.getvalue())}
    assert enrolled.client.post("/detect", files=nobody).json() == {"faces": []}
    for path in ("/embed", "/identify", "/search-similar"):
        assert enrolled.client.post(path, files=nobody).json()["code"] == "no_face"


def test_enrolling_the_same_bytes_twice_is_one_face(server: Server) -> None:
    first = server.enroll("A", "obama.jpg")
    second = server.enroll("A", "obama.jpg", "obama2.jpg")
    assert first["faces"][0]["face_id"] == second["faces"][0]["face_id"]
    assert len(server.client.get("/subjects/A").json()["faces"]) == 2
    assert server.identify("obama3.jpg")["templates"] == 2


def test_photos_that_cannot_be_used_are_rejected_with_a_reason(server: Server) -> None:
    two = jpeg(collage())
    body = server.enroll("A", "obama.jpg", b"\0junk", two)
    assert len(body["faces"]) == 1
    assert [(item["index"], item["code"]) for item in body["rejected"]] == [(1, "invalid_image"), (2, "several_faces")]
    nothing = server.client.post(
        "/enroll", data={"subject": "B"}, files=[("images", ("photo", data)) for data in (b"\0junk", two)]
    )
    assert nothing.status_code == 422 and nothing.json()["code"] == "invalid_image"
    assert len(nothing.json()["rejected"]) == 2
    assert server.client.get("/subjects/B").status_code == 404


def test_answers_survive_a_restart(tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    with server:
        server.enroll("A", "obama.jpg", metadata='{"badge": 7, "näme": "\\u00e9"}')
        before = server.identify("obama2.jpg")
    with server.__class__(tmp_path / "data") as again:
        assert again.identify("obama2.jpg") == before
        assert again.client.get("/subjects/A").json()["metadata"] == {"badge": 7, "näme": "é"}
