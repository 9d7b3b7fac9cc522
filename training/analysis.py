"""What a finished network does with the photos of the test split and with people of whom it learned nothing.

Everything that a report draws is kept as numbers in the run's folder, so that it can be drawn without the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.manifold import TSNE
from torch import Tensor

from training.data import Split
from training.metrics import Pairs, curve, numbered, pairs_among
from training.validation import Embedded

BINS: Final = 100
MAPPED: Final = 20
ERRORS: Final = 20

Counts = Annotated[tuple[int, ...], Field(min_length=BINS, max_length=BINS)]


class Similarities(BaseModel):
    """Cosines of pairs of photos. ``genuine``, ``impostor``: counts in 100 equal steps from −1 to 1.

    ``d_prime``: distance of the two means in units of the root of the mean variance (Daugman 2000, "Biometric decision
    landscapes"). ``equal_error_rate``: where FMR and FNMR are equal. ``fpr``, ``tpr``: the curve.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    people: int
    photos: int
    genuine: Counts
    impostor: Counts
    d_prime: float
    equal_error_rate: float
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


class Error(BaseModel):
    """A photo of ``truth`` that the network takes for ``answer``, with the probability or cosine it gives to that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    truth: str
    answer: str
    score: float


class Mapped(BaseModel):
    """One photo in the t-SNE map (van der Maaten & Hinton 2008, JMLR 9)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: str
    x: float
    y: float


class Analysis(BaseModel):
    """``seen``: photos of the split of people learned from. ``unseen``: of the ``validation`` people.

    ``errors``: how many photos of the split are taken for somebody else; ``worst``: the surest of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Split
    seen: Similarities
    unseen: Similarities
    errors: int
    worst: tuple[Error, ...]
    map: tuple[Mapped, ...]


def analyse(faces: Embedded, scores: Callable[[Tensor], Tensor] | None, people: Sequence[str]) -> Analysis:
    """Measure a network by its embeddings.

    ``scores``: classifier of embeddings for ``people``, whose softmax is the surety of an error; without one it is the
    cosine to the nearest centroid of the training photos.
    """
    known = F.normalize(faces.known)
    if scores is not None:
        with torch.no_grad():
            surety, names = scores(faces.known).softmax(dim=1), people
    else:
        surety, names = known @ faces.centroids.T, faces.names
    best, answer = surety.max(dim=1)
    errors = [
        Error(file=photo.file, truth=photo.identity, answer=names[int(place)], score=round(float(value), 4))
        for photo, value, place in zip(faces.photos, best, answer, strict=True)
        if names[int(place)] != photo.identity
    ]
    identities = [photo.identity for photo in faces.photos]
    return Analysis(
        split=faces.split,
        seen=similarities(known.numpy(), identities),
        unseen=similarities(F.normalize(faces.strangers).numpy(), faces.stranger_names),
        errors=len(errors),
        worst=tuple(sorted(errors, key=lambda error: -error.score)[:ERRORS]),
        map=mapped(known.numpy(), identities),
    )


def similarities(embeddings: NDArray[np.float32], identities: Sequence[str]) -> Similarities:
    """All pairs of ``float32[N, D]``, L2-normalised, of these people. Raises ValueError without pairs of both kinds."""
    genuine, impostor = pairs_among(embeddings, numbered(identities))
    fpr, tpr = curve(genuine.similarity, impostor.similarity)
    apart = float(genuine.similarity.mean() - impostor.similarity.mean())
    spread = float(genuine.similarity.var() + impostor.similarity.var()) / 2
    return Similarities(
        people=len(set(identities)),
        photos=len(identities),
        genuine=_histogram(genuine),
        impostor=_histogram(impostor),
        d_prime=round(apart / max(spread, 1e-12) ** 0.5, 4),
        equal_error_rate=round(equal_error_rate(genuine.similarity, impostor.similarity), 6),
        fpr=tuple(float(f"{value:.6g}") for value in fpr),
        tpr=tuple(np.round(tpr, 6).tolist()),
    )


def equal_error_rate(genuine: NDArray[np.float32], impostor: NDArray[np.float32]) -> float:
    """The mean of FMR and FNMR at the threshold where they differ least (ISO/IEC 19795-1)."""
    thresholds = np.unique(np.concatenate([genuine, impostor]))
    missed = np.searchsorted(np.sort(genuine), thresholds, side="left") / len(genuine)
    matched = 1 - np.searchsorted(np.sort(impostor), thresholds, side="left") / len(impostor)
    place = int(np.argmin(np.abs(missed - matched)))
    return float(missed[place] + matched[place]) / 2


def mapped(embeddings: NDArray[np.float32], identities: Sequence[str]) -> tuple[Mapped, ...]:
    """A t-SNE map by cosine distance of the 20 people with most photos (of equals, the first by name)."""
    names, counts = np.unique(np.asarray(identities), return_counts=True)
    kept = names[np.lexsort((names, -counts))][:MAPPED]
    chosen = [place for place, name in enumerate(identities) if name in kept]
    if len(chosen) < 4:
        return ()
    places = TSNE(
        metric="cosine", init="random", perplexity=min(10.0, (len(chosen) - 1) / 3), random_state=0
    ).fit_transform(embeddings[chosen])
    return tuple(
        Mapped(identity=identities[i], x=round(float(x), 3), y=round(float(y), 3))
        for i, (x, y) in zip(chosen, places, strict=True)
    )


def _histogram(pairs: Pairs) -> tuple[int, ...]:
    # Rounding takes some cosines slightly beyond 1.
    counts, _ = np.histogram(np.clip(pairs.similarity, -1, 1), bins=BINS, range=(-1, 1))
    return tuple(counts.tolist())
