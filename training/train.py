"""The loop in which an embedder learns, on one page; the losses and the teacher are parts of it.

A run's folder holds ``config.json`` (all that was asked for), ``metrics.jsonl`` (a line for each measurement),
``checkpoint.pt`` (to go on from) and at the end ``final.pt``. A step's crops, views and dropped features follow from
the seed and the step's number, so that a run which was killed ends with the weights of one that was not, on the same
machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn
from torch.distributed import all_reduce, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm  # type: ignore[import-untyped]

from service.vision.manifest import ModelError, load_embedder_manifest
from training.analysis import analyse
from training.augment import AugmentConfig, normalised, resized, views
from training.backbone import Backbone, BackboneConfig, unfolded
from training.batches import TrainingSet, people_by_photos, shuffled, training_set
from training.data import DataError, Layout, Role, Split
from training.distill import DistillConfig, Hints, Targets, Teacher, distance
from training.losses import LossConfig, TripletConfig, make_objective
from training.prepare import TRAINING_VIEW, Prepared, load_prepared
from training.report import CONFIG, METRICS, TEST, Tested
from training.validation import CENTROID_PHOTOS, Score, embedded, score

CHECKPOINT: Final = "checkpoint.pt"
FINAL: Final = "final.pt"
ORIGIN: Final = "run.json"
"""In the folder of an exported network: the configuration of its run and what it learned from."""

_AHEAD = 2


class RunConfig(BaseModel):
    """All that decides what a run gives, but the crops and the weights it begins with.

    ``people``: roles to learn from. ``size``: side of the crops that the network is made for; ``sizes``: pairs of the
    share of the run from which on a size is used, for cheaper first steps, the last of which must be ``size``.
    ``batch``: crops for each step, over all processes. ``people_in_batch``: P, with ``batch`` / P photos of each; 0
    for shuffled crops. ``steps``: of the run. ``learning_rate``: of SGD with Nesterov momentum 0.9; rises in the first
    ``warm_up`` of the run and falls to 0 by a half cosine (Loshchilov & Hutter 2017, arXiv:1608.03983).
    ``weight_decay``: of weight matrices alone. ``clip``: largest norm of the gradient. ``frozen_statistics``: the
    network's batch normalisation uses its stored statistics and does not renew them. ``measure_every``: steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    people: Annotated[tuple[Role, ...], Field(min_length=1)]
    size: Annotated[int, Field(ge=32, le=256)]
    sizes: tuple[tuple[float, int], ...] = ()
    batch: Annotated[int, Field(ge=2)]
    people_in_batch: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    clip: Annotated[float, Field(gt=0)] = 5.0
    frozen_statistics: bool = False
    measure_every: Annotated[int, Field(ge=1)] = 500
    backbone: BackboneConfig = BackboneConfig()
    loss: LossConfig
    distill: DistillConfig | None = None
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.people_in_batch and self.batch % self.people_in_batch:
            raise ValueError("batch is not a multiple of people_in_batch")
        if self.sizes and (self.sizes[0][0] != 0 or self.sizes[-1][1] != self.size):
            raise ValueError("sizes must begin at 0 and end with size")
        if self.sizes and self.backbone.head == "places":
            raise ValueError("a head with a weight for each place has one size")
        if isinstance(self.loss, TripletConfig) and not self.people_in_batch:
            raise ValueError("triplets need people_in_batch")
        if Role.UNLABELLED in self.people and self.distill is None:
            raise ValueError("faces without a name teach nothing without [distill]")
        return self

    def size_at(self, step: int) -> int:
        """The side of the crops of a step."""
        return next((size for start, size in reversed(self.sizes) if step >= start * self.steps), self.size)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        begin = self.warm_up * self.steps
        if step < begin:
            return self.learning_rate * (step + 1) / (begin + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1.0, self.steps - begin)))


def read_config(path: Path) -> RunConfig:
    """Read a TOML file. Raises :class:`~training.data.DataError`."""
    try:
        return RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise DataError(f"{path}: {error}") from error


class Learner(nn.Module):
    """The network with what it learns from: one module, since several processes share its gradients."""

    def __init__(self, config: RunConfig, classes: int, channels: tuple[int, ...] = ()) -> None:
        """``classes``: how many people. ``channels``: of the teacher's map of each hint."""
        super().__init__()
        self.backbone = Backbone(config.backbone, config.size)
        self.objective = make_objective(config.loss, config.backbone.dimension, classes)
        self.distill = config.distill
        self.hints = Hints(config.distill, self.backbone.widths, channels) if config.distill and channels else None

    def forward(self, images: Tensor, labels: Tensor, targets: Targets | None, progress: float) -> dict[str, Tensor]:
        """The parts of the loss, weighted; their sum is what is minimised."""
        told: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, torch.bfloat16):
            maps = self.backbone.maps(images)
            embeddings = self.backbone.embeddings(maps[-1]).float()
            if self.hints is not None and targets is not None:
                told = self.hints(maps, targets.maps)
        parts = {"named": self.objective(embeddings, labels, progress)}
        if self.distill is not None and targets is not None:
            parts["named"] = parts["named"] * self.distill.named_weight
            parts |= distance(embeddings, targets.embeddings, self.distill) | told
        return parts


class Lesson(BaseModel):
    """What a network learned from: people of a ``role`` in a data set of a ``layout``, and a ``teacher``'s model_id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout
    role: Role
    teacher: str | None


_LESSONS: Final = TypeAdapter(tuple[Lesson, ...])
"""To and from what a file holds."""


class Finished(NamedTuple):
    """What a run leaves. ``people``: those whom the objective tells apart. ``lessons``: of this run and of those whose
    weights it began with."""

    learner: Learner
    config: RunConfig
    people: tuple[str, ...]
    lessons: tuple[Lesson, ...]


class Origin(BaseModel):
    """What an exported network tells of its run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    lessons: tuple[Lesson, ...]


class Learned(NamedTuple):
    """A finished network. ``source``: its run, as manifests name it. ``exported``: its weights come from ONNX."""

    network: Backbone
    origin: Origin
    source: str
    exported: bool


@dataclass(frozen=True)
class Batch:
    """What one step takes: images ``float32[N, 3, S, S]``, labels ``int64[N]``, the teacher's targets."""

    images: Tensor
    labels: Tensor
    targets: Targets | None


def train(
    config: RunConfig,
    crops: Sequence[Path],
    out: Path,
    *,
    init: Path | None = None,
    resume: bool = False,
    steps: int | None = None,
    seed: int | None = None,
    tensorboard: Path | None = None,
    progress: bool = True,
) -> Path:
    """Run a configuration on folders of training crops and return the path of the final weights.

    ``init``: final weights, or the folder of an exported network, to begin with; what fits is taken, the rest starts
    anew. ``resume``: go on from the last
    checkpoint in ``out``. ``steps``, also for a run that is resumed, and ``seed``: in place of the configuration's.
    Under ``torchrun`` each process takes its share of every batch. Raises :class:`~training.data.DataError`.
    """
    given = {"steps": steps, "seed": seed}
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    if resume and not (out / CHECKPOINT).is_file():
        raise DataError(f"{out} has no {CHECKPOINT} to go on from")
    if not resume and (out / METRICS).exists():
        raise DataError(f"{out} holds a run: go on with --resume, or choose another folder")
    folders = [load_prepared(folder) for folder in crops]
    photos = training_set(folders, config.people)
    judge = _judge(folders)
    with _processes() as (rank, world, device):
        if config.batch % world:
            raise DataError(f"a batch of {config.batch} cannot be shared by {world} processes")
        torch.manual_seed(config.seed)
        teacher = Teacher.load(config.distill) if config.distill is not None else None
        channels = teacher.channels if teacher is not None else ()
        learner = Learner(config, len(photos.people), channels).to(device).to(memory_format=torch.channels_last)
        optimizer = _optimizer(learner, config)
        begun, seconds = 0, 0.0
        lessons = _lessons(folders, config)
        if init is not None and not resume:
            lessons = _together(adopt(learner, init, statistics_kept=config.frozen_statistics), lessons)
        if resume:
            begun, seconds, lessons = _restore(out / CHECKPOINT, learner, optimizer, config, photos)
        wrapped = DistributedDataParallel(learner) if world > 1 else learner
        chief = rank == 0
        if chief:
            out.mkdir(parents=True, exist_ok=True)
            (out / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _forget_after(out / METRICS, begun)
        writer = _writer(tensorboard) if chief and tensorboard is not None else None
        started = time.monotonic() - seconds
        sums: dict[str, float] = defaultdict(float)
        bar = tqdm(total=config.steps, initial=begun, unit="step", disable=not progress or not chief)
        with bar:
            for step, batch in _batches(photos, config, teacher, range(begun, config.steps), rank, world):
                _set_mode(learner, config)
                rate = config.learning_rate_at(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(hash((config.seed, 2, step, rank)) % 2**63)
                parts = wrapped(
                    batch.images.to(device),
                    batch.labels.to(device),
                    None if batch.targets is None else batch.targets.to(device),
                    step / config.steps,
                )
                loss = torch.stack(list(parts.values())).sum()
                if not math.isfinite(float(loss.detach())):
                    raise DataError(f"the loss is {float(loss.detach())} at step {step}: lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(learner.parameters(), config.clip)
                optimizer.step()
                sums["steps"] += 1
                for name, part in parts.items():
                    sums[f"loss_{name}"] += float(part.detach())
                bar.update()
                done = step + 1
                if done % config.measure_every and done != config.steps:
                    continue
                means = _means(sums, world, device)
                sums.clear()
                if chief:
                    line = {
                        "step": done,
                        "samples": done * config.batch,
                        "seconds": round(time.monotonic() - started, 1),
                        "learning_rate": rate,
                        "size": config.size_at(step),
                        **means,
                        **_measured(learner, photos, judge, config.size_at(step), last=done == config.steps),
                    }
                    _append(out / METRICS, line)
                    _record(writer, line)
                    bar.set_postfix_str(_told(line))
                    spent = time.monotonic() - started
                    _save(out / CHECKPOINT, learner, optimizer, config, photos, lessons, done, spent)
        if chief:
            save_final(out / FINAL, Finished(learner, config, photos.people, lessons))
        if writer is not None:
            writer.close()
    return out / FINAL


def save_final(path: Path, finished: Finished) -> None:
    """Write what a finished run leaves: configuration, people, lessons, weights of network and objective."""
    _write(
        path,
        {
            "config": finished.config.model_dump_json(),
            "people": list(finished.people),
            "lessons": _LESSONS.dump_python(finished.lessons, mode="json"),
            "backbone": finished.learner.backbone.state_dict(),
            "objective": finished.learner.objective.state_dict(),
        },
    )


def load_final(path: Path) -> Finished:
    """What a finished run left. Raises :class:`~training.data.DataError`."""
    state = _read(path)
    try:
        lessons = _LESSONS.validate_python(state["lessons"])
        config = RunConfig.model_validate_json(state["config"])
        learner = Learner(config, len(state["people"]))
        learner.backbone.load_state_dict(state["backbone"])
        learner.objective.load_state_dict(state["objective"])
    except (KeyError, RuntimeError, ValidationError) as error:
        raise DataError(f"{path} is not the end of a run: {error}") from error
    return Finished(learner.eval(), config, tuple(state["people"]), lessons)


def load_network(path: Path) -> Learned:
    """The network of a run's final weights, or of the folder that was exported from them, in floats.

    Raises :class:`~training.data.DataError`.
    """
    if not path.is_dir():
        finished = load_final(path)
        origin = Origin(config=finished.config, lessons=finished.lessons)
        return Learned(finished.learner.backbone, origin, f"training/runs/{path.parent.name}", exported=False)
    try:
        manifest = load_embedder_manifest(path)
        origin = Origin.model_validate_json((path / ORIGIN).read_bytes())
        stored = onnx.load(path / manifest.file).graph.initializer
        network = unfolded(
            origin.config.backbone,
            manifest.input.size,
            {tensor.name: np.asarray(onnx.numpy_helper.to_array(tensor)) for tensor in stored},
        )
    except FileNotFoundError as error:
        raise DataError(f"{path} has no {ORIGIN}: it was not exported, in floats, from a run") from error
    except (OSError, ModelError, ValidationError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} does not hold an exported network: {error}") from error
    return Learned(network.eval(), origin, manifest.provenance.source, exported=True)


def test(run: Path, crops: Path) -> Tested:
    """Measure a finished run on the official test split, once, and write ``test.json`` into its folder.

    Raises :class:`~training.data.DataError` if that was done, or if the photos are missing.
    """
    if (run / TEST).exists():
        raise DataError(f"{run / TEST} is there: the test split is looked at once for each run")
    learner, config, people, _ = load_final(run / FINAL)
    scores = getattr(learner.objective, "scores", None)
    faces = embedded(learner.backbone, load_prepared(crops), config.size, Split.TEST)
    found = Tested(score=score(faces, scores, people), analysis=analyse(faces, scores, people))
    (run / TEST).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return found


def test_exported(model: Path, crops: Path) -> Score:
    """Measure an exported network, in floats, on the official test split. It has no classifier; nothing is written.

    What its run had in ``test.json`` can so be seen again from the weights that ship. Raises
    :class:`~training.data.DataError` if the folder holds no exported network, or if the photos are missing.
    """
    network, origin, *_ = load_network(model)
    return score(embedded(network, load_prepared(crops), origin.config.size, Split.TEST), None, ())


def adopt(learner: Learner, path: Path, *, statistics_kept: bool = False) -> tuple[Lesson, ...]:
    """Begin with another run's weights: those of the network that have the same name and shape; return its lessons.

    Raises :class:`~training.data.DataError` if none has, or if they are an exported network's, whose statistics are not
    those of photos, and ``statistics_kept`` is not so.
    """
    own, other = learner.backbone.state_dict(), load_network(path)
    if other.exported and not statistics_kept:
        raise DataError(f"{path} is an exported network: it is learned from with frozen_statistics alone")
    theirs = other.network.state_dict()
    fitting = {name: weight for name, weight in theirs.items() if name in own and own[name].shape == weight.shape}
    if not any(name.endswith("weight") for name in fitting):
        raise DataError(f"{path} has no weights for this network")
    learner.backbone.load_state_dict(own | fitting)
    return other.origin.lessons


def _lessons(folders: Sequence[Prepared], config: RunConfig) -> tuple[Lesson, ...]:
    teacher = None if config.distill is None else load_embedder_manifest(config.distill.teacher).model_id
    return _together(
        [
            Lesson(layout=prepared.summary.settings.layout, role=role, teacher=teacher)
            for prepared in folders
            for role in config.people
            if len(prepared.where(role))
        ]
    )


def _together(*lessons: Sequence[Lesson]) -> tuple[Lesson, ...]:
    return tuple(dict.fromkeys(lesson for some in lessons for lesson in some))


def _batches(
    photos: TrainingSet, config: RunConfig, teacher: Teacher | None, steps: range, rank: int, world: int
) -> Iterator[tuple[int, Batch]]:
    """Step by step, prepared while the step before is learned from."""

    def prepare(step: int) -> Batch:
        indices = _indices(photos, config, step)
        # Each process has its own crops of the batch, and its own random views of them.
        generator = torch.Generator().manual_seed(hash((config.seed, 3, step, rank)) % 2**63)
        share = indices[rank::world] if not config.people_in_batch else np.array_split(indices, world)[rank]
        crops, size = torch.from_numpy(photos.crops(share)), config.size_at(step)
        labels = torch.from_numpy(photos.labels[share])
        if teacher is None:
            return Batch(normalised(views(crops, size, config.augment, generator)), labels, None)
        # As fine as the training crops are: the teacher's own size would only cost time.
        seen = views(crops, max(size, TRAINING_VIEW), config.augment, generator)
        return Batch(normalised(resized(seen, size)), labels, teacher.targets(seen))

    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[int, Future[Batch]]] = []
        for step in steps:
            waiting.append((step, pool.submit(prepare, step)))
            if len(waiting) > _AHEAD:
                first, batch = waiting.pop(0)
                yield first, batch.result()
        for first, batch in waiting:
            yield first, batch.result()


def _indices(photos: TrainingSet, config: RunConfig, step: int) -> NDArray[np.intp]:
    if config.people_in_batch:
        each = config.batch // config.people_in_batch
        return people_by_photos(photos.labels, config.people_in_batch, each, step, config.seed)
    return shuffled(len(photos), config.batch, step, config.seed)


def _means(sums: Mapping[str, float], world: int, device: torch.device) -> dict[str, float]:
    """Means over the steps, and over the processes, each of which saw its share of every batch."""
    means = {name: total / sums["steps"] for name, total in sums.items() if name != "steps"}
    if world > 1:
        told = torch.tensor(list(means.values()), dtype=torch.float64, device=device)
        all_reduce(told)
        means = dict(zip(means, (told / world).tolist(), strict=True))
    return means


def _set_mode(learner: Learner, config: RunConfig) -> None:
    learner.train()
    if config.frozen_statistics:
        for module in learner.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _optimizer(learner: Learner, config: RunConfig) -> torch.optim.Optimizer:
    matrices = [weight for weight in learner.parameters() if weight.ndim > 1]
    others = [weight for weight in learner.parameters() if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


def _judge(folders: Sequence[Prepared]) -> Prepared | None:
    """The folder with photos to choose by, if there is one."""
    return next((prepared for prepared in folders if len(prepared.where(Role.VALIDATION))), None)


def _measured(
    learner: Learner, photos: TrainingSet, judge: Prepared | None, size: int, *, last: bool
) -> dict[str, Any]:
    if judge is None:
        return {}
    scores = getattr(learner.objective, "scores", None)
    faces = embedded(learner.backbone, judge, size, Split.VALIDATION, None if last else CENTROID_PHOTOS)
    found = score(faces, scores, photos.people)
    return {"validation": found.model_dump(mode="json")}


def _told(line: dict[str, Any]) -> str:
    found = line.get("validation")
    if found is None:
        return ""
    accuracy = found["accuracy"] if found["accuracy"] is not None else found["centroid_accuracy"]
    return f"accuracy {accuracy:.3f}, TPR at 0.01 {found['tpr']['0.01']:.3f}"


@contextmanager
def _processes() -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device of this one; joins the others under ``torchrun``."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, torch.device("cuda" if cuda else "cpu")
        return
    init_process_group("nccl" if cuda else "gloo")
    try:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        yield int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device
    finally:
        destroy_process_group()


def _save(
    path: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    photos: TrainingSet,
    lessons: tuple[Lesson, ...],
    step: int,
    seconds: float,
) -> None:
    _write(
        path,
        {
            "config": config.model_dump_json(),
            "people": list(photos.people),
            "lessons": _LESSONS.dump_python(lessons, mode="json"),
            "learner": learner.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
        },
    )


def _restore(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, config: RunConfig, photos: TrainingSet
) -> tuple[int, float, tuple[Lesson, ...]]:
    state = _read(path)
    saved = RunConfig.model_validate_json(state["config"])
    if saved.model_copy(update={"steps": config.steps}) != config:
        raise DataError(f"{path} is of another configuration")
    if tuple(state["people"]) != photos.people:
        raise DataError(f"{path} is of other people")
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"]), _LESSONS.validate_python(state["lessons"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    """As a whole: whoever kills the process finds the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop measurements that were made after the checkpoint from which a run goes on."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard, which few will want

    return SummaryWriter(str(folder))


def _record(writer: Any, line: dict[str, Any]) -> None:
    if writer is None:
        return
    flat = line | {f"validation_{k}": v for k, v in line.get("validation", {}).items() if isinstance(v, float)}
    flat |= {f"tpr_{fpr}": value for fpr, value in line.get("validation", {}).get("tpr", {}).items()}
    for name, value in flat.items():
        if isinstance(value, int | float) and name != "step":
            writer.add_scalar(name, value, line["step"])
