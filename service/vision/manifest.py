"""What a folder under ``models/`` says about its network: files, input, licence and origin.

A manifest is read once, at start-up. Whatever is wrong with it, or with the file it names, raises
:class:`ModelError` and ends start-up: a service with an uncertain network must not answer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.domain import LANDMARK_NAMES, Landmarks

MANIFEST_NAME = "manifest.json"

FileName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
"""A file of the model's own folder: a plain name, never a path."""

ModelId: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
"""A network's public name; it is also the name of its folder."""

Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 digest, 64 hexadecimal digits in lower case."""

Coordinate: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Point: TypeAlias = tuple[Coordinate, Coordinate]
Mean: TypeAlias = tuple[Coordinate, Coordinate, Coordinate]
_Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Divisor: TypeAlias = tuple[_Positive, _Positive, _Positive]


class ModelError(RuntimeError):
    """A model's folder cannot be used: the message names the file and the reason."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class License(_Frozen):
    """Under which terms the weights may be used.

    ``spdx``: SPDX identifier. ``file``: the licence text beside the manifest. ``commercial_use``: the
    weights' own licence permits it. ``notice``: what a user of the weights should know beyond it.
    """

    spdx: str
    file: FileName
    commercial_use: bool
    notice: str | None = None


class Provenance(_Frozen):
    """Where the weights come from, so that anyone can make the file again and compare.

    ``author``: who trained them. ``source``: package, version and file that they were taken from.
    ``source_sha256``: digest of that file. ``trained_on``: the data, in the author's account.
    ``command``: what wrote this folder.
    """

    author: str
    source: str
    source_sha256: Sha256
    trained_on: str
    command: str


class CropInput(_Frozen):
    """The one input of an embedder: ``float32[N, 3, size, size]``, RGB, ``(x - mean) / divisor``.

    ``name``: of the ONNX input. ``size``: side of the aligned crop, pixels. ``mean`` and ``divisor``: for
    red, green and blue, on the 0…255 scale.
    """

    name: str
    size: int = Field(ge=16, le=1024)
    mean: Mean
    divisor: Divisor


class CropTemplate(_Frozen):
    """Where the five landmarks of an aligned crop fall, (x, y) in pixels of the crop."""

    left_eye: Point
    right_eye: Point
    nose: Point
    mouth_left: Point
    mouth_right: Point

    @property
    def points(self) -> Landmarks:
        """``float32[5, 2]`` in the order of :data:`service.domain.LANDMARK_NAMES`; a fresh array."""
        return np.array([getattr(self, name) for name in LANDMARK_NAMES], dtype=np.float32)


class PhotoInput(_Frozen):
    """The one input of a detector: ``float32[N, 3, H, W]``, RGB, ``(x - mean) / divisor``.

    ``name``: of the ONNX input. ``multiple``: H and W must be multiples of it, pixels. ``mean`` and
    ``divisor``: for red, green and blue, on the 0…255 scale.
    """

    name: str
    multiple: int = Field(ge=1, le=1024)
    mean: Mean
    divisor: Divisor


class PointMaps(_Frozen):
    """The four outputs of a detector that sees a face as a point (CenterFace, arXiv:1911.03599).

    Each is ``float32[N, C, H / stride, W / stride]``; the fields are the names of the ONNX outputs. With
    h and w a face's height and width, and (row, column) a cell:

    - ``heatmap``, C = 1: 0…1, that a face's centre is in this cell.
    - ``scale``, C = 2: log(h / stride), log(w / stride).
    - ``offset``, C = 2: rows and columns from the cell's centre to the face's centre, in cells; the centre's
      y is ``(row + offset[0] + 0.5) * stride``.
    - ``landmarks``, C = 10: y then x of each landmark, in the order of
      :data:`service.domain.LANDMARK_NAMES`, from the box's upper left corner, in units of h and w.
    """

    stride: int = Field(ge=1, le=64)
    heatmap: str
    scale: str
    offset: str
    landmarks: str


class _Manifest(_Frozen):
    model_id: ModelId
    file: FileName = "model.onnx"
    sha256: Sha256
    license: License
    provenance: Provenance


class EmbedderManifest(_Manifest):
    """A network that turns aligned crops into vectors.

    ``dimension``: D of its output ``float32[N, D]``, which is not yet of unit length. ``flip``: the vector
    of the crop and that of its mirror image are added before normalisation.
    """

    kind: Literal["embedder"] = "embedder"
    input: CropInput
    template: CropTemplate
    dimension: int = Field(ge=2, le=4096)
    flip: bool


class DetectorManifest(_Manifest):
    """A network that finds faces and their landmarks in a photo."""

    kind: Literal["detector"] = "detector"
    input: PhotoInput
    output: PointMaps


Manifest: TypeAlias = EmbedderManifest | DetectorManifest

_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


def load_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json`` and check the network's file against it.

    Raises :class:`ModelError` if the manifest is missing or malformed, if the network's or the licence's
    file is missing, or if the network's SHA-256 is not the one that the manifest states.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ModelError(f"{path} is not a manifest: {error}") from error
    if not (folder / manifest.license.file).is_file():
        raise ModelError(f"{folder / manifest.license.file} is missing: weights do not go without their licence")
    network = folder / manifest.file
    try:
        digest = sha256_of(network)
    except OSError as error:
        raise ModelError(f"{network} cannot be read: {error.strerror}") from error
    if digest != manifest.sha256:
        raise ModelError(f"{network} has SHA-256 {digest}, but {path} says {manifest.sha256}")
    return manifest


def load_embedder_manifest(folder: Path) -> EmbedderManifest:
    """:func:`load_manifest` for a folder that must hold an embedder; else :class:`ModelError`."""
    manifest = load_manifest(folder)
    if not isinstance(manifest, EmbedderManifest):
        raise ModelError(f"{folder} holds a {manifest.kind}, not an embedder")
    return manifest


def load_detector_manifest(folder: Path) -> DetectorManifest:
    """:func:`load_manifest` for a folder that must hold a detector; else :class:`ModelError`."""
    manifest = load_manifest(folder)
    if not isinstance(manifest, DetectorManifest):
        raise ModelError(f"{folder} holds an {manifest.kind}, not a detector")
    return manifest


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``folder/manifest.json``; the same manifest always gives the same bytes."""
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", newline="\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
