"""What the service's guards cost and catch: photos of one enrolment, people enrolled twice, strangers who score high.

Chosen and measured on ``validation``, with people of role ``class`` as the rest of the gallery, cut the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from service.calibration import Calibration
from service.decision import siblings
from service.domain import Crop
from service.drift import StrangerRates
from service.vision.embedder import Embedder
from training.calibrate import CALIBRATION, embed, require_crops_of
from training.data import DataError, Role
from training.metrics import numbered
from training.open_set import People
from training.prepare import Prepared, load_prepared

PHOTOS = (2, 3, 5, 10)
SIBLING_FPRS = (0.2, 0.1, 0.05, 0.03, 0.01)
SIZES = (5, 20, 50, 400)
TEMPLATES = 3
CONFLICT_FPR = 0.001
REPEATS = 20
PROBES = 2000

_POOR_SIZE = 48
_POOR_LIGHT = 0.5
_POOR_NOISE = 8.0
_POOR_QUALITY = 30


@dataclass(frozen=True)
class Look:
    """The same people in one look: ``own`` of role ``validation``, ``others`` of role ``class``."""

    own: People
    others: People


def guards(model: Path, crops: Path, *, repeats: int = REPEATS, threads: int = 1, progress: bool = True) -> str:
    """Measure all three and return them as Markdown tables.

    ``crops``: folder that :func:`training.prepare.prepare` has filled with people of the roles ``validation`` and
    ``class``. Raises :class:`~training.data.DataError` if they are missing or the crops are not this embedder's.
    """
    embedder = Embedder.load(model, threads)
    calibration = Calibration.load(model / CALIBRATION)
    prepared = load_prepared(crops)
    require_crops_of(prepared, embedder)
    good, bad = (
        Look(
            _people(embedder, prepared, Role.VALIDATION, None, poor, progress),
            _people(embedder, prepared, Role.CLASS, TEMPLATES, poor, progress),
        )
        for poor in (False, True)
    )
    return "\n\n".join(
        [
            _table(
                ("photos", "sibling FMR", "right photos refused", "strangers let in"),
                sibling_rows(calibration, good.own, repeats),
            ),
            _table(
                ("subjects", "photos each", "new people refused", "people enrolled twice caught"),
                conflict_rows(calibration, good, repeats),
            ),
            _table(
                ("subjects", "as they are", "probes degraded", "probes and gallery degraded"),
                drift_rows(calibration, good, bad, repeats),
            ),
        ]
    )


def degraded(crop: Crop, generator: np.random.Generator) -> Crop:
    """The look of a cheap camera: a face of 32 pixels in half the light, with noise, as a JPEG file of quality 30."""
    side = crop.shape[0]
    small = cv2.resize(crop, (_POOR_SIZE, _POOR_SIZE), interpolation=cv2.INTER_AREA).astype(np.float32) * _POOR_LIGHT
    noisy = np.clip(small + generator.normal(0, _POOR_NOISE, small.shape), 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, _POOR_QUALITY])
    poor = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return np.asarray(cv2.resize(poor, (side, side)), np.uint8)


def sibling_rows(calibration: Calibration, own: People, repeats: int) -> Iterator[tuple[str, ...]]:
    """Enrolments of k photos of one person, and the same with a stranger's in the place of one.

    Refused: the share of photos that are not among those that stay. Let in: of the strangers' photos.
    """
    for photos in PHOTOS:
        for fpr in SIBLING_FPRS:
            threshold = calibration.subject_point(fpr, photos - 1).threshold
            generator = np.random.default_rng(0)
            refused, right, admitted, strange = 0, 0, 0, 0
            for _ in range(repeats):
                able = [one for one in _drawn(own, generator, photos) if len(one) == photos]
                for place, one in enumerate(able):
                    refused += int((~siblings(one, threshold)).sum())
                    right += photos
                    stranger = able[place - 1][-1:]
                    admitted += int(siblings(np.concatenate([one[:-1], stranger]), threshold)[-1])
                    strange += 1
            yield str(photos), f"{fpr:g}", _share(refused, right), _share(admitted, strange)


def conflict_rows(calibration: Calibration, look: Look, repeats: int) -> Iterator[tuple[str, ...]]:
    """New people with k photos each come to a gallery of others, and to one that has them under another name."""
    for subjects in SIZES:
        for photos in (1, TEMPLATES):
            refused, caught, new = 0, 0, 0
            for repeat in range(repeats):
                generator = np.random.default_rng(repeat)
                gallery = _drawn(look.others, generator, photos)[: subjects - 1]
                held = np.concatenate(gallery)
                threshold = calibration.identification_point(CONFLICT_FPR, subjects, len(held) + photos).threshold
                for one in _drawn(look.own, generator, 2 * photos):
                    if len(one) < 2 * photos:
                        continue
                    new += 1
                    refused += bool((one[:photos] @ held.T).max() >= threshold)
                    caught += bool((one[:photos] @ one[photos:].T).max() >= threshold)
            yield str(len(gallery) + 1), str(photos), _share(refused, new), _share(caught, new)


def drift_rows(calibration: Calibration, good: Look, bad: Look, repeats: int) -> Iterator[tuple[str, ...]]:
    """In how many of ``repeats`` galleries a warning comes up while the own people search it as strangers."""
    for subjects in SIZES:
        counts = [0, 0, 0]
        for repeat in range(repeats):
            for column, (gallery, probes) in enumerate(((good, good), (good, bad), (bad, bad))):
                generator = np.random.default_rng(repeat)
                held = _drawn(gallery.others, generator, TEMPLATES)[:subjects]
                templates = np.concatenate(held)
                best = (probes.own.embeddings @ templates.T).max(axis=1)
                rates = StrangerRates()
                warned = False
                for place in generator.integers(len(best), size=PROBES):
                    rates.add(calibration.identification_rate(float(best[place]), len(held), len(templates)))
                    warned = warned or rates.drifted(len(held))
                counts[column] += warned
        yield (str(len(held)), *(f"{count} of {repeats}" for count in counts))


def _people(embedder: Embedder, prepared: Prepared, role: Role, most: int | None, poor: bool, progress: bool) -> People:
    chosen = prepared.where(role)
    if not len(chosen):
        raise DataError(f"{prepared.folder}: there is nobody of the role {role}")
    people = numbered([prepared.rows[i].photo.identity for i in chosen])
    taken = np.concatenate([np.flatnonzero(people == one)[:most] for one in range(int(people.max()) + 1)])
    chosen, people = chosen[taken], people[taken]
    generator = np.random.default_rng(0)
    look = (lambda crop, _: degraded(crop, generator)) if poor else None
    return People(embed(embedder, prepared, chosen, look=look, progress=progress), people)


def _drawn(people: People, generator: np.random.Generator, most: int) -> list[NDArray[np.float32]]:
    """Up to ``most`` photos of each person, ``float32[N, D]`` each, people and photos in a random order."""
    photos = people.drawn(generator)
    return [people.embeddings[photos[one][:most]] for one in generator.permutation(len(photos))]


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}".replace("%", " %")


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
