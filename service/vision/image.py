"""From bytes to an image. The bytes are a stranger's: nothing about them is believed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL import Image as Pillow

from service.domain import Image
from service.errors import ImageTooLarge, InvalidImage, TooManyPixels, UnsupportedMediaType

BACKGROUND = 255
"""Grey level behind transparent pixels: white. Cut-out portraits are made to be seen on white paper, and on
black a dark-haired head would lose its outline."""

_BAND_PIXELS = 30_000
"""Pixels that are copied at a time: 120 kB. The C library asks the system for larger pieces anew each time."""

_Opener: TypeAlias = Callable[[io.BytesIO], ImageFile.ImageFile]

# Pillow.open would warn or fail by a limit that is global to the process, and would try other formats.
_OPENERS: dict[str, _Opener] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}

_ACCEPTED: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x02\x00", "CUR"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\x7fELF", "ELF"),
    (b"ID3", "MP3"),
    (b"OggS", "Ogg"),
    (b"fLaC", "FLAC"),
    (b"\x1a\x45\xdf\xa3", "Matroska"),
    (b"RIFF", "RIFF"),
)

_MARKUP = (b"<svg", b"<?xml", b"<!doctype", b"<html", b"<head", b"<body", b"<!--")

_SNIFFED = 4096
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\v\x1b")

_ORIENTATION_TAG = 0x0112
_ORIENT: dict[int, Callable[[Image], Image]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image[::-1].transpose(1, 0, 2),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image[:, ::-1].transpose(1, 0, 2),
}
"""How each value of EXIF's Orientation other than 1 is set upright (Exif 2.32, table 6)."""


def decode_image(data: bytes, max_bytes: int, max_pixels: int) -> Image:
    """Decode a photo to ``uint8[H, W, 3]``, RGB, as a viewer shows it; the array is the caller's own.

    ``max_bytes``: limit on ``len(data)``. ``max_pixels``: limit on width × height. JPEG, PNG, WebP, BMP and
    GIF are read, of an animation the first frame. EXIF orientation is applied; broken EXIF is ignored.
    Palettes, CMYK and greyscale become RGB, 16 bits are scaled to 8, transparent pixels lie on
    :data:`BACKGROUND` (an alpha channel that hides everything is ignored). May be called from several
    threads at once.

    Raises, all of them :class:`~service.errors.VultusError`:

    - :class:`~service.errors.ImageTooLarge`: more than ``max_bytes``;
    - :class:`~service.errors.TooManyPixels`: more than ``max_pixels``, told by the header before any pixel
      is decoded;
    - :class:`~service.errors.UnsupportedMediaType`: a recognisable format that is not accepted, text too;
    - :class:`~service.errors.InvalidImage`: everything else: empty, truncated, contradictory or no format
      at all.
    """
    if not data:
        raise InvalidImage("The file is empty.")
    if len(data) > max_bytes:
        raise ImageTooLarge(f"The file has {len(data):,} bytes; at most {max_bytes:,} are accepted.")
    kind = _kind(data)
    if kind == "WebP":
        # libwebp makes room for the whole canvas when the file is opened.
        _check_pixels(_webp_size(data), max_pixels)
    try:
        with _OPENERS[kind](io.BytesIO(data)) as picture:
            _check_pixels(picture.size, max_pixels)
            picture.load()
            _check_pixels(picture.size, max_pixels)
            image = _rgb(picture)
            orient = _ORIENT.get(_orientation(picture))
    except (TooManyPixels, InvalidImage):
        raise
    except Pillow.DecompressionBombError as error:
        raise TooManyPixels(f"The photo has more than {max_pixels:,} pixels.") from error
    except Exception as error:
        # Pillow documents no list: hostile bytes end in OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidImage(f"The file is not a readable {kind} photo: {error}") from error
    return np.ascontiguousarray(orient(image)) if orient else image


def _kind(data: bytes) -> str:
    """Name of the accepted format that the first bytes state. Raises as :func:`decode_image` does."""
    for magic, name in _ACCEPTED:
        if data.startswith(magic):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    for magic, name in _REFUSED:
        if data.startswith(magic):
            raise _unsupported(name)
    if data[4:8] == b"ftyp":
        raise _unsupported("HEIF, AVIF or MP4")
    start = data[:_SNIFFED].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:16].lower().startswith(_MARKUP):
        raise _unsupported("SVG, XML or HTML")
    if _is_text(data[:_SNIFFED]):
        raise _unsupported("text")
    raise InvalidImage("The file is not a photo of any known format.")


def _unsupported(name: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(f"The file is {name}; JPEG, PNG, WebP, BMP and GIF are accepted.")


def _is_text(start: bytes) -> bool:
    if any(byte < 32 and byte not in _TEXT_CONTROLS for byte in start):
        return False
    try:
        # The sample may end inside a character: its last three bytes need not be whole.
        start[: max(1, len(start) - 3)].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= max(0, len(start) - 6) and error.start > 0
    return True


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels that a WebP header states (RFC 9649, sections 2.5 to 2.7)."""
    chunk, header = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(header) == 10:
        return (
            1 + int.from_bytes(header[4:7], "little"),
            1 + int.from_bytes(header[7:10], "little"),
        )
    if chunk == b"VP8L" and len(header) >= 5:
        bits = int.from_bytes(header[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and len(header) == 10:
        return (
            int.from_bytes(header[6:8], "little") & 0x3FFF,
            int.from_bytes(header[8:10], "little") & 0x3FFF,
        )
    raise InvalidImage("The file is not a readable WebP photo: its header is broken.")


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage(f"The photo is {width}×{height} pixels: there is nothing to see.")
    if width * height > max_pixels:
        raise TooManyPixels(
            f"The photo is {width}×{height} pixels, {width * height:,} in all; at most {max_pixels:,} are accepted."
        )


def _orientation(picture: Pillow.Image) -> int:
    """EXIF's Orientation, 1 if there is none that can be read."""
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # A camera's or an editor's clumsy EXIF says nothing against the pixels.
        return 1
    return value if isinstance(value, int) else 1


def _rgb(picture: Pillow.Image) -> Image:
    """``uint8[H, W, 3]``, a fresh array, of a picture of any mode."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        # Only 16-bit greyscale PNG arrives here. 65535 = 255 × 257.
        levels = np.clip(np.asarray(picture).astype(np.float64) / 257.0 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(levels[:, :, None], 3, axis=2)
    if picture.has_transparency_data and _transparency_is_sound(picture):
        pixels: NDArray[np.uint8] = np.array(picture.convert("RGBA"))
        alpha = pixels[:, :, 3:].astype(np.uint16)
        if alpha.any():
            blended = pixels[:, :, :3] * alpha + BACKGROUND * (255 - alpha)
            return ((blended + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(pixels[:, :, :3])
    return _pixels(picture)


def _pixels(picture: Pillow.Image) -> Image:
    """``uint8[H, W, 3]``, a fresh array, of an opaque picture of any mode with 8 bits.

    Pillow hands pixels over as bytes. Of the whole picture that would be four more copies; of a few rows they stay in
    the cache. A picture of 12 megapixels takes 16 ms in place of 80.
    """
    width, height = picture.size
    rows = max(1, _BAND_PIXELS // width)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _transparency_is_sound(picture: Pillow.Image) -> bool:
    """Whether the transparent colour, if one is given, is one of 8 bits: Pillow keeps 16-bit PNG's as it is."""
    value = picture.info.get("transparency")
    if picture.mode == "P" or value is None:
        return True
    return all(0 <= level <= 255 for level in (value if isinstance(value, tuple) else (value,)))
