"""What a network learns from another one that already knows faces: its embeddings of the same views.

Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network" (arXiv:1503.02531), with embeddings in place
of class scores, which need no names; and Park et al. 2019, "Relational knowledge distillation", CVPR
(arXiv:1904.05068), with cosines in place of distances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from service.vision.embedder import Embedder
from training.augment import resized

Weight = Annotated[float, Field(ge=0)]


class DistillConfig(BaseModel):
    """How the parts are weighted.

    ``teacher``: folder of an embedder. ``named_weight``: of the objective on faces with a name. ``cosine_weight``: of
    1 − cosine between the two embeddings of a view, of equal dimension, raw and not centred. ``relation_weight``: of
    the mean squared difference of the cosines among the views of a batch. ``flip``: the teacher also sees the mirror
    image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: Path = Path("models/dlib-resnet")
    named_weight: Weight = 1.0
    cosine_weight: Weight = 1.0
    relation_weight: Weight = 0.0
    flip: bool = False


class Teacher:
    """An embedder in ONNX Runtime that looks at what the learner looks at."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.size = embedder.manifest.input.size

    @classmethod
    def load(cls, config: DistillConfig) -> Teacher:
        """Open the teacher. Raises :class:`~service.vision.manifest.ModelError`."""
        loaded = Embedder.load(config.teacher, torch.get_num_threads())
        manifest = loaded.manifest.model_copy(update={"flip": config.flip})
        return cls(Embedder(manifest, loaded.network))

    def targets(self, images: Tensor) -> Tensor:
        """``float32[N, D]``, of unit length, for views ``float32[N, 3, S, S]``, 0…255."""
        pixels = resized(images, self.size).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return torch.from_numpy(self._embedder.embed(np.ascontiguousarray(pixels.numpy())))


def distance(embeddings: Tensor, targets: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """The weighted parts of how far ``embeddings`` are from ``targets``, ``float32[N, D]`` each; 0 where they agree."""
    own, wanted = F.normalize(embeddings), F.normalize(targets)
    parts = {"cosine": config.cosine_weight * (1 - (own * wanted).sum(dim=1)).mean()}
    if config.relation_weight:
        parts["relation"] = config.relation_weight * (own @ own.T - wanted @ wanted.T).square().mean()
    return parts
