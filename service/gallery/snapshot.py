"""What an approximate index knows, in a file, so that the next start need not read every vector from SQL.

The file is a copy that may be lost or damaged at any moment: SQL says what is enrolled, and whatever the file lacks is
read from there. What it must never do is keep what was deleted.

=========  ==========================================================================================
bytes      hold
=========  ==========================================================================================
8          ``VULTUS`` and the format's version
32         the record's stamp: the file belongs to this state of the database, or is worthless
12         length (8) and CRC-32 (4) of the head
length     the head: the model and the index's layout, as NumPy's ``npz``
24 + D     each template: CRC-32 of what follows, list, row id, subject id, codes; all zero where nobody is
=========  ==========================================================================================

Numbers are little-endian.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"VULTUS\x00\x01"
_STAMP = 32
_START = len(_MAGIC) + _STAMP + 12
_BLOCK = 4096
"""Templates that are read at once."""

_FEW = 16

Head = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Templates:
    """Templates as the file has them.

    ``row_ids``, ``subject_ids``, ``places``: ``int64[N]``, the last their lists; ``codes``: ``uint8[N, D]``.
    """

    row_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]
    places: NDArray[np.int64]
    codes: NDArray[np.uint8]

    def only(self, chosen: NDArray[np.bool_]) -> Templates:
        """Return those that ``bool[N]`` says."""
        return Templates(self.row_ids[chosen], self.subject_ids[chosen], self.places[chosen], self.codes[chosen])


class Snapshot:
    """One gallery's file. One thread at a time may use it."""

    def __init__(self, path: Path, file: int, start: int, dimension: int) -> None:
        """Internal: :meth:`create` and :meth:`open` make them."""
        self._path = path
        self._file = file
        self._start = start
        self._record = np.dtype(
            [("crc", "<u4"), ("place", "<u4"), ("row_id", "<i8"), ("subject_id", "<i8"), ("codes", "u1", (dimension,))]
        )
        # Who is where: the row id of each place, 0 where nobody is.
        self._row_ids = np.zeros(0, np.int64)
        self._used = 0
        self._free: list[int] = []
        self._gone = False

    @classmethod
    def create(cls, path: Path, stamp: str, head: Head, dimension: int) -> Snapshot | None:
        """Begin an empty file, or return None if that cannot be done. An older one of the name is replaced."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **head)
        payload = buffer.getvalue()
        begin = _MAGIC + _stamp(stamp) + len(payload).to_bytes(8, "little") + zlib.crc32(payload).to_bytes(4, "little")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return None
        made = cls(path, file, _START + len(payload), dimension)
        try:
            _write(file, begin + payload, 0)
        except OSError:
            made.delete()
            return None
        return made

    @classmethod
    def open(cls, path: Path, stamp: str, dimension: int) -> tuple[Snapshot, Head] | None:
        """Open a file and return it with its head, or return None if it is not a whole one of this stamp."""
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            begin = os.pread(file, _START, 0)
            length = int.from_bytes(begin[-12:-4], "little")
            payload = os.pread(file, min(length, os.fstat(file).st_size), _START)
            if (
                len(begin) == _START
                and begin.startswith(_MAGIC + _stamp(stamp))
                and len(payload) == length
                and zlib.crc32(payload) == int.from_bytes(begin[-4:], "little")
            ):
                with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
                    return cls(path, file, _START + length, dimension), dict(arrays)
        except (OSError, ValueError):
            pass
        os.close(file)
        return None

    def restamp(self, stamp: str) -> None:
        """Say that the file belongs to this state of the database from now on. Raises ``OSError``."""
        _write(self._file, _stamp(stamp), len(_MAGIC))
        os.fsync(self._file)

    def sizes(self, lists: int) -> NDArray[np.int64]:
        """Return about how many templates of each list, ``int64[lists]``, the file has. Raises ``OSError``."""
        count = (os.fstat(self._file).st_size - self._start) // self._record.itemsize
        if count <= 0:
            return np.zeros(lists, np.int64)
        held = np.memmap(self._path, self._record, "r", self._start, (count,))
        places = held["place"][held["row_id"] > 0]
        return np.bincount(places[places < lists], minlength=lists)

    def read(self) -> Iterator[Templates]:
        """Yield all sound templates. Whatever else is in the file is overwritten.

        To be read to its end, once, after :meth:`open`. Raises ``OSError``.
        """
        size = self._record.itemsize
        count = max(os.fstat(self._file).st_size - self._start, 0) // size
        # The last template may have been torn off by a full disk or the end of the process.
        os.ftruncate(self._file, self._start + count * size)
        self._row_ids = np.zeros(count, np.int64)
        self._used = count
        for start in range(0, count, _BLOCK):
            block = os.pread(self._file, min(_BLOCK, count - start) * size, self._start + start * size)
            found = np.frombuffer(block, self._record)
            sound = (found["crc"] == _sums(block, size)) & (found["row_id"] > 0)
            self._row_ids[start : start + len(found)] = np.where(sound, found["row_id"], 0)
            empty = np.frombuffer(block, np.uint8).reshape(len(found), size).max(axis=1, initial=0) == 0
            for place in np.flatnonzero(~sound & ~empty).tolist():
                _write(self._file, bytes(size), self._start + (start + place) * size)
            self._free += (start + np.flatnonzero(~sound)).tolist()
            held = found[sound]
            yield Templates(
                held["row_id"].copy(), held["subject_id"].copy(), held["place"].astype(np.int64), held["codes"].copy()
            )
        os.fsync(self._file)

    def append(self, new: Templates) -> None:
        """Write templates that are not there. If the disk does not take them, they are left out.

        Raises ``OSError`` if it neither takes them nor lets go of a part of them.
        """
        row_ids = new.row_ids
        if self._gone or not len(row_ids):
            return
        size, end = self._record.itemsize, self._used
        records = np.zeros(len(row_ids), self._record)
        records["row_id"], records["subject_id"] = row_ids, new.subject_ids
        records["place"], records["codes"] = new.places, new.codes
        records["crc"] = _sums(records.tobytes(), size)
        filled = min(len(records), len(self._free))
        places, self._free = self._free[:filled], self._free[filled:]
        # Noted before they are written: what a full disk took of them is forgotten like the rest.
        self._row_ids[places] = row_ids[:filled]
        self._note(row_ids[filled:])
        try:
            for place, record in zip(places, records[:filled], strict=True):
                _write(self._file, record.tobytes(), self._start + place * size)
            _write(self._file, records[filled:].tobytes(), self._start + end * size)
        except OSError:
            try:
                os.ftruncate(self._file, self._start + end * size)
                self._used = end
            except OSError:
                self.delete()
            self.forget(row_ids[:filled])

    def forget(self, row_ids: NDArray[np.int64]) -> None:
        """Overwrite templates with zeros, on the disk when this returns; ids that are not there are passed over.

        If that cannot be done, the whole file is deleted. Raises ``OSError`` if even that cannot be done.
        """
        held = self._row_ids[: self._used]
        if len(row_ids) < _FEW:
            places = [place for row_id in row_ids.tolist() for place in np.flatnonzero(held == row_id).tolist()]
        else:
            places = np.flatnonzero(np.isin(held, row_ids)).tolist()
        if not places:
            return
        zeros = bytes(self._record.itemsize)
        try:
            for place in places:
                _write(self._file, zeros, self._start + place * len(zeros))
            os.fsync(self._file)
        except OSError:
            self.delete()
            return
        self._row_ids[places] = 0
        self._free += places

    def publish(self, path: Path) -> None:
        """Give the file this name, whole on the disk; one of the name is replaced. Raises ``OSError``."""
        os.fsync(self._file)
        self._path.replace(path)
        self._path = path

    def delete(self) -> None:
        """Delete the file; what is appended later goes nowhere. Raises ``OSError``."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if not self._gone:
            os.close(self._file)
        self._gone = True
        self._row_ids, self._used, self._free = np.zeros(0, np.int64), 0, []

    def _note(self, row_ids: NDArray[np.int64]) -> None:
        end = self._used + len(row_ids)
        if end > len(self._row_ids):
            larger = np.zeros(max(end, self._used * 5 // 4), np.int64)
            larger[: self._used] = self._row_ids[: self._used]
            self._row_ids = larger
        self._row_ids[self._used : end] = row_ids
        self._used = end


def _sums(block: bytes, size: int) -> list[int]:
    # An empty place does not have the sum of its zeros: that of none.
    view = memoryview(block)
    return [zlib.crc32(view[place + 4 : place + size]) for place in range(0, len(view), size)]


def _stamp(stamp: str) -> bytes:
    return stamp.encode().ljust(_STAMP, b"\0")[:_STAMP]


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
