"""A ZIP of photos, read without being believed: in memory, and only as far as is asked."""

from __future__ import annotations

import io
import lzma
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from service.errors import ImageTooLarge, InvalidArchive

MAX_ENTRIES = 10_000
"""Most files and folders in an archive. A list of millions would need gigabytes before one photo is read."""

_ENTRY = b"PK\x01\x02"
"""How each entry of the list at a ZIP's end begins (PKWARE APPNOTE 4.3.12)."""

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""The others may ask for gigabytes of memory to unpack a few bytes, and no photo needs them."""

_ENCRYPTED = 0x41
"""Flag bits of traditional and of strong encryption."""

_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError, OSError)


class Archive:
    """The files of a ZIP. ``names``: their paths, folders left out."""

    def __init__(self, opened: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self.names = list(entries)
        self._opened = opened
        self._entries = entries

    def read(self, name: str, most: int) -> bytes:
        """Return a file, but no more than ``most`` bytes of it. Raises ``InvalidArchive`` if it is damaged."""
        try:
            with self._opened.open(self._entries[name]) as file:
                return file.read(most)
        except _BROKEN:
            raise InvalidArchive(f"The archive is damaged: {name!r} cannot be read.") from None


@contextmanager
def read_archive(data: bytes, max_bytes: int) -> Iterator[Archive]:
    """Open a ZIP. ``max_bytes``: limit on all of its files together, unpacked.

    Raises :class:`~service.errors.InvalidArchive` if it is not a ZIP or damaged, has more than :data:`MAX_ENTRIES`
    entries, names a path outside itself or one twice, or holds what is encrypted, a link or packed in an unusual way;
    :class:`~service.errors.ImageTooLarge` beyond ``max_bytes``.
    """
    # Counted before the list is read: it says of itself what it likes.
    if data.count(_ENTRY) > MAX_ENTRIES:
        raise InvalidArchive(f"The archive has more than {MAX_ENTRIES:,} files.")
    try:
        opened = zipfile.ZipFile(io.BytesIO(data))
    except _BROKEN:
        raise InvalidArchive("The file is not a ZIP, or its end is missing.") from None
    with opened:
        yield Archive(opened, _checked(opened.infolist(), max_bytes))


def _checked(infos: list[zipfile.ZipInfo], max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in infos:
        name = info.filename
        path = PurePosixPath(name)
        # orig_filename: what zipfile has made readable, such as a NUL in the name, is refused all the same.
        if not path.parts or path.is_absolute() or ".." in path.parts or set(info.orig_filename) & set("\\\0"):
            raise InvalidArchive("The archive names a path outside itself, or one with a backslash.")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InvalidArchive(f"{name!r} in the archive is a link or a device.")
        if info.is_dir():
            continue
        if info.flag_bits & _ENCRYPTED:
            raise InvalidArchive("The archive is encrypted.")
        if info.compress_type not in _METHODS:
            raise InvalidArchive(f"{name!r} in the archive is packed in an unusual way; only deflate is accepted.")
        if str(path) in entries:
            raise InvalidArchive(f"{name!r} is in the archive twice.")
        entries[str(path)] = info
        # Nothing is unpacked beyond the size that an entry states.
        total += info.file_size
        if total > max_bytes:
            raise ImageTooLarge(f"The archive holds more than {max_bytes:,} bytes, unpacked.")
    return entries
