"""Bad input: a documented 4xx or a right answer, never a 5xx, and the next request is answered."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.errors import error_classes
from tests.support import Server, photo

STATUSES = {error.code: error.status for error in error_classes()}
OBAMA = photo("obama2.jpg")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *extra: bytes, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def person(mode: str = "RGB") -> Image.Image:
    image = Image.open(io.BytesIO(OBAMA)).convert("RGB")
    image.thumbnail((400, 400))
    return image.convert(mode)


def sixteen_bit() -> bytes:
    grey = np.asarray(person("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey))


def animated() -> bytes:
    frames = [person(), Image.new("RGB", person().size, "red")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


BROKEN_PHOTOS: dict[str, tuple[bytes, set[str]]] = {
    "empty": (b"", {"invalid_image"}),
    "one byte": (b"\xff", {"invalid_image"}),
    "text": (b"this is no photo, whatever its name says\n" * 50, {"unsupported_media_type"}),
    "html": (b"<!doctype html><html><body>hello</body></html>", {"invalid_image", "unsupported_media_type"}),
    "svg": (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        {"invalid_image", "unsupported_media_type"},
    ),
    "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", {"invalid_image", "unsupported_media_type"}),
    "tiff": (encoded(person(), "TIFF"), {"unsupported_media_type"}),
    "zip": (b"PK\x03\x04" + bytes(200), {"invalid_image", "unsupported_media_type"}),
    "only a JPEG's head": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", {"invalid_image"}),
    "zeros": (bytes(10_000), {"invalid_image"}),
    "1×1": (encoded(Image.new("RGB", (1, 1))), {"no_face", "invalid_image"}),
    "1×5000": (encoded(Image.new("RGB", (1, 5000))), {"no_face", "invalid_image"}),
    "20,000×20,000 of one colour": (
        png(20_000, 20_000, zlib.compress(bytes(60_001), 9)),
        {"too_many_pixels"},
    ),
    "2³¹ pixels wide": (png(2**31 - 1, 1, zlib.compress(b"\0")), {"too_many_pixels", "invalid_image"}),
    "no pixels": (png(0, 0, zlib.compress(b"\0")), {"invalid_image"}),
    "a bomb for its size": (
        png(6000, 6000, zlib.compress(bytes(300_000_000), 9)),
        {"invalid_image", "no_face"},
    ),
    "a bomb in its text": (
        png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))),
        {"invalid_image", "no_face"},
    ),
    "a bomb in its profile": (
        png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))),
        {"invalid_image", "no_face"},
    ),
    "overwritten in the middle": (encoded(person())[:5000] + bytes(40) + encoded(person())[5040:], {"invalid_image"}),
    "too many bytes": (OBAMA + bytes(11 * 2**20), {"image_too_large"}),
}
for _part in range(20):
    BROKEN_PHOTOS[f"truncated to {_part}/20"] = (OBAMA[: len(OBAMA) * _part // 20], {"invalid_image"})

GOOD_PHOTOS: dict[str, bytes] = {
    "CMYK": encoded(person("CMYK"), "JPEG"),
    "greyscale": encoded(person("L"), "JPEG"),
    "16 bit": sixteen_bit(),
    "palette": encoded(person("P")),
    "alpha": encoded(person("RGBA")),
    "palette, alpha in GIF": encoded(person("P"), "GIF", transparency=0),
    "animated GIF": animated(),
    "WebP": encoded(person(), "WEBP"),
    "BMP": encoded(person(), "BMP"),
    "progressive": encoded(person(), "JPEG", progressive=True),
    "broken EXIF": encoded(person(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(30)),
    "bytes after its end": OBAMA + b"trailing" * 100,
}

B64 = base64.b64encode(OBAMA).decode()
LONG = "x" * 10_000
IMAGE = {"image": ("photo", OBAMA)}
IMAGES = {"images": ("photo", OBAMA)}
JSON = {"content-type": "application/json"}

BAD_REQUESTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "wrong field": ({"url": "/identify", "files": {"picture": ("photo", OBAMA)}}, {"invalid_request"}),
    "one field too many": ({"url": "/identify", "data": {"colour": "red"}, "files": IMAGE}, {"invalid_request"}),
    "no image": ({"url": "/identify", "json": {}}, {"invalid_request"}),
    "no fields": ({"url": "/identify", "files": {"x": b""}}, {"invalid_request"}),
    "no body": ({"url": "/identify"}, {"unsupported_media_type"}),
    "image as text": ({"url": "/identify", "data": {"image": "abc"}, "files": {"y": b""}}, {"invalid_request"}),
    "two images": ({"url": "/identify", "files": [("image", OBAMA), ("image", OBAMA)]}, {"invalid_request"}),
    "subject as file": ({"url": "/enroll", "files": [("subject", b"A"), ("images", OBAMA)]}, {"invalid_request"}),
    "21 images": ({"url": "/enroll", "data": {"subject": "A"}, "files": [("images", b"x")] * 21}, {"invalid_request"}),
    "21 images in JSON": ({"url": "/enroll", "json": {"subject": "A", "images": ["eA=="] * 21}}, {"invalid_request"}),
    "no images": ({"url": "/enroll", "json": {"subject": "A", "images": []}}, {"invalid_request"}),
    "101 photos": ({"url": "/search-unknown", "json": {"images": ["eA=="] * 101}}, {"invalid_request"}),
    "bad base64": ({"url": "/identify", "json": {"image": "@@@@"}}, {"invalid_request"}),
    "base64 without padding": ({"url": "/identify", "json": {"image": "abc"}}, {"invalid_request"}),
    "base64 that is no photo": ({"url": "/identify", "json": {"image": "AGhlbGxv"}}, {"invalid_image"}),
    "a number for an image": ({"url": "/identify", "json": {"image": 7}}, {"invalid_request"}),
    "bad JSON": ({"url": "/identify", "content": b'{"image": ', "headers": JSON}, {"invalid_request"}),
    "JSON that is no object": ({"url": "/identify", "json": [1, 2]}, {"invalid_request"}),
    "deep JSON": ({"url": "/identify", "content": b"[" * 100_000, "headers": JSON}, {"invalid_request"}),
    "not UTF-8": ({"url": "/identify", "content": b'{"image": "\xff"}', "headers": JSON}, {"invalid_request"}),
    "a form with no boundary": (
        {"url": "/identify", "content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"invalid_request"},
    ),
    "a form cut off": (
        {
            "url": "/identify",
            "content": b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        {"invalid_request", "invalid_image"},
    ),
    "another content type": (
        {"url": "/identify", "content": OBAMA, "headers": {"content-type": "image/jpeg"}},
        {"unsupported_media_type"},
    ),
    "urlencoded": ({"url": "/identify", "data": {"image": "x"}}, {"unsupported_media_type"}),
    "subject of 10,000 characters": (
        {"url": "/enroll", "data": {"subject": LONG}, "files": IMAGES},
        {"invalid_request"},
    ),
    "empty subject": ({"url": "/enroll", "json": {"subject": "", "images": [B64]}}, {"invalid_request"}),
    "blank subject": ({"url": "/enroll", "json": {"subject": "  ", "images": [B64]}}, {"invalid_request"}),
    "NUL in a name": ({"url": "/enroll", "json": {"subject": "a\0b", "images": [B64]}}, {"invalid_request"}),
    "lone surrogate": (
        {"url": "/enroll", "content": json.dumps({"subject": "\ud800", "images": [B64]}), "headers": JSON},
        {"invalid_request"},
    ),
    "a dot for a name": ({"url": "/enroll", "json": {"subject": "..", "images": [B64]}}, {"invalid_request"}),
    "path-like gallery": (
        {"url": "/enroll", "json": {"subject": "a", "images": [B64], "gallery": "../etc"}},
        {"invalid_request"},
    ),
    "no such gallery": ({"url": "/identify", "data": {"gallery": "nowhere"}, "files": IMAGE}, {"gallery_not_found"}),
    "metadata is a list": (
        {"url": "/enroll", "data": {"subject": "a", "metadata": "[1]"}, "files": IMAGES},
        {"invalid_request"},
    ),
    "metadata is no JSON": (
        {"url": "/enroll", "data": {"subject": "a", "metadata": "{"}, "files": IMAGES},
        {"invalid_request"},
    ),
    "NaN in metadata": (
        {"url": "/enroll", "data": {"subject": "a", "metadata": '{"a": NaN}'}, "files": IMAGES},
        {"invalid_request"},
    ),
    "surrogate in metadata": (
        {"url": "/enroll", "data": {"subject": "a", "metadata": '{"a": "\\ud800"}'}, "files": IMAGES},
        {"invalid_request"},
    ),
    "huge metadata": (
        {"url": "/enroll", "json": {"subject": "a", "images": [B64], "metadata": {"a": "x" * 70_000}}},
        {"invalid_request"},
    ),
    "both image_b and subject": (
        {"url": "/verify", "json": {"image_a": B64, "image_b": B64, "subject": "a"}},
        {"invalid_request"},
    ),
    "neither image_b nor subject": ({"url": "/verify", "json": {"image_a": B64}}, {"invalid_request"}),
    "no such subject": ({"url": "/verify", "json": {"image_a": B64, "subject": "ghost"}}, {"subject_not_found"}),
    "both image and face": ({"url": "/search-similar", "json": {"image": B64, "face_id": "x"}}, {"invalid_request"}),
    "no such face": ({"url": "/search-similar", "json": {"face_id": "x"}}, {"face_not_found"}),
    "similarity of 3": ({"url": "/search-similar", "json": {"image": B64, "min_similarity": 3}}, {"invalid_request"}),
    "no such path": ({"url": "/nowhere", "json": {}}, {"not_found"}),
    "wrong method": ({"method": "PUT", "url": "/identify", "json": {}}, {"method_not_allowed"}),
    "bad cursor": ({"method": "GET", "url": "/subjects?cursor=%00"}, {"invalid_request"}),
    "another bad cursor": ({"method": "GET", "url": "/subjects?cursor=c2FiYw=="}, {"invalid_request"}),
    "limit of 0": ({"method": "GET", "url": "/subjects?limit=0"}, {"invalid_request"}),
    "default gallery deleted": ({"method": "DELETE", "url": "/galleries/default"}, {"invalid_request"}),
    "NUL in the path": ({"method": "GET", "url": "/subjects/a%00b"}, {"invalid_request"}),
    "not UTF-8 in the path": ({"method": "GET", "url": "/subjects/%ff%fe"}, {"subject_not_found", "invalid_request"}),
    "dots in the path": ({"method": "GET", "url": "/subjects/..%2F..%2Fetc%2Fpasswd"}, {"subject_not_found"}),
}
for _name, _value in {
    "-1": "-1",
    "0": "0",
    "1": "1",
    "2": "2",
    "NaN": "nan",
    "infinity": "inf",
    "text": "often",
}.items():
    BAD_REQUESTS[f"fpr of {_name}"] = (
        {"url": "/identify", "data": {"fpr": _value}, "files": IMAGE},
        {"invalid_request"},
    )
    BAD_REQUESTS[f"fpr of {_name} in a query"] = (
        {"method": "GET", "url": f"/operating-points?fpr={_value}"},
        {"invalid_request"},
    )
BAD_REQUESTS["fpr of NaN in JSON"] = (
    {"url": "/identify", "content": b'{"image": "", "fpr": NaN}', "headers": JSON},
    {"invalid_request"},
)
for _value in ("0", "-1", "1000000000", "1.5", "many", "99999999999999999999"):
    BAD_REQUESTS[f"top_k of {_value}"] = (
        {"url": "/identify", "data": {"top_k": _value}, "files": IMAGE},
        {"invalid_request"},
    )


@pytest.fixture(autouse=True)
def still_answers(shared_server: Server) -> Iterator[None]:
    yield
    assert shared_server.client.get("/readyz").status_code == 200


def assert_problem(answer: httpx.Response, codes: set[str]) -> None:
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert set(body) >= {"type", "title", "status", "detail", "code", "request_id"}
    assert body["code"] in codes, body
    assert answer.status_code == body["status"] == STATUSES[body["code"]]
    assert answer.headers["x-request-id"] == body["request_id"]


@pytest.mark.parametrize("name", BROKEN_PHOTOS)
def test_a_broken_photo_is_told_what_it_is(shared_server: Server, name: str) -> None:
    data, codes = BROKEN_PHOTOS[name]
    assert_problem(shared_server.client.post("/identify", files={"image": ("a.jpg", data, "image/jpeg")}), codes)
    rejected = shared_server.client.post("/enroll", data={"subject": "x"}, files={"images": ("a.jpg", data)})
    assert rejected.status_code == 422
    assert rejected.json()["rejected"][0]["code"] == rejected.json()["code"]
    assert rejected.json()["code"] in codes | {"face_too_small"}
    assert shared_server.client.get("/subjects/x").status_code == 404


@pytest.mark.parametrize("name", GOOD_PHOTOS)
def test_an_unusual_photo_is_read(shared_server: Server, name: str) -> None:
    plain = shared_server.client.post("/embed", files={"image": ("a", encoded(person()))}).json()["faces"][0]
    answer = shared_server.client.post("/embed", files={"image": ("a.jpg", GOOD_PHOTOS[name])})
    (face,) = answer.json()["faces"]
    assert float(np.dot(face["embedding"], plain["embedding"])) > 0.93


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong(shared_server: Server, name: str) -> None:
    call, codes = BAD_REQUESTS[name]
    assert_problem(shared_server.client.request(**{"method": "POST"} | call), codes)


@pytest.mark.parametrize(
    "subject",
    [
        "Zoë",
        "名前",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "a/b",
        "../../etc/passwd",
        "a b",
        "a%2Fb",
        "?x=1",
        "#",
        "x" * 256,
    ],
)
def test_any_printable_name_is_a_name(shared_server: Server, subject: str) -> None:
    client = shared_server.client
    try:
        shared_server.enroll(subject, "obama.jpg")
        url = "/subjects/" + "".join(f"%{byte:02X}" for byte in subject.encode())
        assert client.get(url).json()["subject"] == subject
        assert client.delete(url).status_code == 204
        assert client.get(url).json()["code"] == "subject_not_found"
    finally:
        client.delete(url)


def test_a_top_k_beyond_the_gallery_is_the_gallery(shared_server: Server) -> None:
    shared_server.client.post("/galleries", json={"gallery": "topk"}).raise_for_status()
    shared_server.enroll("a", "obama.jpg", gallery="topk")
    assert len(shared_server.identify("obama2.jpg", gallery="topk", top_k=100)["faces"][0]["candidates"]) == 1
