"""Photos of every accepted form, and files that only look like one."""

from __future__ import annotations

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow

from service.domain import Image
from service.errors import ImageTooLarge, InvalidImage, TooManyPixels, UnsupportedMediaType, VultusError
from service.vision.image import decode_image

PHOTOS = Path(__file__).parents[1] / "images"
MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000


def decode(data: bytes) -> Image:
    return decode_image(data, MAX_BYTES, MAX_PIXELS)


def encode(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def difference(image: Image, other: NDArray[Any]) -> float:
    """Mean absolute difference in grey levels."""
    assert image.shape == other.shape
    return float(np.abs(image.astype(float) - other.astype(float)).mean())


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made by hand: what Pillow cannot write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    middle = b"".join(chunk(name, body) for name, body in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def picture() -> Pillow.Image:
    return Pillow.open(PHOTOS / "obama.jpg").convert("RGB").resize((120, 150))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("obama.jpg", (1137, 910, 3)),
        ("biden.jpg", (2204, 970, 3)),
        ("astronaut.png", (512, 512, 3)),
    ],
)
def test_photo_is_rgb(name: str, shape: tuple[int, ...]) -> None:
    image = decode((PHOTOS / name).read_bytes())
    assert image.shape == shape
    assert image.dtype == np.uint8
    assert image.flags.writeable
    with Pillow.open(PHOTOS / name) as expected:
        assert np.array_equal(image, np.asarray(expected))


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [
        ("PNG", "RGB", 0),
        ("BMP", "RGB", 0),
        ("JPEG", "RGB", 7),
        ("WEBP", "RGB", 7),
        ("WEBP", "RGBA", 7),
        ("PNG", "RGBA", 0),
        ("PNG", "P", 17),
        ("GIF", "P", 17),
        ("BMP", "P", 17),
        ("JPEG", "CMYK", 7),
    ],
)
def test_colour_modes_end_as_rgb(picture: Pillow.Image, kind: str, mode: str, tolerance: float) -> None:
    image = decode(encode(picture.convert(mode), kind))
    assert image.dtype == np.uint8
    assert difference(image, np.asarray(picture)) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_greyscale_has_three_equal_channels(picture: Pillow.Image, kind: str) -> None:
    grey = picture.convert("L")
    image = decode(encode(grey, kind))
    assert np.ptp(image, axis=2).max() <= (6 if kind == "WEBP" else 0)
    assert difference(image, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)) < 5


def test_black_and_white(picture: Pillow.Image) -> None:
    assert set(np.unique(decode(encode(picture.convert("1"), "PNG")))) == {0, 255}


def test_16_bit_grey_is_scaled_not_cut() -> None:
    levels = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], dtype=np.uint16)
    image = decode(encode(Pillow.fromarray(levels), "PNG"))
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert np.ptp(image, axis=2).max() == 0


def test_16_bit_rgb() -> None:
    values = np.array([[[0, 32768, 65535], [65535, 257, 0]]], dtype=">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in values)
    assert decode(png(2, 1, 16, 2, rows)).tolist() == [[[0, 128, 255], [255, 1, 0]]]
    keyed = png(2, 1, 16, 2, rows, (b"tRNS", struct.pack(">HHH", 0, 32768, 65535)))
    assert decode(keyed).shape == (1, 2, 3)


def test_transparent_pixels_lie_on_white() -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128], [200, 100, 0, 51]]], dtype=np.uint8)
    image = decode(encode(Pillow.fromarray(pixels, "RGBA"), "PNG"))
    assert image.tolist() == [[[255] * 3, [0] * 3, [127] * 3, [244, 224, 204]]]


def test_transparent_palette_entry_lies_on_white(picture: Pillow.Image) -> None:
    small = Pillow.new("P", (2, 1))
    small.putpalette([10, 20, 30, 40, 50, 60])
    small.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert decode(encode(small, kind, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_alpha_that_hides_everything_is_ignored(picture: Pillow.Image) -> None:
    hidden = picture.copy()
    hidden.putalpha(0)
    assert difference(decode(encode(hidden, "PNG")), np.asarray(picture)) == 0


def test_inverted_cmyk_of_adobe(picture: Pillow.Image) -> None:
    data = encode(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data[:400]
    image = decode(data)
    assert difference(image, np.asarray(picture)) < 7
    assert difference(255 - image, np.asarray(picture)) > 50


def test_first_frame_of_an_animation(picture: Pillow.Image) -> None:
    first, second = picture.convert("P"), Pillow.new("P", picture.size)
    animation = encode(first, "GIF", save_all=True, append_images=[second, second])
    assert np.array_equal(decode(animation), np.asarray(first.convert("RGB")))
    moving = encode(picture, "WEBP", save_all=True, append_images=[Pillow.new("RGB", picture.size)], lossless=True)
    assert np.array_equal(decode(moving), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation(picture: Pillow.Image, orientation: int, kind: str) -> None:
    # What a camera writes that was held so: the upright picture under the inverse operation.
    transposition = {
        2: Pillow.Transpose.FLIP_LEFT_RIGHT,
        3: Pillow.Transpose.ROTATE_180,
        4: Pillow.Transpose.FLIP_TOP_BOTTOM,
        5: Pillow.Transpose.TRANSPOSE,
        6: Pillow.Transpose.ROTATE_90,
        7: Pillow.Transpose.TRANSVERSE,
        8: Pillow.Transpose.ROTATE_270,
    }
    stored = picture.transpose(transposition[orientation]) if orientation > 1 else picture
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    image = decode(encode(stored, kind, exif=exif))
    assert difference(image, np.asarray(picture)) < 8
    assert image.flags.c_contiguous


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00",
        b"Exif\x00\x00junk that is no TIFF header",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01\x12\x00\x03\xff\xff\xff\xff" * 9,
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x02six\x00\x00\x00\x00\x00",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x63\x00\x00\x00\x00",
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
def test_broken_exif_does_not_reject_a_photo(picture: Pillow.Image, exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert difference(decode(encode(picture, kind, exif=exif)), np.asarray(picture)) < 8


def test_bytes_are_limited() -> None:
    data = (PHOTOS / "obama.jpg").read_bytes()
    assert decode_image(data, len(data), MAX_PIXELS).size
    with pytest.raises(ImageTooLarge, match="279,921"):
        decode_image(data, len(data) - 1, MAX_PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_pixels_are_limited(picture: Pillow.Image, kind: str) -> None:
    data = encode(picture, kind)
    assert decode_image(data, MAX_BYTES, 120 * 150).shape == (150, 120, 3)
    with pytest.raises(TooManyPixels, match="120×150"):
        decode_image(data, MAX_BYTES, 120 * 150 - 1)


def bombs() -> dict[str, bytes]:
    side = 16_000
    gif = bytearray(encode(Pillow.new("P", (1, 1)), "GIF"))
    frame = gif.index(b"\x2c\x00\x00\x00\x00")
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    jpeg = bytearray(encode(Pillow.new("RGB", (8, 8)), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 65_000, 65_000)
    bmp = bytearray(encode(Pillow.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    webp = bytearray(encode(Pillow.new("RGB", (8, 8)), "WEBP", lossless=True))
    webp[21:25] = ((side - 1) | (side - 1) << 14).to_bytes(4, "little")
    canvas = bytearray(encode(Pillow.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP"))
    canvas[24:30] = (2**24 - 1).to_bytes(3, "little") * 2
    lines = zlib.compressobj()
    pixels = b"".join(lines.compress(bytes(20_001)) for _ in range(2_000)) + lines.flush()
    header = png(20_000, 20_000, 8, 0, b"")
    return {
        "png": header,
        "png with pixels": header.replace(zlib.compress(b""), pixels),
        "gif frame beyond its canvas": bytes(gif),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "webp": bytes(webp),
        "webp canvas": bytes(canvas),
    }


@pytest.mark.parametrize("name", list(bombs()))
def test_decompression_bomb_costs_nothing(name: str) -> None:
    data = bombs()[name]
    start = time.perf_counter()
    with pytest.raises(TooManyPixels):
        decode(data)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "iCCP"])
def test_bomb_in_a_png_chunk(chunk: str) -> None:
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    body = {
        "zTXt": b"key\x00\x00" + bomb,
        "iTXt": b"key\x00\x01\x00\x00\x00" + bomb,
        "iCCP": b"key\x00\x00" + bomb,
    }[chunk]
    start = time.perf_counter()
    try:
        image = decode(png(1, 1, 8, 0, b"\x00\x80", (chunk.encode(), body)))
    except InvalidImage:
        pass
    else:
        assert image.tolist() == [[[128, 128, 128]]]
    assert time.perf_counter() - start < 2


OTHER_FORMATS = {
    "tiff": b"II*\x00" + bytes(100),
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "eps": b"\xc5\xd0\xd3\xc6" + bytes(30),
    "ico": b"\x00\x00\x01\x00\x01\x00" + bytes(30),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "svg with bom": b'\xef\xbb\xbf\n  <?xml version="1.0"?><svg/>',
    "html": b"<!DOCTYPE html><title>x</title>",
    "heic": b"\x00\x00\x00\x18ftypheic" + bytes(20),
    "avif": b"\x00\x00\x00\x18ftypavif" + bytes(20),
    "wave": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20),
    "psd": b"8BPS" + bytes(30),
    "zip": b"PK\x03\x04" + bytes(30),
    "jpeg xl": b"\xff\x0a" + bytes(30),
    "text": b"This is not a photo at all.\n",
    "text in utf-8": ("Günter Grüße 👤 " * 900).encode(),
    "json": b'{"image": "x"}',
}


@pytest.mark.parametrize("name", list(OTHER_FORMATS))
def test_other_formats_are_told_apart(name: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="JPEG, PNG, WebP, BMP and GIF"):
        decode(OTHER_FORMATS[name])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        bytes(1000),
        bytes(range(256)) * 10,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"BM" + bytes(60),
        b"RIFF\x00\x00\x00\x00WEBP",
        b"RIFF\x00\x00\x00\x00WEBPVP8X",
        b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(40),
        png(0, 0, 8, 0, b""),
        png(10, 10, 8, 0, b""),
        png(10, 10, 8, 0, bytes(50)),
        png(10, 10, 7, 9, bytes(500)),
    ],
)
def test_junk_is_invalid(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        decode(data)


@pytest.mark.parametrize("name", ["obama.jpg", "obama2.jpg", "astronaut.png"])
def test_truncated_photo_is_invalid(name: str) -> None:
    data = (PHOTOS / name).read_bytes()
    for part in np.linspace(0.02, 0.999, 20):
        with pytest.raises(InvalidImage):
            decode(data[: int(len(data) * part)])


def variants(picture: Pillow.Image) -> dict[str, bytes]:
    return {
        "jpeg": encode(picture, "JPEG"),
        "progressive": encode(picture, "JPEG", progressive=True),
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "png": encode(picture, "PNG"),
        "palette": encode(picture.convert("P"), "PNG", transparency=3),
        "16 bit": encode(Pillow.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"),
        "webp": encode(picture, "WEBP"),
        "lossless": encode(picture, "WEBP", lossless=True),
        "bmp": encode(picture, "BMP"),
        "gif": encode(picture.convert("P"), "GIF"),
    }


def test_a_file_cut_anywhere_is_whole_or_refused(picture: Pillow.Image) -> None:
    for name, data in variants(picture).items():
        whole = decode(data)
        for length in [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 40, len(data))]:
            try:
                image = decode(data[:length])
            except (InvalidImage, UnsupportedMediaType):
                continue
            assert np.array_equal(image, whole), f"{name}: half a photo from {length} of {len(data)} bytes"


def test_flipped_bits_never_escape(picture: Pillow.Image) -> None:
    random = np.random.default_rng(7)
    for data in variants(picture).values():
        for _ in range(150):
            broken = np.frombuffer(data, dtype=np.uint8).copy()
            reach = 300 if random.random() < 0.6 else len(broken)
            for _ in range(random.integers(1, 6)):
                broken[random.integers(0, min(reach, len(broken)))] ^= 1 << random.integers(0, 8)
            try:
                image = decode(broken.tobytes())
            except VultusError:
                continue
            assert image.dtype == np.uint8
            assert image.ndim == 3


def test_extreme_shapes() -> None:
    assert decode(encode(Pillow.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]
    assert decode(encode(Pillow.new("L", (1_000_000, 2), 9), "PNG")).shape == (2, 1_000_000, 3)


def test_threads_share_it() -> None:
    files = [path.read_bytes() for path in sorted(PHOTOS.glob("*.*g"))]
    alone = [decode(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, files * 4))
    for index, image in enumerate(together):
        assert np.array_equal(image, alone[index % len(files)])


def test_pillow_is_left_as_it_was() -> None:
    before = Pillow.MAX_IMAGE_PIXELS
    decode((PHOTOS / "obama.jpg").read_bytes())
    assert before == Pillow.MAX_IMAGE_PIXELS
