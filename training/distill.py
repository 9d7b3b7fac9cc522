"""What a network learns from another one that already knows faces: its embeddings of the same views, and its maps.

Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network" (arXiv:1503.02531), with embeddings in place
of class scores, which need no names; Park et al. 2019, "Relational knowledge distillation", CVPR (arXiv:1904.05068),
with cosines in place of distances; Romero et al. 2015, "FitNets: hints for thin deep nets", ICLR (arXiv:1412.6550).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import onnx
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.vision.embedder import Embedder
from service.vision.manifest import EmbedderManifest
from service.vision.onnx import OnnxModel
from training.augment import resized
from training.data import DataError

Weight = Annotated[float, Field(ge=0)]


class Hint(BaseModel):
    """A map of the teacher that a stage of the learner is to tell of.

    ``stage``: 0…3, of the learner. ``map``: name of the tensor in the teacher's graph, ``[N, C, side, side]``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Annotated[int, Field(ge=0, le=3)]
    map: str


class DistillConfig(BaseModel):
    """How the parts are weighted.

    ``teacher``: folder of an embedder. ``named_weight``: of the objective on faces with a name. ``cosine_weight``: of
    1 − cosine between the two embeddings of a view, of equal dimension, raw and not centred. ``relation_weight``: of
    the mean squared difference of the cosines among the views of a batch. ``hints``, each weighted by ``hint_weight``:
    see :class:`Hints`. ``flip``: the teacher also sees the mirror image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: Path = Path("models/dlib-resnet")
    named_weight: Weight = 1.0
    cosine_weight: Weight = 1.0
    relation_weight: Weight = 0.0
    hints: tuple[Hint, ...] = ()
    hint_weight: Weight = 0.0
    flip: bool = False


@dataclass(frozen=True)
class Targets:
    """What the teacher makes of views: embeddings ``float32[N, D]`` of unit length, and the hints' maps."""

    embeddings: Tensor
    maps: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(self.embeddings.to(device), tuple(one.to(device) for one in self.maps))


class Teacher:
    """An embedder in ONNX Runtime that looks at what the learner looks at."""

    def __init__(self, manifest: EmbedderManifest, network: OnnxModel, maps: tuple[str, ...] = ()) -> None:
        """``maps``: names of the network's outputs after the embeddings."""
        order = list(network.outputs)
        self._maps = [order.index(name) for name in maps]
        self._manifest = manifest
        self._network = network
        self._mean = torch.tensor(manifest.input.mean).view(1, 3, 1, 1)
        self._divisor = torch.tensor(manifest.input.divisor).view(1, 3, 1, 1)
        self.channels = tuple(int(network.outputs[name][1] or 0) for name in maps)

    @classmethod
    def load(cls, config: DistillConfig) -> Teacher:
        """Open the teacher.

        Raises :class:`~service.vision.manifest.ModelError`, and :class:`~training.data.DataError` if it has no map of
        a hint.
        """
        embedder = Embedder.load(config.teacher, torch.get_num_threads())
        manifest = embedder.manifest.model_copy(update={"flip": config.flip})
        names = tuple(hint.map for hint in config.hints)
        if not names:
            return cls(manifest, embedder.network)
        model = onnx.shape_inference.infer_shapes(onnx.load(config.teacher / manifest.file))
        known = {value.name: value for value in model.graph.value_info}
        if missing := [name for name in names if name not in known]:
            raise DataError(f"{config.teacher} has no map {missing[0]!r}")
        model.graph.output.extend(known[name] for name in names)
        with TemporaryDirectory() as folder:
            path = Path(folder) / manifest.file
            onnx.save(model, path)
            return cls(manifest, OnnxModel(path, torch.get_num_threads()), names)

    def targets(self, images: Tensor) -> Targets:
        """Of views ``float32[N, 3, S, S]``, 0…255, of any size."""
        pixels = resized(images, self._manifest.input.size).clamp(0, 255)
        batch = ((pixels - self._mean) / self._divisor).contiguous(memory_format=torch.contiguous_format)
        found = self._run(batch)
        vectors = found[0]
        if self._manifest.flip:
            vectors = vectors + self._run(batch.flip(3))[0]
        return Targets(F.normalize(vectors), tuple(found[place] for place in self._maps))

    def _run(self, batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(one) for one in self._network.run({self._manifest.input.name: batch.numpy()})]


class Hints(nn.Module):
    """How little of the teacher's maps can be told, linearly and place by place, from the learner's.

    Each of its maps goes through a 1×1 convolution; what is wrong of the teacher's, over that map's variance, is the
    loss: 1 for a learner that knows the mean, 0 for one that knows all. The convolutions are thrown away in the end.
    """

    def __init__(self, config: DistillConfig, widths: tuple[int, ...], channels: tuple[int, ...]) -> None:
        """``widths``: channels of the learner's four stages. ``channels``: of the teacher's map of each hint."""
        super().__init__()
        self.stages = [hint.stage for hint in config.hints]
        self.weight = config.hint_weight
        self.read = nn.ModuleList(
            nn.Conv2d(widths[hint.stage], count, 1) for hint, count in zip(config.hints, channels, strict=True)
        )

    def forward(self, maps: list[Tensor], wanted: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The weighted part of each hint; ``maps``: of the learner's stages; ``wanted``: the teacher's."""
        parts = {}
        for stage, read, theirs in zip(self.stages, self.read, wanted, strict=True):
            own = read(maps[stage]).float()
            if theirs.shape[2:] != own.shape[2:]:
                theirs = F.interpolate(theirs, size=own.shape[2:], mode="bilinear", antialias=True)
            # Around the mean of each place: aligned faces have their parts in the same places.
            spread = (theirs - theirs.mean(dim=0)).square().mean()
            parts[f"hint_{stage}"] = self.weight * (own - theirs).square().mean() / spread.clamp(min=1e-9)
        return parts


def distance(embeddings: Tensor, targets: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """The weighted parts of how far ``embeddings`` are from ``targets``, ``float32[N, D]`` each; 0 where they agree."""
    own, wanted = F.normalize(embeddings), F.normalize(targets)
    parts = {"cosine": config.cosine_weight * (1 - (own * wanted).sum(dim=1)).mean()}
    if config.relation_weight:
        parts["relation"] = config.relation_weight * (own @ own.T - wanted @ wanted.T).square().mean()
    return parts
