from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

from service.calibration import Calibration
from service.vision.embedder import Embedder
from training.cli import app
from training.data import DataError, Layout, Role, celeba_photos
from training.evaluate import (
    EvaluationSet,
    Figures,
    asked_table,
    draw,
    evaluate,
    read_figures,
    table,
    update_document,
    write_figures,
)
from training.metrics import FPRS
from training.prepare import Counts, Target, load_prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
MODEL = MODELS / "dlib-resnet"


@pytest.fixture(scope="module")
def figures(prepared: Path) -> Figures:
    return evaluate(MODEL, prepared, resamples=20, progress=False)


def scores(prepared: Path, role: Role, stranger: Role | None) -> tuple[list[float], list[float]]:
    """Genuine and impostor similarities by the definition of the protocol, pair by pair."""
    done = load_prepared(prepared)
    embedder = Embedder.load(MODEL)
    vectors: dict[Role, list[tuple[str, np.ndarray]]] = {photo_role: [] for photo_role in Role}
    for row, crop in zip(done.rows, done.crops, strict=True):
        vectors[row.photo.role].append((row.photo.identity, embedder.embed(np.asarray(crop)[None])[0]))
    genuine = [float(u @ v) for (a, u), (b, v) in combinations(vectors[role], 2) if a == b]
    impostor = [float(u @ v) for (a, u), (b, v) in combinations(vectors[role], 2) if a != b]
    if stranger is not None:
        impostor += [float(u @ v) for _, u in vectors[role] for _, v in vectors[stranger]]
    return genuine, impostor


@pytest.mark.parametrize(
    ("on", "role", "stranger"),
    [
        (EvaluationSet.CELEBA_IR, Role.QUERY, Role.DISTRACTOR),
        (EvaluationSet.VALIDATION, Role.VALIDATION, None),
    ],
)
def test_figures_follow_the_protocol(prepared: Path, on: EvaluationSet, role: Role, stranger: Role | None) -> None:
    found = evaluate(MODEL, prepared, on, resamples=0, progress=False)
    genuine, impostor = scores(prepared, role, stranger)
    assert (found.genuine_pairs, found.impostor_pairs) == (len(genuine), len(impostor))
    assert [point.fpr for point in found.points] == list(FPRS)
    for point in found.points:
        threshold = float(np.quantile(impostor, 1 - point.fpr))
        assert point.threshold == pytest.approx(threshold, abs=1e-5)
        assert point.tpr == pytest.approx(np.mean(np.array(genuine) > threshold), abs=1e-6)
        assert point.low is None
    assert found.curve_fpr[-1] == 1.0


def test_what_was_compared_is_told(figures: Figures, prepared: Path) -> None:
    assert (figures.people, figures.photos, figures.others, figures.other_photos) == (2, 12, 1, 4)
    assert figures.genuine_pairs == 9 * 8 // 2 + 3 * 2 // 2
    assert figures.impostor_pairs == 9 * 3 + 12 * 4
    assert figures.acquired == load_prepared(prepared).counts(Role.QUERY, Role.DISTRACTOR)
    assert figures.acquired.fallback >= 1
    assert (figures.model_id, figures.flip, figures.on) == ("dlib-resnet", True, EvaluationSet.CELEBA_IR)


def test_flip_can_be_compared_on_validation_only(prepared: Path) -> None:
    with_flip, without = (
        evaluate(MODEL, prepared, EvaluationSet.VALIDATION, flip=flip, resamples=0, progress=False)
        for flip in (True, False)
    )
    assert (with_flip.flip, without.flip) == (True, False)
    assert with_flip.points[0].threshold != without.points[0].threshold
    with pytest.raises(DataError, match="compare on validation"):
        evaluate(MODEL, prepared, flip=False, progress=False)


def test_crops_without_the_people_are_refused(celeba: Path, tmp_path: Path) -> None:
    prepare(
        celeba_photos(celeba, [Role.QUERY]),
        celeba,
        tmp_path,
        layout=Layout.CELEBA,
        target=Target.of(MODEL),
        detector=MODELS / "centerface",
        progress=False,
    )
    with pytest.raises(DataError, match="no faces of the role distractor"):
        evaluate(MODEL, tmp_path, progress=False)


def test_figures_come_back_as_they_were_written(figures: Figures, tmp_path: Path) -> None:
    assert write_figures(figures, tmp_path).name == "dlib-resnet.celebA_ir.json"
    assert read_figures(tmp_path, EvaluationSet.CELEBA_IR) == [figures]
    assert read_figures(tmp_path, EvaluationSet.VALIDATION) == []
    (tmp_path / "other.celebA_ir.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.celebA_ir\.json does not hold figures"):
        read_figures(tmp_path, EvaluationSet.CELEBA_IR)


def test_what_became_of_an_asked_rate_is_counted(figures: Figures, prepared: Path) -> None:
    calibration = Calibration.load(MODEL / "calibration.json")
    _, impostors = scores(prepared, Role.QUERY, Role.DISTRACTOR)
    assert [one.asked for one in figures.asked] == [0.1, 0.01, 0.001]
    for one in figures.asked:
        assert one.threshold == calibration.verification_point(one.asked).threshold
        assert one.fmr == pytest.approx(np.mean(np.array(impostors) >= one.threshold), abs=1e-6)
    assert f"| {figures.asked[0].asked:g} | {figures.asked[0].threshold:.4f} |" in asked_table(figures)


def test_the_table_has_a_row_for_each_model(figures: Figures) -> None:
    points = tuple(
        point.model_copy(update={"tpr": 0.915, "low": 0.8, "high": 0.95} if point.fpr == 0.01 else {"low": None})
        for point in figures.points
    )
    one = figures.model_copy(update={"points": points, "acquired": Counts(detector=30, fallback=10, none=2)})
    text = table([one, one.model_copy(update={"model_id": "other", "flip": False})])
    lines = text.splitlines()
    assert lines[0] == "| model | FPR 0.5 | FPR 0.2 | FPR 0.1 | FPR 0.05 | FPR 0.01 | FPR 0.001 | fallback |"
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith("| dlib-resnet, flip | ")
    assert "| 91.5 (80.0–95.0) |" in lines[2]
    assert lines[2].endswith("| 23.8 % |")
    assert lines[3].startswith("| other | ")
    assert "12 photos of 2 people; 4 photos of 1 others; 39 genuine and 75 impostor pairs" in text
    assert "No face was found in 2 further photos" in text


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    document = tmp_path / "accuracy.md"
    before, after = "# Über\n\n<!-- figures:celebA_ir -->", "<!-- /figures:celebA_ir -->\n\nend | of it\n"
    document.write_text(f"{before}\nold\n{after}", encoding="utf-8")
    for text in ("new\nlines", "newer"):
        update_document(document, EvaluationSet.CELEBA_IR, text)
        assert document.read_text(encoding="utf-8") == f"{before}\n{text}\n{after}"
    with pytest.raises(DataError, match="no place for figures"):
        update_document(document, EvaluationSet.VALIDATION, "x")
    with pytest.raises(DataError, match="cannot be read"):
        update_document(tmp_path / "missing.md", EvaluationSet.VALIDATION, "x")


def test_the_picture_is_drawn_the_same_way_each_time(figures: Figures, tmp_path: Path) -> None:
    draw([figures, figures.model_copy(update={"model_id": "other"})], tmp_path / "a.png")
    draw([figures, figures.model_copy(update={"model_id": "other"})], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Pillow.open(tmp_path / "a.png") as picture:
        assert picture.size == (880, 605)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_from_photos_to_figures_on_the_command_line(celeba: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("calibration.json"))
    document = tmp_path / "accuracy.md"
    document.write_text("<!-- figures:celebA_ir -->\n<!-- /figures:celebA_ir -->\n")
    crops, out = str(tmp_path / "crops"), str(tmp_path / "figures")
    shared = ["--model", str(model), "--crops", crops]
    run = CliRunner()
    prepared = run.invoke(
        app,
        [
            "prepare",
            "--data",
            str(celeba),
            "--out",
            crops,
            "--model",
            str(model),
            "--detector",
            str(MODELS / "centerface"),
        ],
    )
    assert prepared.exit_code == 0, prepared.output
    assert "further: 2 photos, 1 faces found by the detector, 0 cut by the fallback, 1 left out" in prepared.output
    calibrated = run.invoke(app, ["calibrate", *shared])
    assert calibrated.exit_code == 0, calibrated.output
    assert Calibration.load(model / "calibration.json").images == 7
    evaluated = run.invoke(app, ["evaluate", *shared, "--out", out, "--document", str(document), "--resamples", "5"])
    assert evaluated.exit_code == 0, evaluated.output
    (found,) = read_figures(Path(out), EvaluationSet.CELEBA_IR)
    assert table([found]) in evaluated.output
    assert table([found]) in document.read_text()
    assert (Path(out) / "celebA_ir.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--data", "missing", "--out", "x"], "people.csv cannot be read"),
        (["prepare", "--data", "missing", "--out", "x", "--layout", "folders"], "one --role"),
        (["calibrate", "--crops", "missing"], "missing has no crops"),
        (["calibrate", "--crops", "missing", "--source", "x"], "go together"),
        (["calibrate", "--crops", "missing", "--model", "missing"], "manifest.json cannot be read"),
        (["evaluate", "--crops", "missing"], "missing has no crops"),
        (["evaluate", "--crops", "missing", "--document", "x"], "needs --out"),
        (["convert", "dlib", "--source", "missing.dat", "--out", "x"], "missing.dat"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--model" not in arguments and arguments[0] in ("calibrate", "evaluate"):
        arguments = [*arguments, "--model", str(MODEL)]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
