from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from service.calibration import Calibration
from service.vision.embedder import Embedder
from training.calibrate import CALIBRATION, Origin, calibrate
from training.data import DataError, Layout, Role, celeba_photos, folder_photos
from training.prepare import Alignment, Target, load_prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of dlib-resnet without calibration."""
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "dlib-resnet", folder, ignore=shutil.ignore_patterns(CALIBRATION))
    return folder


def only(roles: list[Role], celeba: Path, out: Path, alignment: Alignment = Alignment.EYE_LINE) -> Path:
    prepare(
        celeba_photos(celeba, roles),
        celeba,
        out,
        layout=Layout.CELEBA,
        target=Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        alignment=alignment,
        progress=False,
    )
    return out


def test_the_scores_are_those_of_every_pair_of_calibration_people(model: Path, prepared: Path) -> None:
    calibration = Calibration.load(calibrate(model, prepared, progress=False))
    done = load_prepared(prepared)
    rows = [(row.photo.identity, crop) for row, crop in zip(done.rows, done.crops, strict=True)]
    rows = [(person, crop) for person, crop in rows if person in ("13", "14")]
    embedder = Embedder.load(model)
    vectors = [embedder.embed(np.asarray(crop)[None])[0].astype(np.float64) for _, crop in rows]
    scores: dict[bool, list[float]] = {True: [], False: []}
    for (a, u), (b, v) in combinations(zip([person for person, _ in rows], vectors, strict=True), 2):
        scores[a == b].append(float(u @ v))
    assert (calibration.identities, calibration.images) == (2, 7)
    assert (calibration.genuine_pairs, calibration.impostor_pairs) == (len(scores[True]), len(scores[False])) == (9, 12)
    # Seven photos of two people say little: everything but the largest rates is modelled.
    assert calibration.supported_fmr == 1 and calibration.at_fmr(0.5)[1]
    assert calibration.threshold[0] == pytest.approx(min(scores[False]), abs=1e-5)
    assert calibration.threshold[-1] >= max(scores[False]) - 1e-5
    assert calibration.smallest_fmr == 0.01 and calibration.smallest_fpir == 0.005
    assert calibration.probability(min(scores[True])) > 0.5 > calibration.probability(max(scores[False]))


def test_it_belongs_to_the_weights_and_says_where_it_comes_from(model: Path, prepared: Path) -> None:
    calibration = Calibration.load(calibrate(model, prepared, progress=False))
    manifest = json.loads((model / "manifest.json").read_text())
    assert calibration.model_id == manifest["model_id"]
    assert calibration.model_sha256 == manifest["sha256"]
    assert calibration.source == "CelebA, 2 people held out: nothing was trained on them; photos as they are"
    assert "non-commercial research" in calibration.terms


def test_no_other_people_play_a_part(model: Path, celeba: Path, prepared: Path, tmp_path: Path) -> None:
    everybody = calibrate(model, prepared, progress=False).read_bytes()
    alone = only([Role.CALIBRATION], celeba, tmp_path / "crops")
    assert calibrate(model, alone, progress=False).read_bytes() == everybody
    others = only([role for role in Role if role is not Role.CALIBRATION], celeba, tmp_path / "others")
    with pytest.raises(DataError, match="needs two people"):
        calibrate(model, others, progress=False)
    assert (model / CALIBRATION).read_bytes() == everybody


def test_two_looks_of_the_same_people_are_counted_together(model: Path, prepared: Path) -> None:
    once = Calibration.load(calibrate(model, prepared, progress=False))
    twice = Calibration.load(calibrate(model, [prepared, prepared], progress=False))
    assert (twice.identities, twice.images) == (2, 14)
    assert twice.impostor_pairs == 2 * once.impostor_pairs
    assert twice.threshold[0] == once.threshold[0]


def test_a_slip_in_the_selection_is_caught(model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = np.arange(len(load_prepared(prepared).rows))
    monkeypatch.setattr("training.prepare.Prepared.where", lambda self, *roles: everything)
    with pytest.raises(AssertionError, match="another role"):
        calibrate(model, prepared, progress=False)
    assert not (model / CALIBRATION).exists()


def test_crops_of_another_template_or_alignment_are_refused(
    model: Path, celeba: Path, prepared: Path, tmp_path: Path
) -> None:
    crops = only([Role.CALIBRATION], celeba, tmp_path / "crops", Alignment.LEAST_SQUARES)
    with pytest.raises(DataError, match="not such as the service cuts"):
        calibrate(model, crops, progress=False)
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["template"]["nose"][1] += 1
    (model / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another template"):
        calibrate(model, prepared, progress=False)


def test_own_photos_need_an_origin(model: Path, celeba: Path, tmp_path: Path) -> None:
    data = tmp_path / "people"
    for photo in celeba_photos(celeba, [Role.CALIBRATION]):
        (data / photo.identity).mkdir(parents=True, exist_ok=True)
        shutil.copy(celeba / photo.file, data / photo.identity)
    crops = tmp_path / "crops"
    prepare(
        folder_photos(data, Role.CALIBRATION),
        data,
        crops,
        layout=Layout.FOLDERS,
        target=Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        progress=False,
    )
    with pytest.raises(DataError, match="--source"):
        calibrate(model, crops, progress=False)
    path = calibrate(model, crops, origin=Origin("our gate", "ours"), progress=False)
    assert (Calibration.load(path).source, Calibration.load(path).terms) == ("our gate", "ours")
