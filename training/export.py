"""From a finished run to a model that the service loads: ONNX, as floats or as 8-bit integers, with its manifest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from service.domain import LANDMARK_NAMES
from service.vision.manifest import (
    CropInput,
    CropTemplate,
    EmbedderManifest,
    License,
    Provenance,
    load_embedder_manifest,
    sha256_of,
    write_manifest,
)
from service.vision.onnx import OnnxModel
from training.augment import DIVISOR, MEAN, normalised, views
from training.batches import taught
from training.data import DataError, Layout, Role
from training.licenses import RESEARCH_WEIGHTS
from training.prepare import TRAINING_SIZE, Prepared, load_prepared
from training.quantise import SEEN, quantise_network, require_own_folder
from training.train import ORIGIN, Lesson, RunConfig, load_network

INPUT, OUTPUT = "crops", "embeddings"
NETWORK, LICENSE = "model.onnx", "LICENSE.txt"

PARITY_BATCHES = (1, 5, 32)
PARITY = 1e-3
"""Largest angle, radians, between an embedding of torch and one of ONNX Runtime, float against float."""

_SEED = 0


@dataclass(frozen=True)
class Exported:
    """What was written. ``angle``: largest angle to torch's embeddings, radians; ``megabytes``: of the network."""

    manifest: EmbedderManifest
    angle: float
    megabytes: float


def export(final: Path, out: Path, *, template: Path, crops: Path | None = None, int8: bool = False) -> Exported:
    """Write the folder ``out`` of an embedder from a run's final weights, or from those of an exported folder.

    The folder's name is the ``model_id``. ``template``: folder of the embedder for whose template the training crops
    were prepared. ``int8``: static quantisation, weights of each channel and activations, with ranges seen on training
    photos in ``crops``. The result is compared with torch at batches of 1, 5 and 32.

    Raises :class:`~training.data.DataError` if something is missing, or if the float network does not answer as torch
    does; :class:`~service.vision.manifest.ModelError` if ONNX Runtime cannot load what was written.
    """
    require_own_folder(out, final)
    network, origin, source, _ = load_network(final)
    config = origin.config
    if int8 and crops is None:
        raise DataError("int8 needs --crops, training crops to see the ranges of activations on")
    photos = None if crops is None else load_prepared(crops)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as work:
        written = Path(work) / NETWORK
        write_onnx(network, config.size, written)
        if int8 and photos is not None:
            written = _quantised(written, photos, config)
        angle = largest_angle(network, OnnxModel(written), config.size, photos)
        if not int8 and angle > PARITY:
            raise DataError(f"ONNX Runtime's embeddings are {angle:.4f} rad from torch's")
        written.replace(out / NETWORK)
    (out / LICENSE).write_text(RESEARCH_WEIGHTS, encoding="utf-8", newline="\n")
    manifest = EmbedderManifest(
        model_id=out.name,
        sha256=sha256_of(out / NETWORK),
        license=License(
            spdx="LicenseRef-research-only",
            file=LICENSE,
            commercial_use=False,
            notice=_notice(origin.lessons),
        ),
        provenance=Provenance(
            author="Vultus",
            source=source,
            source_sha256=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            trained_on=_trained_on(origin.lessons),
            command=f"vultus-train export --out {out.as_posix()}" + (" --int8" if int8 else ""),
        ),
        input=CropInput(name=INPUT, size=config.size, mean=(MEAN,) * 3, divisor=(DIVISOR,) * 3),
        template=_template(template, config.size),
        dimension=config.backbone.dimension,
        flip=True,
    )
    write_manifest(manifest, out)
    if int8:  # nothing can be learned from these weights
        (out / ORIGIN).unlink(missing_ok=True)
    else:
        (out / ORIGIN).write_text(origin.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    return Exported(manifest, angle, (out / NETWORK).stat().st_size / 1e6)


def write_onnx(network: nn.Module, size: int, path: Path) -> None:
    """Write a network with a free batch: ``float32[N, 3, S, S]`` to ``float32[N, D]``, normalisation folded in."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 3, size, size),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={"crops": {0: batch}},
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise DataError("torch did not give an ONNX program")
    program.optimize()
    program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


def largest_angle(network: nn.Module, exported: OnnxModel, size: int, photos: Prepared | None) -> float:
    """Largest angle, radians, between torch's embedding of a crop and ONNX Runtime's, at several sizes of batch.

    On photos of the ``validation`` people, or on noise where there are none.
    """
    largest = 0.0
    for count in PARITY_BATCHES:
        images = _images(photos, (Role.VALIDATION,), count, size)
        with torch.no_grad():
            ours = network.eval()(images).double()
        (answer,) = exported.run({INPUT: images.contiguous().numpy()})
        theirs = torch.from_numpy(answer).double()
        cosine = nn.functional.cosine_similarity(ours, theirs).clamp(-1, 1)
        # Of small angles the cosine has no digits left; the chord has.
        chord = (nn.functional.normalize(ours) - nn.functional.normalize(theirs)).norm(dim=1)
        angles = torch.where(cosine > 0.9, 2 * torch.asin((chord / 2).clamp(max=1)), torch.acos(cosine))
        largest = max(largest, float(angles.max()))
    return largest if math.isfinite(largest) else math.inf


def _quantised(network: Path, photos: Prepared, config: RunConfig) -> Path:
    images = _images(photos, config.people, SEEN, config.size).contiguous().numpy()
    small = network.with_name("int8.onnx")
    quantise_network(network, small, INPUT, iter(np.array_split(images, max(1, len(images) // 16))))
    return small


def _images(photos: Prepared | None, roles: tuple[Role, ...], count: int, size: int) -> torch.Tensor:
    generator = np.random.default_rng(_SEED)
    chosen = taught(photos, roles) if photos is not None else np.empty(0, np.intp)
    if photos is None or not len(chosen):
        pixels = generator.integers(0, 256, (count, TRAINING_SIZE, TRAINING_SIZE, 3), dtype=np.uint8)
    else:
        pixels = np.asarray(photos.crops[np.sort(generator.choice(chosen, min(count, len(chosen)), replace=False))])
    return normalised(views(torch.from_numpy(pixels), size))


def _template(folder: Path, size: int) -> CropTemplate:
    manifest = load_embedder_manifest(folder)
    points = (manifest.template.points.astype(np.float64) + 0.5) * size / manifest.input.size - 0.5
    named: dict[str, Any] = {
        name: (round(float(x), 4), round(float(y), 4)) for name, (x, y) in zip(LANDMARK_NAMES, points, strict=True)
    }
    return CropTemplate(**named)


def _trained_on(lessons: Sequence[Lesson]) -> str:
    said = {
        (Layout.CELEBA, Role.CLASS): "CelebA-500's official training split (500 people)",
        (Layout.CELEBA, Role.FURTHER): "350 further people of CelebA",
        (Layout.UTKFACE, Role.UNLABELLED): "four fifths of UTKFace, without names",
    }
    own = "photos of its maker's own"
    parts = dict.fromkeys(said.get((lesson.layout, lesson.role), own) for lesson in lessons)
    teachers = dict.fromkeys(lesson.teacher for lesson in lessons if lesson.teacher is not None)
    learned = f"; the embeddings of {', '.join(teachers)} as targets" if teachers else ""
    return ", ".join(parts) + learned + ". No photo of a person held out for calibration, validation or evaluation."


def _notice(lessons: Sequence[Lesson]) -> str:
    names = {Layout.CELEBA: "CelebA", Layout.UTKFACE: "UTKFace"}
    sets = " and ".join(name for layout, name in names.items() if any(one.layout is layout for one in lessons))
    return f"Trained on {sets}: for non-commercial research only, as the terms of these photos say."
