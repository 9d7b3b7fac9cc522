"""The score distributions that ship with a model, from people on whom nothing was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from service.calibration import Calibration, fit_probability, rate_levels, thresholds_at
from service.vision.embedder import Embedder
from training.data import DataError, Layout, Role
from training.metrics import all_pairs, numbered
from training.prepare import Alignment, Prepared, load_prepared

CALIBRATION = "calibration.json"

CELEBA_TERMS = (
    "The photos are CelebA's (Liu et al., ICCV 2015): non-commercial research only, no redistribution. "
    "This file holds statistics of similarity scores, no photo and no embedding."
)

_BATCH = 32


@dataclass(frozen=True)
class Origin:
    """What a calibration says about its photos. ``source``: what they are. ``terms``: what applies to them."""

    source: str
    terms: str


def calibrate(
    model: Path, crops: Path, *, origin: Origin | None = None, threads: int = 1, progress: bool = True
) -> Path:
    """Write ``calibration.json`` into the folder ``model`` of an embedder, and return its path.

    ``crops``: a folder that :func:`training.prepare.prepare` has filled for this embedder's template and
    size. Used are the people of role ``calibration`` in it, and nobody else: thresholds are a promise about
    people whom the network has not seen. ``origin``: may be left out for CelebA's people.

    Every pair of their photos counts. Raises :class:`~training.data.DataError` if the crops are not this
    embedder's, if there is no genuine or no impostor pair, or if the origin of own photos is not told;
    :class:`~service.vision.manifest.ModelError` if the model is unsound.
    """
    embedder = Embedder.load(model, threads)
    prepared = load_prepared(crops)
    require_crops_of(prepared, embedder)
    chosen = prepared.where(Role.CALIBRATION)
    # The promise of this file rests on it, whatever the selection above may become.
    if any(prepared.rows[i].photo.role is not Role.CALIBRATION for i in chosen):
        raise AssertionError("a photo of another role is among the calibration photos")
    people = numbered([prepared.rows[i].photo.identity for i in chosen])
    identities = len(np.unique(people))
    if identities < 2 or identities == len(chosen):
        raise DataError(f"{crops}: calibration needs two people or more, and two photos of one at least")
    embeddings = embed(embedder, prepared, chosen, progress=progress)
    nobody = np.empty((0, embedder.dimension), np.float32), np.empty(0, np.int32)
    genuine, impostor = all_pairs(embeddings, people, *nobody)
    slope, intercept = fit_probability(genuine.similarity, impostor.similarity)
    levels = rate_levels(len(impostor))
    origin = origin or _celeba_origin(prepared, identities)
    calibration = Calibration(
        model_id=embedder.model_id,
        model_sha256=embedder.manifest.sha256,
        source=origin.source,
        terms=origin.terms,
        identities=identities,
        images=len(chosen),
        genuine_pairs=len(genuine),
        impostor_pairs=len(impostor),
        fmr=tuple(levels.tolist()),
        threshold=tuple(thresholds_at(impostor.similarity, levels).tolist()),
        slope=slope,
        intercept=intercept,
    )
    path = model / CALIBRATION
    part = path.with_name(path.name + ".part")
    part.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def embed(
    embedder: Embedder, prepared: Prepared, indices: NDArray[np.intp], *, progress: bool = True
) -> NDArray[np.float32]:
    """Embeddings ``float32[N, D]``, L2-normalised, of the crops with these indices, in their order."""
    embeddings = np.empty((len(indices), embedder.dimension), dtype=np.float32)
    for start in tqdm(range(0, len(indices), _BATCH), unit="batch", disable=not progress):
        batch = indices[start : start + _BATCH]
        embeddings[start : start + len(batch)] = embedder.embed(np.asarray(prepared.crops[batch]))
    return embeddings


def require_crops_of(prepared: Prepared, embedder: Embedder) -> None:
    """Raise :class:`~training.data.DataError` unless the crops have the embedder's template and size."""
    manifest, settings = embedder.manifest, prepared.summary.settings
    template = tuple((float(x), float(y)) for x, y in manifest.template.points)
    if settings.size != manifest.input.size or settings.template != template:
        raise DataError(f"{prepared.folder} holds crops for another template than that of {manifest.model_id}")


def _celeba_origin(prepared: Prepared, identities: int) -> Origin:
    settings = prepared.summary.settings
    if settings.layout is not Layout.CELEBA:
        raise DataError("say where the photos come from, and their terms (--source, --terms)")
    if settings.alignment is not Alignment.EYE_LINE or settings.like_queries:
        raise DataError(f"{prepared.folder} holds crops of an experiment, not such as the service cuts")
    return Origin(f"CelebA, {identities} people held out: nothing was trained on them", CELEBA_TERMS)
