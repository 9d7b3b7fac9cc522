"""How good a network is while it learns, on the photos that choices may rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from training.augment import normalised, views
from training.backbone import Backbone
from training.batches import require_training_crops
from training.data import DataError, Photo, Role, Split
from training.metrics import numbered, pairs_among, rates
from training.prepare import Prepared

CENTROID_PHOTOS = 5
"""Training photos of each person whose mean is its centroid while a run goes on; at its end it is all of them."""

_BATCH = 128


class Score(BaseModel):
    """What a network reaches.

    ``accuracy``: of the classifier, None if the objective has none; ``centroid_accuracy``: of the nearest mean of
    training embeddings, by cosine; both on the ``class`` people's photos of ``split``. ``tpr``: by FPR, over all pairs
    of photos of the ``validation`` people, of whom nothing was learned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Split
    photos: int
    accuracy: float | None
    centroid_accuracy: float
    tpr: dict[str, float]


@dataclass(frozen=True)
class Embedded:
    """What a network makes of the photos by which it is judged, ``float32[N, D]`` each, not of unit length.

    ``known``: those of ``split`` of the ``class`` people, with their rows in ``photos``; ``strangers``: of the
    ``validation`` people, with their ``stranger_names``; ``centroids``: mean training embedding of each of ``names``,
    of unit length.
    """

    split: Split
    photos: tuple[Photo, ...]
    known: Tensor
    stranger_names: tuple[str, ...]
    strangers: Tensor
    names: tuple[str, ...]
    centroids: Tensor


def embedded(
    network: Backbone, prepared: Prepared, size: int, split: Split, centroid_photos: int | None = None
) -> Embedded:
    """Embed what is needed of a folder of training crops; ``network`` is put into evaluation mode.

    ``centroid_photos``: at most so many for each person, the first by file; None for all. Raises
    :class:`~training.data.DataError` if photos that are needed are missing.
    """
    require_training_crops(prepared)
    chosen = [i for i in prepared.where(Role.CLASS) if prepared.rows[i].photo.split is split]
    unseen = list(prepared.where(Role.VALIDATION))
    taken: dict[str, list[int]] = {}
    for i in prepared.where(Role.CLASS):
        photo = prepared.rows[i].photo
        if photo.split is Split.TRAIN and len(taken.setdefault(photo.identity, [])) != centroid_photos:
            taken[photo.identity].append(int(i))
    if not chosen or not unseen or not taken:
        raise DataError(f"{prepared.folder} has no photos of the class and validation people to choose by")
    network.eval()
    embeddings = embed(network, prepared, [*chosen, *unseen, *(i for own in taken.values() for i in own)], size)
    known, strangers, taught = torch.split(embeddings, [len(chosen), len(unseen), sum(map(len, taken.values()))])
    parts = torch.split(taught, [len(own) for own in taken.values()])
    return Embedded(
        split,
        tuple(prepared.rows[i].photo for i in chosen),
        known,
        tuple(prepared.rows[i].photo.identity for i in unseen),
        strangers,
        tuple(taken),
        centroids(parts),
    )


def centroids(people: Iterable[Tensor]) -> Tensor:
    """``float32[P, D]``, the mean direction of each person's embeddings ``float32[N, D]``, of unit length."""
    return F.normalize(torch.stack([F.normalize(own).mean(dim=0) for own in people]))


def centroid_accuracy(embeddings: Tensor, truth: Sequence[str], means: Tensor, names: Sequence[str]) -> float:
    """Share of ``embeddings``, ``float32[N, D]``, whose nearest of ``means``, by cosine, has the name in ``truth``."""
    return _right(F.normalize(embeddings) @ means.T, truth, names)


def score(faces: Embedded, scores: Callable[[Tensor], Tensor] | None, people: Sequence[str]) -> Score:
    """Measure a network by its embeddings. ``scores``: its classifier for the ``people``, in their order."""
    truth = [photo.identity for photo in faces.photos]
    accuracy = None
    if scores is not None:
        with torch.no_grad():
            accuracy = _right(scores(faces.known), truth, people)
    strangers = F.normalize(faces.strangers).numpy()
    genuine, impostor = pairs_among(strangers, numbered(faces.stranger_names))
    found = rates(genuine.similarity, impostor.similarity, (0.1, 0.01, 0.001))
    return Score(
        split=faces.split,
        photos=len(truth),
        accuracy=accuracy,
        centroid_accuracy=centroid_accuracy(faces.known, truth, faces.centroids, faces.names),
        tpr={f"{rate.fpr:g}": rate.tpr for rate in found},
    )


def embed(network: Backbone, prepared: Prepared, indices: Sequence[int] | NDArray[np.intp], size: int) -> Tensor:
    """``float32[N, D]``, not of unit length, of plain views of the crops with these indices, plus their mirror images'.

    The two are added, as the service does with models whose manifest says ``flip``.
    """
    device = next(network.parameters()).device
    found = []
    for start in range(0, len(indices), _BATCH):
        part = np.asarray(indices[start : start + _BATCH])
        batch = normalised(views(torch.from_numpy(np.asarray(prepared.crops[part])), size)).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            both = network(batch).float() + network(batch.flip(3)).float()
        found.append(both.cpu())
    return torch.cat(found)


def _right(surety: Tensor, truth: Sequence[str], names: Sequence[str]) -> float:
    """Share of the rows of ``float32[N, P]`` whose largest value is that of the name in ``truth``."""
    best = surety.argmax(dim=1)
    return float(np.mean([names[int(place)] == name for place, name in zip(best, truth, strict=True)]))
