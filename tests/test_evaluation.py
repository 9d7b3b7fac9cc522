"""The arithmetic of an evaluation, held against a second, slow way to count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import evaluation, pictures
from service.calibration import Calibration
from service.domain import Evaluation, IndexEntries
from service.errors import FprUnsupported
from service.evaluation import Plan, Shot, evaluate, laid_out, read_groups, table
from service.own_calibration import OwnCalibrations
from service.settings import BUNDLED_MODELS

CALIBRATION = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")
PROBLEMS = ("", "", "", "", "", "no_face", "several_faces", "low_quality", "invalid_image")
SEARCHED = {"", "low_quality"}


def made(seed: int, people: int, strangers: int, most: int = 5, problems: tuple[str, ...] = PROBLEMS) -> list[Shot]:
    """Photos of made-up people, as similar to one another as real ones."""
    generator = np.random.default_rng(seed)
    files = [f"p{i:03}/{j}.jpg" for i in range(people) for j in range(generator.integers(1, most + 1))]
    files += [f"strangers/s{i:03}/{j}.jpg" for i in range(strangers) for j in range(generator.integers(1, 3))]
    placed, _ = laid_out(files)
    faces = {name: generator.normal(size=16) for name in sorted({photo.person for photo in placed})}
    common = generator.normal(size=16) * 2.2
    shots = []
    for photo in placed:
        vector = (common + faces[photo.person] + 0.45 * generator.normal(size=16)).astype(np.float32)
        problem = str(generator.choice(problems))
        embedding = vector / np.linalg.norm(vector) if problem in SEARCHED else None
        shots.append(Shot(photo, problem, embedding))
    return shots


def slowly(shots: list[Shot], plan: Plan) -> dict[str, object]:
    """Count by loops over photos, one comparison at a time."""
    gallery: list[Shot] = []
    probes: list[Shot] = []
    strange: list[Shot] = []
    number: dict[str, int] = {}
    for shot in shots:
        if shot.photo.file.startswith("strangers/"):
            strange.append(shot)
            continue
        number[shot.photo.person] = number.get(shot.photo.person, 0) + 1
        if number[shot.photo.person] > plan.enrol:
            probes.append(shot)
        elif shot.problem == "":
            gallery.append(shot)

    def best(shot: Shot) -> tuple[float, str | None]:
        found: tuple[float, str | None] = (-2.0, None)
        for template in gallery if shot.embedding is not None else ():
            similarity = float(np.float32(shot.embedding @ template.embedding))
            if similarity > found[0]:
                found = (similarity, template.photo.person)
        return found

    subjects = len({template.photo.person for template in gallery})
    answers = [(shot, *best(shot)) for shot in probes]
    searched = [(shot, *best(shot)) for shot in strange if shot.embedding is not None]
    # The service's gallery of the same people, who come one by one and in another order.
    own_people = OwnCalibrations(CALIBRATION, lambda rows: np.stack([gallery[row].embedding for row in rows]))
    names = sorted({template.photo.person for template in gallery})
    for row, template in reversed(list(enumerate(gallery))):
        number = np.array([names.index(template.photo.person)])
        own_people.add(IndexEntries("here", np.array([row]), number, template.embedding[None]))
    points = []
    for fpr in plan.fprs:
        point = CALIBRATION.identification_point(fpr, subjects, len(gallery))
        t = own_people.combined(point, "here", "stricter", subjects, len(gallery)).threshold
        points.append(
            (
                sum(score >= t for _, score, _ in searched),
                sum(score >= t and who == shot.photo.person for shot, score, who in answers),
                sum(score >= t and who != shot.photo.person for shot, score, who in answers),
            )
        )
    own = [shot for shot in shots if shot.embedding is not None and not shot.photo.stranger]
    others = [shot for shot in shots if shot.embedding is not None and shot.photo.stranger]
    pairs = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :]] + [(a, b) for a in own for b in others]
    matched = []
    for fpr in plan.fprs:
        t = CALIBRATION.verification_point(fpr).threshold
        same = [float(a.embedding @ b.embedding) >= t for a, b in pairs if a.photo.person == b.photo.person]
        other = [float(a.embedding @ b.embedding) >= t for a, b in pairs if a.photo.person != b.photo.person]
        matched.append((sum(other), len(other), len(same) - sum(same), len(same)))
    return {
        "subjects": subjects,
        "templates": len(gallery),
        "probes": len(probes),
        "searched": len(searched),
        "points": points,
        "rank1": sum(who != shot.photo.person for shot, _, who in answers),
        "pairs": matched,
    }


def counted(found: Evaluation) -> dict[str, object]:
    return {
        "subjects": found.gallery_size,
        "templates": found.templates,
        "probes": found.probes.photos,
        "searched": found.strangers.photos - found.strangers.failed,
        "points": [(p.fpir.errors, p.matches, p.mistaken) for p in found.points],
        "rank1": found.rank1.errors,
        "pairs": [(p.false_matches, p.impostor_pairs, p.false_non_matches, p.genuine_pairs) for p in found.pairs],
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 12), st.integers(1, 3))
def test_every_count_is_that_of_counting_one_by_one(seed: int, people: int, strangers: int, enrol: int) -> None:
    plan = Plan(fprs=(0.5, 0.1, 0.01), enrol=enrol, resamples=2)
    try:
        shots = made(seed, people, strangers)
    except ValueError:
        assert people + bool(strangers) == 1
        return
    found = evaluate(shots, CALIBRATION, plan)
    assert counted(found) == slowly(shots, plan)
    for point in found.points:
        assert point.fnir.errors + point.matches == point.fnir.trials == found.probes.photos
        assert point.fpir.trials == found.strangers.photos - found.strangers.failed
    assert found.enrolled.photos + found.probes.photos + found.strangers.photos == len(shots)
    assert table(found)


def test_the_made_up_people_test_something() -> None:
    found = evaluate(made(1, 40, 40), CALIBRATION, Plan(fprs=(0.5, 0.1), resamples=2))
    for point in found.points:
        assert 0 < point.fpir.errors < point.fpir.trials
        assert 0 < point.matches < point.fnir.trials
    assert any(point.mistaken for point in found.points)
    assert {failure.use for failure in found.failures} == {"enrolled", "probe", "stranger"}
    assert "low_quality" in found.enrolled.codes
    assert "low_quality" not in found.probes.codes


def test_the_curve_falls_and_ends_where_everybody_is_found() -> None:
    found = evaluate(made(2, 30, 60), CALIBRATION, Plan(resamples=2))
    assert found.det[0].fpir == 0
    assert found.det[-1].fpir == 1
    for before, after in zip(found.det, found.det[1:], strict=False):
        assert before.fpir < after.fpir
        assert before.threshold > after.threshold
        assert before.fnir is not None and after.fnir is not None
        assert before.fnir >= after.fnir
    assert found.det[-1].fnir is not None
    assert found.det[-1].fnir >= found.rank1.rate


def test_the_order_of_files_decides_who_is_enrolled_and_nothing_depends_on_chance() -> None:
    shots = made(3, 10, 10)
    plan = Plan(enrol=2)
    assert evaluate(shots, CALIBRATION, plan) == evaluate(shots, CALIBRATION, plan)
    assert [photo.file for photo in laid_out(["b/2.jpg", "a/1.jpg", "b/10.jpg"])[0]] == [
        "a/1.jpg",
        "b/10.jpg",
        "b/2.jpg",
    ]


def test_intervals_hold_the_true_rate_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        # People differ in how often they are missed, on average one time in five.
        rates = generator.beta(1, 4, size=60)
        trials = generator.integers(1, 8, size=60)
        low, high = evaluation._interval(generator.binomial(trials, rates).astype(np.float64), trials, 200)
        assert low is not None and high is not None
        inside += low <= 0.2 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_more_photos_of_the_same_people_do_not_narrow_an_interval() -> None:
    shots = made(4, 30, 30, problems=("",))
    copies = [
        replace(shot, photo=replace(shot.photo, file=f"{shot.photo.file}-{i}"))
        for i in range(5)
        for shot in shots
        if shot.photo.stranger
    ]
    plan = Plan(fprs=(0.3,))
    few = evaluate(shots, CALIBRATION, plan).points[0].fpir
    many = evaluate([shot for shot in shots if not shot.photo.stranger] + copies, CALIBRATION, plan).points[0].fpir
    assert (many.trials, many.errors) == (5 * few.trials, 5 * few.errors)
    assert (many.rate, many.low, many.high) == pytest.approx((few.rate, few.low, few.high))
    assert few.low is not None and few.high is not None and few.rate is not None
    assert 0 <= few.low < few.rate < few.high <= 1


def test_no_error_is_no_proof() -> None:
    """Clopper & Pearson 1934 where nothing was seen: the upper end is 1 − 0.025^(1/n), n people."""
    found = evaluate(made(5, 3, 20, problems=("",)), CALIBRATION, Plan(fprs=(0.0001, 0.2)))
    strict, loose = found.points
    assert strict.fpir.errors == 0
    assert strict.fpir.people == 20
    assert (strict.fpir.low, strict.fpir.high) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert not strict.fpir.supported
    assert "20 people cannot show a rate of 0.0001" in strict.fpir.note
    assert "30,000 are the least" in strict.fpir.note
    assert not loose.fpir.supported
    assert "with fewer than 30" in loose.fpir.note
    assert strict.fpir.note in table(found)


def test_enough_people_support_a_rate() -> None:
    (point,) = evaluate(made(6, 20, 400, problems=("",)), CALIBRATION, Plan(fprs=(0.3,), resamples=20)).points
    assert point.fpir.people_in_error >= 30
    assert point.fpir.supported
    assert point.fpir.note == ""


def test_a_group_has_its_own_rates_in_the_whole_gallery() -> None:
    shots = made(7, 20, 30)
    groups = {f"p{i:03}": "odd" if i % 2 else "even" for i in range(20)} | {
        f"strangers/s{i:03}": "odd" for i in range(30)
    }
    # A file's own line goes before its person's.
    last = [shot.photo.file for shot in shots if shot.photo.person == "p001"][-1]
    found = evaluate(
        shots, CALIBRATION, Plan(fprs=(0.5,), groups=groups | {last: "even", "nobody": "odd"}, resamples=2)
    )
    everybody = found.points[0]
    even, odd = found.groups
    assert (even.group, odd.group) == ("even", "odd")
    assert even.fnir.trials + odd.fnir.trials == everybody.fnir.trials
    assert even.fnir.errors + odd.fnir.errors == everybody.fnir.errors
    assert (odd.fpir.errors, odd.fpir.trials) == (everybody.fpir.errors, everybody.fpir.trials)
    assert (even.fpir.trials, even.fpir.rate) == (0, None)
    uses = {shot.photo.file: shot for shot in shots}
    numbers: dict[str, int] = {}
    expected = 0
    for file, shot in uses.items():
        numbers[shot.photo.person] = numbers.get(shot.photo.person, 0) + 1
        if not shot.photo.stranger and numbers[shot.photo.person] > 1:
            expected += file == last or int(shot.photo.person[1:]) % 2 == 0
    assert even.fnir.trials == expected
    assert found.notes[-1] == "1 of 52 lines of the groups name no photo and nobody here."
    assert "even" in table(found)


def test_whoever_cannot_be_enrolled_is_missed() -> None:
    shots = made(8, 6, 4, problems=("",))
    unseen = [
        replace(shot, problem="no_face", embedding=None) if shot.photo.file == "p002/0.jpg" else shot for shot in shots
    ]
    before, after = (evaluate(some, CALIBRATION, Plan(fprs=(0.5,), resamples=2)) for some in (shots, unseen))
    assert (before.gallery_size, after.gallery_size) == (6, 5)
    mine = sum(shot.photo.person == "p002" for shot in shots) - 1
    assert mine > 0
    assert after.rank1.errors >= before.rank1.errors + mine - before.points[0].mistaken
    assert after.points[0].fnir.trials == before.points[0].fnir.trials
    assert [failure.file for failure in after.failures] == ["p002/0.jpg"]
    assert after.notes == (
        "1 person could not be enrolled from the first photo; the others of these people count as missed.",
    )


def test_nobody_to_measure_on_is_said() -> None:
    lonely = evaluate(made(9, 5, 0, most=1, problems=("",)), CALIBRATION, Plan())
    assert lonely.points[0].fpir.rate is None
    assert lonely.points[0].fnir.rate is None
    assert not lonely.points[0].fpir.supported
    assert lonely.det == ()
    assert len(lonely.notes) == 2
    assert "– ?" in table(lonely)
    nobody = [replace(shot, problem="no_face", embedding=None) for shot in made(9, 5, 5)]
    found = evaluate(nobody, CALIBRATION, Plan())
    assert found.gallery_size == 0
    assert found.points[0].fnir.errors == found.points[0].fnir.trials == found.probes.failed


def test_a_rate_that_the_calibration_cannot_support_is_refused() -> None:
    with pytest.raises(FprUnsupported):
        evaluate(made(1, 3, 3), CALIBRATION, Plan(fprs=(1e-5,)))


def test_a_folder_tells_whose_a_photo_is() -> None:
    files = ["B/x.JPG", "A/deep/y.png", "strangers/1.jpg", "strangers/s/1.jpg", "strangers/s/t/2.webp", "A/notes.txt"]
    placed, ignored = laid_out([*files, "top.jpg", ".git/a.jpg", "A/._y.png", "__MACOSX/A/y.png"])
    assert [(photo.file, photo.person, photo.stranger) for photo in placed] == [
        ("A/deep/y.png", "A", False),
        ("B/x.JPG", "B", False),
        ("strangers/1.jpg", "strangers/1.jpg", True),
        ("strangers/s/1.jpg", "strangers/s", True),
        ("strangers/s/t/2.webp", "strangers/s", True),
    ]
    assert ignored == 2
    assert {photo.person for photo in laid_out(["A/1.jpg", "others/1.jpg"], "others")[0]} == {"A", "others/1.jpg"}
    for wrong in ([], ["a.jpg"], ["strangers/a.jpg"], ["all/A/1.jpg", "all/B/1.jpg"]):
        with pytest.raises(ValueError, match="folder"):
            laid_out(wrong)


def test_groups_are_read_from_a_table() -> None:
    assert read_groups('\ufeffperson-or-file,group\nA,x\n\n"B, jr", y \n') == {"A": "x", "B, jr": "y"}
    assert read_groups("A,x") == {"A": "x"}
    for wrong in ("A", "A,x,y", "A,", "A,x\nA,y", '"A,x'):
        with pytest.raises(ValueError, match=r"^line \d of the groups"):
            read_groups(wrong)


def test_pictures_are_drawn_the_same_each_time() -> None:
    found = evaluate(made(1, 20, 40), CALIBRATION, Plan(fprs=(0.3, 0.1), resamples=5))
    png, svg = pictures.det(found, "png"), pictures.det(found, "svg")
    assert png.startswith(b"\x89PNG\r\n")
    assert svg.startswith(b"<?xml")
    assert b"</svg>" in svg
    assert (png, svg) == (pictures.det(found, "png"), pictures.det(found, "svg"))
    nothing = evaluate(made(9, 5, 0, most=1), CALIBRATION, Plan())
    assert pictures.det(nothing, "svg")
    assert pictures.data_url(nothing, "png").startswith("data:image/png;base64,iVBOR")
