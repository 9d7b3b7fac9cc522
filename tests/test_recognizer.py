"""The recogniser with its real parts, in this process, where failures can be injected."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from service.app import open_parts
from service.calibration import rate_of_one
from service.errors import FprUnsupported, Overloaded, StorageFull, SubjectConflict
from service.recognizer import Recognizer
from service.settings import Settings
from tests.support import IMAGES, photo


@pytest.fixture
def recognizer(tmp_path: Path) -> Iterator[Recognizer]:
    with open_parts(Settings(data_dir=tmp_path / "data")) as parts:
        yield parts.recognizer


def fail_commits(recognizer: Recognizer) -> list[int]:
    """Let every commit from now on find the disk full; the returned list ends it when something is put in."""
    over: list[int] = []

    @event.listens_for(recognizer.repository.engine, "commit")
    def full(connection: object) -> None:
        if not over:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise OperationalError("COMMIT", {}, error)

    return over


def test_a_deletion_whose_commit_fails_has_deleted_nothing(recognizer: Recognizer) -> None:
    done = recognizer.enroll("default", "A", [photo("obama.jpg")], None)
    over = fail_commits(recognizer)
    with pytest.raises(StorageFull):
        recognizer.delete_subject("default", "A")
    with pytest.raises(StorageFull):
        recognizer.delete_face(done.templates[0].face_id)
    found = recognizer.identify(photo("obama2.jpg"), "default", None, 5)
    assert (found.templates, found.faces[0].decision.subject) == (1, "A")
    assert len(recognizer.subject("default", "A").faces) == 1
    over.append(1)
    recognizer.delete_subject("default", "A")
    assert recognizer.identify(photo("obama2.jpg"), "default", None, 5).templates == 0


def test_an_enrolment_whose_commit_fails_is_in_no_index(recognizer: Recognizer) -> None:
    recognizer.enroll("default", "B", [photo("biden.jpg")], None)
    over = fail_commits(recognizer)
    with pytest.raises(StorageFull):
        recognizer.enroll("default", "A", [photo("obama.jpg")], None)
    assert recognizer.identify(photo("obama2.jpg"), "default", None, 5).templates == 1
    over.append(1)
    assert [subject.name for subject in recognizer.subjects("default", 0, 10)[0]] == ["B"]


def test_a_photo_that_a_subject_has_is_not_looked_at_again(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [photo("obama.jpg"), photo("biden.jpg"), photo("obama2.jpg")]
    first = recognizer.enroll("default", "A", photos, None)
    assert [(item.index, item.code) for item in first.rejected] == [(1, "identity_mismatch")]
    looked_at: list[bytes] = []
    see = recognizer._see

    def noted(data: bytes) -> Any:
        looked_at.append(data)
        return see(data)

    monkeypatch.setattr(recognizer, "_see", noted)
    again = recognizer.enroll("default", "A", photos, None)
    # The known ones still tell that the other shows somebody else.
    assert [item.face_id for item in again.templates] == [item.face_id for item in first.templates]
    assert again.rejected == first.rejected
    assert looked_at == [photos[1]]
    assert recognizer.enroll("default", "B", [photo("biden.jpg")], None).templates[0].subject == "B"
    assert len(looked_at) == 2
    # What was deleted is looked at again.
    recognizer.delete_face(first.templates[0].face_id)
    assert len(recognizer.enroll("default", "A", photos[:1], None).templates) == 1
    assert looked_at[2:] == photos[:1]


def test_a_known_photo_that_is_deleted_meanwhile_is_looked_at_after_all(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = recognizer.enroll("default", "A", [photo("obama.jpg")], None).templates
    embed = recognizer._embed

    def deleting(faces: Any) -> Any:
        monkeypatch.setattr(recognizer, "_embed", embed)
        recognizer.delete_face(old.face_id)
        return embed(faces)

    monkeypatch.setattr(recognizer, "_embed", deleting)
    done = recognizer.enroll("default", "A", [photo("obama.jpg"), photo("obama2.jpg")], None)
    assert len(done.templates) == 2
    assert old.face_id not in {template.face_id for template in done.templates}
    # With a crop, as if it had never been there.
    assert len(recognizer.repository.portraits("another model", 0, 9)) == 2


def test_the_threshold_rises_as_the_gallery_grows(recognizer: Recognizer) -> None:
    first, _, _, _ = recognizer.operating_points("default", 0.01)
    recognizer.enroll("default", "A", [photo("obama.jpg"), photo("obama2.jpg")], None)
    recognizer.enroll("default", "B", [photo("biden.jpg")], None)
    second, verification, subjects, templates = recognizer.operating_points("default", 0.01)
    assert (subjects, templates) == (2, 3)
    assert second.threshold > first.threshold
    # A search errs on the safe side, one comparison does not.
    assert verification.threshold < first.threshold
    with pytest.raises(FprUnsupported):
        recognizer.operating_points("default", 1e-5)


def test_a_subject_is_found_by_its_best_template(recognizer: Recognizer) -> None:
    recognizer.enroll("default", "A", [photo("obama.jpg"), photo("obama2.jpg"), photo("obama3.jpg")], None)
    recognizer.enroll("default", "B", [photo("biden.jpg")], None)
    (face,) = recognizer.identify(photo("obama3.jpg"), "default", None, 10).faces
    assert [candidate.subject for candidate in face.candidates] == ["A", "B"]
    assert face.candidates[0].similarity == pytest.approx(1.0, abs=1e-4)


def test_strangers_who_score_higher_than_the_calibration_says_are_warned_of(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.drift.LEAST", 30)
    recognizer.enroll("default", "A", [photo("obama.jpg")], None)
    recognizer.enroll("default", "B", [photo("biden.jpg")], None)
    stranger = Image.open(IMAGES / "astronaut.png").convert("RGB").resize((160, 160))
    sheet = Image.new("RGB", (640, 640))
    for number in range(16):
        sheet.paste(stranger, (number % 4 * 160, number // 4 * 160))
    crowd = io.BytesIO()
    sheet.save(crowd, "PNG")
    found = recognizer.similar_to_photo(crowd.getvalue(), "default", 1, None)
    # What is no search for somebody is not counted.
    assert len(found) == 16 and recognizer.drift("default").probes == 0
    # The same service, were strangers of its calibration so much less similar that this one is above their median.
    best = float(np.median([face.similar[0].similarity for face in found]))
    calibration = recognizer._calibration
    median = calibration.at_fmr(rate_of_one(0.35, 2, calibration.spread))[0]
    lower = {
        name: tuple(level - median + best for level in getattr(calibration, name))
        for name in ("threshold", "low", "high")
    }
    recognizer._calibration = calibration.model_copy(update=lower)
    with capture_logs() as log:
        for _ in range(2):
            recognizer.identify(crowd.getvalue(), "default", None, 1)
    drift = recognizer.drift("default")
    assert drift.warning is not None and drift.probes == 32
    assert [line["gallery"] for line in log] == ["default"]
    assert recognizer.drift("other").probes == 0


def test_two_who_enrol_one_person_never_both_look_before_either_stores(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, both = recognizer._index.search_subjects, threading.Barrier(2)

    def slow(*arguments: Any) -> Any:
        found = search(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return found

    monkeypatch.setattr(recognizer._index, "search_subjects", slow)
    refused: list[str] = []

    def enroll(subject: str, name: str) -> None:
        try:
            recognizer.enroll("default", subject, [photo(name)], None)
        except SubjectConflict:
            refused.append(subject)

    threads = [threading.Thread(target=enroll, args=pair) for pair in (("A", "obama.jpg"), ("B", "obama2.jpg"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (stored,) = recognizer.subjects("default", 0, 10)[0]
    assert {stored.name, *refused} == {"A", "B"}


def test_an_enrolment_that_is_refused_has_no_crop_and_no_row(recognizer: Recognizer) -> None:
    recognizer.enroll("default", "A", [photo("obama.jpg")], None)
    with pytest.raises(SubjectConflict):
        recognizer.enroll("default", "B", [photo("obama2.jpg")], {"n": 1})
    with recognizer.repository.engine.connect() as connection:
        for table in ("subjects", "faces", "crops"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 1


def test_a_photo_set_that_meets_a_full_queue_is_refused_and_not_called_unusable(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(crops: object) -> None:
        raise Overloaded

    monkeypatch.setattr(recognizer._queue, "embed", full)
    with pytest.raises(Overloaded):
        recognizer.search_unknown([photo("obama.jpg")], "default", None)
