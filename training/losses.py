"""The objectives that an embedder can learn, as parts to be swapped.

Each is a module that takes embeddings ``float32[N, D]``, not of unit length, labels ``int64[N]``, and how far the run
has come, 0…1, and gives the loss, a mean over the batch. Faces without a name have the label −1 and do not count.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

NOBODY = -1
"""The label of a face without a name."""


class CrossEntropyConfig(BaseModel):
    """A linear classifier and softmax. ``smoothing``: of the labels (Szegedy et al. 2016, arXiv:1512.00567).

    ``neck``: see :class:`Neck`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cross-entropy"]
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    neck: bool = False


class ArcFaceConfig(BaseModel):
    """See :class:`ArcFace`. ``margin``: radians. ``warm_up``: share of the run in which it rises from 0.

    ``neck``: see :class:`Neck`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["arcface"]
    margin: Annotated[float, Field(ge=0, lt=math.pi / 2)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 32.0
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.2
    neck: bool = False


class TripletConfig(BaseModel):
    """See :class:`Triplet`. ``margin``: of the squared distance of unit vectors, 0…4."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["triplet"]
    margin: Annotated[float, Field(gt=0, le=4)] = 0.3
    mining: Literal["batch-hard", "semi-hard"] = "batch-hard"


LossConfig: TypeAlias = Annotated[CrossEntropyConfig | ArcFaceConfig | TripletConfig, Field(discriminator="kind")]


class Neck(nn.Module):
    """Unit vectors, then batch normalisation without learned numbers: what a classifier reads in place of embeddings.

    Embeddings that imitate another network's lie where its do, all within a narrow cone; a classifier tells them apart
    around their mean, and need not spread them for it (the BNNeck of Luo et al. 2019, "Bag of tricks and a strong
    baseline for deep person re-identification", arXiv:1903.07071).
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(dimension, affine=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """``float32[N, D]`` to ``float32[N, D]`` of mean 0 and variance 1, over all faces, named or not."""
        normalised: Tensor = self.normalise(F.normalize(embeddings))
        return normalised


class CrossEntropy(nn.Module):
    """Softmax over a linear classifier of C people."""

    def __init__(self, config: CrossEntropyConfig, dimension: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dimension, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.smoothing = config.smoothing
        self.neck = Neck(dimension) if config.neck else nn.Identity()

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The loss of named faces."""
        return _cross_entropy(self.scores(embeddings), labels, self.smoothing)

    def scores(self, embeddings: Tensor) -> Tensor:
        """``float32[N, C]``: the highest is the person."""
        scores: Tensor = self.classifier(self.neck(embeddings))
        return scores


class ArcFace(nn.Module):
    """Softmax over ``scale`` times the cosine to each of C centres, the own centre's angle widened by ``margin``.

    Deng et al. 2019, "ArcFace", CVPR (arXiv:1801.07698), equation 3. Beyond π − margin, where the cosine would rise
    again, the cosine less a constant takes over, as in the authors' code.
    """

    def __init__(self, config: ArcFaceConfig, dimension: int, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(classes, dimension) * 0.01)
        self.config = config
        self.neck = Neck(dimension) if config.neck else nn.Identity()

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The loss of named faces, with the margin that the run has come to."""
        margin = self.config.margin
        if self.config.warm_up > 0:
            margin *= min(1.0, progress / self.config.warm_up)
        cosine = self._cosines(embeddings)
        named = labels != NOBODY
        own = cosine.gather(1, labels.clamp(min=0)[:, None])
        # Slightly inside −1…1, where the sine has a gradient.
        sine = torch.sqrt((1 - own.square()).clamp(min=1e-9))
        widened = own * math.cos(margin) - sine * math.sin(margin)
        widened = torch.where(own > -math.cos(margin), widened, own - margin * math.sin(margin))
        logits = cosine.scatter(1, labels.clamp(min=0)[:, None], widened)
        return _cross_entropy(self.config.scale * logits, torch.where(named, labels, NOBODY), 0.0)

    def scores(self, embeddings: Tensor) -> Tensor:
        """``float32[N, C]``, ``scale`` times the cosines: the highest is the person."""
        return self.config.scale * self._cosines(embeddings)

    def _cosines(self, embeddings: Tensor) -> Tensor:
        return F.normalize(self.neck(embeddings)) @ F.normalize(self.centres).T


class Triplet(nn.Module):
    """Another photo of the anchor's person is to be nearer than one of anybody else, by ``margin``.

    Squared distance of unit vectors, 2 − 2 cos (Schroff et al. 2015, "FaceNet", arXiv:1503.03832), hinge, mean over
    the triplets. ``batch-hard``: each anchor with its farthest positive and its nearest negative (Hermans et al. 2017,
    arXiv:1703.07737). ``semi-hard``: each pair of anchor and positive with the nearest negative that is farther than
    the positive, or else with the farthest negative (FaceNet, section 3.2). Anchors without a partner do not count.
    """

    def __init__(self, config: TripletConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The mean loss of the batch's triplets; 0 without one."""
        unit = F.normalize(embeddings)
        distance = 2 - 2 * unit @ unit.T
        same = (labels[:, None] == labels) & (labels != NOBODY)
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        negative = ~same & (labels != NOBODY) & (labels != NOBODY)[:, None]
        mine = _batch_hard if self.config.mining == "batch-hard" else _semi_hard
        gaps = mine(distance, positive, negative)
        return F.relu(gaps + self.config.margin).mean() if len(gaps) else embeddings.sum() * 0.0


Objective: TypeAlias = CrossEntropy | ArcFace | Triplet


def make_objective(config: LossConfig, dimension: int, classes: int) -> Objective:
    """The objective of a configuration, for embeddings of ``dimension`` numbers and ``classes`` people."""
    match config:
        case CrossEntropyConfig():
            return CrossEntropy(config, dimension, classes)
        case ArcFaceConfig():
            return ArcFace(config, dimension, classes)
        case TripletConfig():
            return Triplet(config)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if not bool((labels != NOBODY).any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels, ignore_index=NOBODY, label_smoothing=smoothing)


def _batch_hard(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    usable = positive.any(dim=1) & negative.any(dim=1)
    farthest = distance.masked_fill(~positive, -math.inf).amax(dim=1)
    nearest = distance.masked_fill(~negative, math.inf).amin(dim=1)
    return (farthest - nearest)[usable]


def _semi_hard(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    anchors, partners = torch.nonzero(positive & negative.any(dim=1, keepdim=True), as_tuple=True)
    own = distance[anchors, partners]
    others, allowed = distance[anchors], negative[anchors]
    beyond = others.masked_fill(~(allowed & (others > own[:, None])), math.inf).amin(dim=1)
    farthest = others.masked_fill(~allowed, -math.inf).amax(dim=1)
    return own - torch.where(torch.isfinite(beyond), beyond, farthest)
