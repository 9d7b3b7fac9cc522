"""The score distributions that ship with a model, from people on whom nothing was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from service.calibration import Calibration, fit_probability
from service.domain import Crop
from service.vision.embedder import Embedder
from training.data import DataError, Layout, Photo, Role
from training.impostors import Sample, effective_templates, fmr_curve, spread_of_strangers
from training.metrics import Pairs, pairs_among
from training.prepare import Alignment, Prepared, load_prepared

CALIBRATION = "calibration.json"

CELEBA_TERMS = (
    "The photos are CelebA's (Liu et al., ICCV 2015): non-commercial research only, no redistribution. "
    "This file holds statistics of similarity scores, no photo and no embedding."
)

_BEYOND = 0.01
"""How far below what the sample supports a rate may be asked: two powers of ten, of the FMR at which 30 pairs of
people match, and of one stranger among those there are."""

_BATCH = 32
_DIGITS = 7


@dataclass(frozen=True)
class Origin:
    """What a calibration says about its photos. ``source``: what they are. ``terms``: what applies to them."""

    source: str
    terms: str


def calibrate(
    model: Path,
    crops: Path | Sequence[Path],
    *,
    origin: Origin | None = None,
    threads: int = 1,
    progress: bool = True,
) -> Path:
    """Write ``calibration.json`` into the folder ``model`` of an embedder, and return its path.

    ``crops``: folders that :func:`training.prepare.prepare` has filled for this embedder's template and size,
    one for each look of the same people's photos, such as whole and cut tight; photos of two looks are not
    compared. Used are the people of role ``calibration`` in it, and nobody else: thresholds are a promise about
    people whom the network has not seen. ``origin``: may be left out for CelebA's people.

    Every pair of their photos counts. Raises :class:`~training.data.DataError` if the crops are not this
    embedder's, if there is no genuine or no impostor pair, or if the origin of own photos is not told;
    :class:`~service.vision.manifest.ModelError` if the model is unsound.
    """
    folders = [crops] if isinstance(crops, Path) else list(crops)
    embedder = Embedder.load(model, threads)
    looks = [load_prepared(folder) for folder in folders]
    for prepared in looks:
        require_crops_of(prepared, embedder)
    samples, images = _samples(embedder, looks, progress=progress)
    identities = len(np.unique(np.concatenate([sample.people for sample in samples])))
    pairs = [pairs_among(sample.embeddings, sample.people) for sample in samples]
    genuine, impostor = _joined([one for one, _ in pairs]), _joined([other for _, other in pairs])
    slope, intercept = fit_probability(genuine.similarity, impostor.similarity)
    curve = fmr_curve(impostor)
    templates, effective = effective_templates(samples)
    origin = origin or _celeba_origin(looks, identities)
    calibration = Calibration(
        model_id=embedder.model_id,
        model_sha256=embedder.manifest.sha256,
        source=origin.source,
        terms=origin.terms,
        identities=identities,
        images=images,
        genuine_pairs=len(genuine),
        impostor_pairs=len(impostor),
        supported_fmr=curve.supported,
        smallest_fmr=min(curve.supported * _BEYOND, 0.5),
        smallest_fpir=min(_BEYOND / identities, 0.5),
        fmr=tuple(curve.fmr.tolist()),
        threshold=tuple(np.round(curve.threshold, _DIGITS).tolist()),
        low=tuple(np.round(curve.low, _DIGITS).tolist()),
        high=tuple(np.round(curve.high, _DIGITS).tolist()),
        templates=templates,
        effective=effective,
        spread=spread_of_strangers(samples),
        slope=slope,
        intercept=intercept,
    )
    path = model / CALIBRATION
    part = path.with_name(path.name + ".part")
    part.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def embed(
    embedder: Embedder,
    prepared: Prepared,
    indices: NDArray[np.intp],
    *,
    look: Callable[[Crop, Photo], Crop] | None = None,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Embeddings ``float32[N, D]``, L2-normalised, of the crops with these indices, in their order.

    ``look``: what is done to each crop first.
    """
    embeddings = np.empty((len(indices), embedder.dimension), dtype=np.float32)
    for start in tqdm(range(0, len(indices), _BATCH), unit="batch", disable=not progress):
        batch = indices[start : start + _BATCH]
        crops = np.asarray(prepared.crops[batch])
        if look is not None:
            crops = np.stack([look(crop, prepared.rows[i].photo) for crop, i in zip(crops, batch, strict=True)])
        embeddings[start : start + len(batch)] = embedder.embed(crops)
    return embeddings


def require_crops_of(prepared: Prepared, embedder: Embedder) -> None:
    """Raise :class:`~training.data.DataError` unless the crops have the embedder's template and size."""
    manifest, settings = embedder.manifest, prepared.summary.settings
    template = tuple((float(x), float(y)) for x, y in manifest.template.points)
    if settings.size != manifest.input.size or settings.template != template:
        raise DataError(f"{prepared.folder} holds crops for another template than that of {manifest.model_id}")


def _samples(embedder: Embedder, looks: Sequence[Prepared], *, progress: bool) -> tuple[list[Sample], int]:
    """The embeddings of the calibration people in each look, and the number of crops in all."""
    chosen = [prepared.where(Role.CALIBRATION) for prepared in looks]
    names = [[p.rows[i].photo.identity for i in indices] for p, indices in zip(looks, chosen, strict=True)]
    numbers = {name: number for number, name in enumerate(sorted({name for look in names for name in look}))}
    for prepared, indices, look in zip(looks, chosen, names, strict=True):
        # The promise of this file rests on it, whatever the selection above may become.
        if any(prepared.rows[i].photo.role is not Role.CALIBRATION for i in indices):
            raise AssertionError("a photo of another role is among the calibration photos")
        if len(set(look)) < 2 or len(set(look)) == len(look):
            raise DataError(f"{prepared.folder}: calibration needs two people or more, and two photos of one at least")
    samples = [
        Sample(embed(embedder, prepared, indices, progress=progress), np.array([numbers[n] for n in look], np.int32))
        for prepared, indices, look in zip(looks, chosen, names, strict=True)
    ]
    return samples, sum(map(len, chosen))


def _joined(looks: Sequence[Pairs]) -> Pairs:
    return Pairs(
        np.concatenate([pairs.similarity for pairs in looks]),
        np.concatenate([pairs.first for pairs in looks]),
        np.concatenate([pairs.second for pairs in looks]),
    )


def _celeba_origin(looks: Sequence[Prepared], identities: int) -> Origin:
    for prepared in looks:
        settings = prepared.summary.settings
        if settings.layout is not Layout.CELEBA:
            raise DataError("say where the photos come from, and their terms (--source, --terms)")
        if settings.alignment is not Alignment.EYE_LINE:
            raise DataError(f"{prepared.folder} holds crops of an experiment, not such as the service cuts")
    tight = sum(prepared.summary.settings.like_queries for prepared in looks)
    how = "photos as they are" if not tight else "photos cut tight" if tight == len(looks) else "whole and cut tight"
    return Origin(f"CelebA, {identities} people held out: nothing was trained on them; {how}", CELEBA_TERMS)
