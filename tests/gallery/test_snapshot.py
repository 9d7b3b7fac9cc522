"""What the index leaves on the disk: the next start gets it back, and nothing of it outlives a deletion."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.domain import IndexEntries, Members
from service.gallery import faiss_gallery, snapshot
from service.gallery.faiss_gallery import FaissGallery
from service.gallery.inverted import InvertedIndex
from tests.gallery.people import DIMENSION, Oracle, assert_equal, entries, unit

CODED = 5e-3


def opened(folder: Path, model_id: str = "m", changeover: int = 200) -> FaissGallery:
    return FaissGallery(DIMENSION, folder=folder, model_id=model_id, changeover=changeover)


def filled(folder: Path, count: int = 400) -> tuple[FaissGallery, Oracle]:
    """An index that has gone over to an approximate one and has been changed since."""
    rng = np.random.default_rng(1)
    index, oracle = opened(folder), Oracle()
    assert index.restore([], "", "stamp 1") == []
    for start in (0, count // 2):
        new = entries(rng, list(range(start + 1, start + count // 2 + 1)), list(range(start, start + count // 2)))
        index.add(new)
        oracle.add(new)
        index.settle()
    removed = np.array([2, 3, count - 1], np.int64)
    index.remove("g", removed)
    for row_id in removed.tolist():
        del oracle.held[row_id]
    return index, oracle


def members(oracle: Oracle, gallery: str = "g") -> Members:
    rows = sorted(oracle.held)
    return Members(gallery, np.array(rows, np.int64), np.array([oracle.held[row][0] for row in rows], np.int64))


def missing_of(index: FaissGallery, oracle: Oracle, stamp: str = "stamp 1") -> list[int]:
    return [row for one in index.restore([members(oracle)], stamp, "stamp 2") for row in one.row_ids.tolist()]


def codes_of(index: FaissGallery, new: IndexEntries) -> list[bytes]:
    built = index._shelves["g"]._index
    assert isinstance(built, InvertedIndex)
    return [codes.tobytes() for codes in built.codes(new.embeddings)]


def raw(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_next_start_gets_everything_back(tmp_path: Path) -> None:
    index, oracle = filled(tmp_path)
    index.close()
    again = opened(tmp_path)
    assert missing_of(again, oracle) == []
    assert again.approximate("g")
    assert_equal(again, oracle, np.random.default_rng(2), within=CODED)
    # And it goes on: what comes now is there after another start.
    new = entries(np.random.default_rng(3), [1000, 1001], [1000, 0])
    again.add(new)
    oracle.add(new)
    again.close()
    third = opened(tmp_path)
    assert missing_of(third, oracle, "stamp 2") == []
    assert_equal(third, oracle, np.random.default_rng(4), within=CODED)


def test_what_the_record_has_and_the_file_lacks_is_asked_for(tmp_path: Path) -> None:
    index, oracle = filled(tmp_path)
    index.close()
    new = entries(np.random.default_rng(3), [1000, 1001], [1000, 0])
    oracle.add(new)
    again = opened(tmp_path)
    assert missing_of(again, oracle) == [1000, 1001]
    again.add(new)
    assert_equal(again, oracle, np.random.default_rng(4), within=CODED)


def test_what_the_record_has_not_goes_from_the_file(tmp_path: Path) -> None:
    index, oracle = filled(tmp_path)
    new = entries(np.random.default_rng(3), [1000], [1000])
    index.add(new)
    (code,) = codes_of(index, new)
    index.close()
    assert code in raw(tmp_path)
    again = opened(tmp_path)
    assert missing_of(again, oracle) == []
    assert code not in raw(tmp_path)
    assert_equal(again, oracle, np.random.default_rng(4), within=CODED)


def damage(change: Callable[[bytearray], bytearray | None]) -> Callable[[Path], None]:
    def done(path: Path) -> None:
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content) or content)

    return done


def flip(place: int) -> Callable[[bytearray], None]:
    def done(content: bytearray) -> None:
        content[place] ^= 0x40

    return done


@pytest.mark.parametrize(
    ("harm", "everything"),
    [
        (damage(lambda content: content[:-7]), False),
        (damage(lambda content: content[: len(content) * 3 // 4]), False),
        (damage(flip(-30)), False),
        (damage(lambda content: content + content[-20:]), False),
        (damage(flip(3)), True),
        (damage(flip(300)), True),
        (damage(lambda content: content[:30]), True),
        (damage(lambda content: content[:200]), True),
        (damage(lambda content: bytearray(len(content))), True),
        (lambda path: path.write_bytes(b""), True),
        (lambda path: path.unlink(), True),
        (lambda path: path.write_bytes(random.Random(1).randbytes(50_000)), True),
    ],
)
def test_a_damaged_file_loses_nothing(tmp_path: Path, harm: Callable[[Path], None], everything: bool) -> None:
    index, oracle = filled(tmp_path)
    index.close()
    (path,) = tmp_path.iterdir()
    harm(path)
    again = opened(tmp_path)
    rows = missing_of(again, oracle)
    assert (len(rows) == len(oracle.held)) == everything
    assert len(rows) < len(oracle.held) // 2 or everything
    lost = Oracle()
    lost.held = {row: oracle.held[row] for row in rows}
    if rows:
        found = members(lost)
        vectors = np.stack([oracle.held[row][1] for row in sorted(rows)])
        again.add(IndexEntries("g", found.row_ids, found.subject_ids, vectors))
    again.settle()
    assert_equal(again, oracle, np.random.default_rng(4), within=CODED)
    again.close()
    third = opened(tmp_path)
    assert missing_of(third, oracle, "stamp 2") == []
    assert_equal(third, oracle, np.random.default_rng(5), within=CODED)


@pytest.mark.parametrize("how", ["model", "stamp", "gallery", "dimension"])
def test_a_foreign_file_is_deleted_before_anything_is_answered(tmp_path: Path, how: str) -> None:
    index, oracle = filled(tmp_path)
    index.close()
    if how == "dimension":
        again = FaissGallery(2 * DIMENSION, folder=tmp_path, model_id="m")
    else:
        again = opened(tmp_path, model_id="other" if how == "model" else "m")
    record = members(oracle, "h" if how == "gallery" else "g")
    (missing,) = again.restore([record], "another" if how == "stamp" else "stamp 1", "stamp 2")
    assert missing.row_ids.tolist() == record.row_ids.tolist()
    assert list(tmp_path.iterdir()) == []


def test_what_was_deleted_is_in_no_file_when_remove_returns(tmp_path: Path) -> None:
    index, oracle = filled(tmp_path)
    new = entries(np.random.default_rng(3), list(range(1000, 1030)), list(range(1000, 1030)))
    index.add(new)
    codes = codes_of(index, new)
    assert all(code in raw(tmp_path) for code in codes)
    index.remove("g", new.row_ids[:1])
    assert codes[0] not in raw(tmp_path) and codes[1] in raw(tmp_path)
    index.remove("g", new.row_ids[1:20])
    found = raw(tmp_path)
    assert not any(code[start : start + 12] in found for code in codes[:20] for start in range(0, DIMENSION - 12, 6))
    assert all(code in found for code in codes[20:])
    # Replacing is a deletion too.
    index.add(entries(np.random.default_rng(4), [1025], [1025]))
    assert codes[25] not in raw(tmp_path) and codes[26] in raw(tmp_path)
    size = len(raw(tmp_path))
    index.add(new)
    assert len(raw(tmp_path)) < size + 3 * (DIMENSION + 24), "the places of the deleted are not used again"
    index.remove("g", np.concatenate([new.row_ids, members(oracle).row_ids]))
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_single_person_is_in_the_head(tmp_path: Path) -> None:
    """Every centre is an average, and no float of any vector stands anywhere."""
    index, oracle = filled(tmp_path)
    found = raw(tmp_path)
    for _, vector in oracle.held.values():
        assert not any(vector[place : place + 2].tobytes() in found for place in range(0, DIMENSION, 2))
    built = index._shelves["g"]._index
    assert isinstance(built, InvertedIndex)
    layout = built.layout
    points = np.stack([vector for _, vector in oracle.held.values()]) @ layout.rotation.T + layout.shift
    assert np.linalg.norm(points[:, None] - layout.centres, axis=2).min() > 0.02


def test_deletions_during_a_changeover_are_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment of a rebuild a deletion meets, what it took is in no file when it returns, nor later."""
    monkeypatch.setattr("service.gallery.faiss_gallery._BLOCK", 16)
    monkeypatch.setattr("service.gallery.faiss_gallery._FEW", 4)
    move = faiss_gallery._Shelf._move

    deleted = threading.Event()
    deleted.set()

    def slowly(*arguments: Any) -> None:
        time.sleep(0.003)
        assert deleted.wait(60)
        move(*arguments)

    monkeypatch.setattr(faiss_gallery._Shelf, "_move", slowly)
    rng = np.random.default_rng(5)
    index, oracle = opened(tmp_path), Oracle()
    index.restore([], "", "s")
    people = entries(rng, list(range(1, 251)), list(range(1, 251)))
    index.add(people)
    index.settle()
    # Codes of a gallery stay the same from one rebuild to the next, so those of what comes later are known as well.
    more = entries(rng, list(range(251, 851)), list(range(251, 851)))
    codes = dict(zip(range(1, 851), codes_of(index, people) + codes_of(index, more), strict=True))
    oracle.add(people)
    shelf = index._shelves["g"]
    deleted.clear()
    met = 0
    for start in range(0, 600, 10):
        new = IndexEntries(
            "g", *(held[start : start + 10] for held in (more.row_ids, more.subject_ids, more.embeddings))
        )
        index.add(new)
        oracle.add(new)
        gone = rng.choice(list(oracle.held), 3, replace=False)
        # The first rebuild that writes a file waits for a deletion, and the deletion for the file.
        while not met and not shelf.settled.is_set() and not any(tmp_path.glob("*.new")):
            time.sleep(0.001)
        met += any(path.suffix == ".new" for path in tmp_path.iterdir())
        index.remove("g", gone)
        if met:
            deleted.set()
        found = raw(tmp_path)
        assert not any(codes[int(row)] in found for row in gone)
        for row in gone:
            del oracle.held[int(row)]
    index.settle()
    assert met
    found = raw(tmp_path)
    assert {row for row, code in codes.items() if code in found} == set(oracle.held)
    assert_equal(index, oracle, rng, within=CODED)
    index.close()
    again = opened(tmp_path)
    assert missing_of(again, oracle, "s") == []
    assert_equal(again, oracle, rng, within=CODED)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.gallery.test_snapshot import *
index, oracle = filled(Path(sys.argv[1]))
for row in range(4, 390):
    held = IndexEntries("g", np.array([row]), np.array([row - 1]), oracle.held[row][1][None])
    (code,) = codes_of(index, held)
    index.remove("g", held.row_ids)
    print(row, code.hex(), flush=True)
"""


def test_after_kill_9_the_deleted_are_gone_and_the_rest_is_sound(tmp_path: Path) -> None:
    root, data = str(Path(__file__).resolve().parents[2]), tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(data), root], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(100 + random.randrange(100))]
    process.kill()
    lines += process.stdout.readlines()
    process.wait()
    answered = dict(line.split() for line in lines if line.endswith("\n"))
    assert 100 <= len(answered) < 386
    found = raw(data)
    assert not any(bytes.fromhex(code) in found for code in answered.values())
    reference, oracle = filled(tmp_path / "reference")
    reference.close()
    for row in answered:
        del oracle.held[int(row)]
    again = opened(data)
    # One deletion may have come as far as the file and not to its answer.
    lost = missing_of(again, oracle)
    assert len(lost) <= 1
    for row in lost:
        del oracle.held[row]
    assert_equal(again, oracle, np.random.default_rng(7), within=CODED)


def test_a_full_disk_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, oracle = filled(tmp_path)
    write = os.pwrite
    (path,) = tmp_path.iterdir()
    # Room for two and a half more templates, besides those whose places are free.
    end = path.stat().st_size + 220

    def full(file: int, data: bytes, offset: int) -> int:
        if offset >= end:
            raise OSError(28, "No space left on device")
        return write(file, memoryview(data)[: end - offset], offset)

    new = entries(np.random.default_rng(3), list(range(1000, 1010)), list(range(1000, 1010)))
    codes = codes_of(index, new)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot.os, "pwrite", full)
        index.add(new)
    oracle.add(new)
    assert_equal(index, oracle, np.random.default_rng(4), within=CODED)
    index.remove("g", new.row_ids[:5])
    found = raw(tmp_path)
    assert not any(code[:16] in found for code in codes[:5])
    for row_id in new.row_ids[:5].tolist():
        del oracle.held[row_id]
    index.close()
    again = opened(tmp_path)
    rows = missing_of(again, oracle)
    assert set(rows) <= set(new.row_ids[5:].tolist())
    again.add(IndexEntries("g", new.row_ids[5:], new.subject_ids[5:], new.embeddings[5:]))
    assert_equal(again, oracle, np.random.default_rng(4), within=CODED)


def test_a_deletion_that_cannot_be_written_takes_the_file_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, oracle = filled(tmp_path)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot.os, "pwrite", broken)
        index.remove("g", np.array([10], np.int64))
    del oracle.held[10]
    assert list(tmp_path.iterdir()) == []
    index.add(entries(np.random.default_rng(3), [5000], [5000]))
    index.remove("g", np.array([5000], np.int64))
    assert list(tmp_path.iterdir()) == []
    assert_equal(index, oracle, np.random.default_rng(4), within=CODED)


def test_no_file_can_be_made_and_searches_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.write_bytes(b"in the way")
    index, oracle = filled(folder)
    assert index.approximate("g")
    assert_equal(index, oracle, np.random.default_rng(4), within=CODED)


def test_a_gallery_emptied_during_a_rebuild_leaves_no_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        index = opened(tmp_path)
        index.restore([], "", "s")
        people = entries(rng, list(range(1, 401)), list(range(1, 401)))
        index.add(people)
        threading.Event().wait(rng.random() * 0.1)
        index.remove("g", people.row_ids)
        assert list(tmp_path.iterdir()) == []
        assert index.sizes("g") == (0, 0)
        index.close()
    assert unit(rng, 1).shape == (1, DIMENSION)
