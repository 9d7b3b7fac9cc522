"""The service's evaluation of somebody's own photos, from crops that were cut beforehand.

The counts are those of ``vultus evaluate`` on the same folder: the same arithmetic (:mod:`service.evaluation`), from
crops of the same faces.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from service.calibration import Calibration
from service.domain import Evaluation
from service.evaluation import STRANGERS, Plan, Shot, laid_out
from service.evaluation import evaluate as evaluate_shots
from service.vision.embedder import Embedder
from training.calibrate import CALIBRATION, embed, require_crops_of
from training.data import DataError, Layout
from training.prepare import Acquired, load_prepared


def identification(
    model: Path,
    crops: Path,
    plan: Plan,
    *,
    strangers: str = STRANGERS,
    threads: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Evaluate the embedder in the folder ``model`` with its ``calibration.json``, whatever the people's role.

    ``crops``: a folder that :func:`training.prepare.prepare` has filled from the layout ``folders``, like the service.
    ``strangers``: the name of the strangers' folder.

    Raises :class:`~training.data.DataError` if the crops are others, or not this embedder's;
    :class:`~service.errors.FprUnsupported` if the calibration cannot support the rates.
    """
    embedder = Embedder.load(model, threads)
    calibration = Calibration.load(model / CALIBRATION)
    if calibration.model_sha256 != embedder.manifest.sha256:
        raise DataError(f"{model / CALIBRATION} was made for other weights; run `vultus-train calibrate` again")
    prepared = load_prepared(crops)
    require_crops_of(prepared, embedder)
    settings = prepared.summary.settings
    if settings.layout is not Layout.FOLDERS or not settings.like_service:
        raise DataError(f"{crops} was not prepared with --layout folders --like-service")
    rows = {row.photo.file: (index, row) for index, row in enumerate(prepared.rows)}
    try:
        photos, ignored = laid_out(rows, strangers)
    except ValueError as error:
        raise DataError(f"In {crops} {error}.") from None
    seen = [photo for photo in photos if rows[photo.file][1].acquired is not Acquired.NONE]
    embeddings = embed(
        embedder, prepared, np.array([rows[photo.file][0] for photo in seen], np.intp), progress=progress
    )
    of = dict(zip((photo.file for photo in seen), embeddings, strict=True))
    shots = [Shot(photo, rows[photo.file][1].problem, of.get(photo.file)) for photo in photos]
    return evaluate_shots(shots, calibration, replace(plan, ignored=ignored))
