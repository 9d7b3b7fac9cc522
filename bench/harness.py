"""What the benches of the running service share: the machine, a filled data folder, photos, a process to watch."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from sqlalchemy import insert, select

from service.domain import DEFAULT_GALLERY
from service.layout import PHOTO_SUFFIXES
from service.settings import Settings
from service.store.repository import Repository
from service.store.tables import faces, galleries, subjects
from service.vision.manifest import load_embedder_manifest

ROOT = Path(__file__).resolve().parent.parent
_FACE = json.dumps(
    {
        "box": [50.0, 50.0, 90.0, 120.0],
        "landmarks": [[70.0, 95.0], [115.0, 95.0], [92.0, 120.0], [75.0, 142.0], [110.0, 142.0]],
        "detection_score": 0.9,
        "quality": {"size": 90.0, "sharpness": 0.9, "yaw": 0.0, "pitch": 0.0, "roll": 0.0},
    }
)


def machine(settings: Settings) -> str:
    """Name cores, threads and networks, as every bench does before its figures."""
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {settings.threads or cores} threads, {settings.detector} + {settings.model}, "
        f"batch up to {settings.max_batch}, ONNX Runtime {onnxruntime.__version__}"
    )


class Strangers:
    """Unit vectors of people who have nothing to do with one another, around one middle as a network's are.

    Two people's similarity is about 0.83, as that of the bundled model's vectors.
    """

    def __init__(self, dimension: int, generator: np.random.Generator) -> None:
        self._generator = generator
        self._middle = generator.normal(size=dimension) * 2.2

    def more(self, count: int) -> NDArray[np.float32]:
        """``float32[count, D]``, L2-normalised, of as many people who were not there before."""
        vectors = self._middle + self._generator.normal(size=(count, len(self._middle)))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors, np.float32)


def fill(data_dir: Path, people: int, each: int = 1) -> None:
    """Enrol ``people`` strangers with ``each`` template, in the folder of a service that does not run."""
    settings = Settings(data_dir=data_dir)
    manifest = load_embedder_manifest(settings.models_dir / settings.model)
    generator = np.random.default_rng(0)
    strangers = Strangers(manifest.dimension, generator)
    data_dir.mkdir(parents=True, exist_ok=True)
    repository = Repository(settings.sql_url)
    now = datetime.now(UTC)
    with repository.engine.connect().execution_options(vultus_write=True) as connection, connection.begin():
        gallery = connection.scalar(select(galleries.c.id).where(galleries.c.name == DEFAULT_GALLERY))
        connection.execute(
            insert(subjects),
            [
                {"id": one, "gallery_id": gallery, "name": f"person {one}", "metadata": "{}", "created_at": now}
                for one in range(1, people + 1)
            ],
        )
        for start in range(0, people * each, 10_000):
            count = min(10_000, people * each - start)
            vectors = strangers.more(count).astype("<f4")
            connection.execute(
                insert(faces),
                [
                    {
                        "face_id": str(uuid.UUID(bytes=generator.bytes(16))),
                        "subject_id": 1 + (start + row) // each,
                        "image_sha256": generator.bytes(32).hex(),
                        "model_id": manifest.model_id,
                        "face": _FACE,
                        "created_at": now,
                        "embedding": vectors[row].tobytes(),
                    }
                    for row in range(count)
                ],
            )
    repository.close()


def photos(folder: Path, most: int) -> list[Path]:
    """Return photos of a folder and the folders in it, by name, evenly drawn if there are more than ``most``."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not found:
        raise SystemExit(f"There is no photo in {folder}.")
    return [found[number * len(found) // most] for number in range(most)] if len(found) > most else found


@dataclass(frozen=True)
class Held:
    """What a process holds: resident memory in bytes, threads, open files."""

    memory: int
    threads: int
    files: int


def held(pid: int) -> Held:
    """Look a process up in ``/proc``."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Held(
        int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    )


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
