"""A prepared folder of training crops whose people are easy to tell apart, small enough to learn from in seconds."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from training.data import Layout, Photo, Role, Split
from training.prepare import TRAINING_SIZE, Acquired, Alignment, Counts, Settings, Summary, photo_list_sha256

TEMPLATE = tuple((float(x), 80.0) for x in range(5))


def write_crops(folder: Path, *, seed: int = 0, classes: int = 10, size: int = TRAINING_SIZE) -> Path:
    """Photos of people of every role that training knows; each person is a pattern of colours, each photo noise on it."""
    generator = np.random.default_rng(seed)
    photos: list[Photo] = []
    for person in range(classes):
        for number in range(10):
            split = (Split.TRAIN,) * 6 + (Split.VALIDATION, Split.VALIDATION, Split.TEST, Split.TEST)
            photos.append(Photo(f"c{person}/{number}.jpg", f"c{person}", Role.CLASS, split[number]))
    for role, letter, people, each in (
        (Role.FURTHER, "f", 3, 4),
        (Role.CALIBRATION, "k", 3, 3),
        (Role.VALIDATION, "v", 5, 4),
    ):
        photos += [Photo(f"{letter}{p}/{n}.jpg", f"{letter}{p}", role) for p in range(people) for n in range(each)]
    photos += [Photo(f"u{n}.jpg", f"u{n}.jpg", Role.UNLABELLED) for n in range(6)]
    patterns = {name: generator.integers(40, 216, (4, 4, 3)) for name in sorted({photo.identity for photo in photos})}
    crops = np.empty((len(photos), size, size, 3), dtype=np.uint8)
    for place, photo in enumerate(photos):
        coarse = patterns[photo.identity] + generator.normal(0, 12, (4, 4, 3))
        crops[place] = np.kron(coarse, np.ones((size // 4, size // 4, 1))).clip(0, 255)
    folder.mkdir(parents=True)
    np.save(folder / "crops.npy", crops)
    with (folder / "index.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "identity", "role", "split", "acquired", "score"])
        writer.writerows([p.file, p.identity, p.role, p.split, Acquired.DETECTOR, 0.9] for p in photos)
    settings = Settings(
        layout=Layout.CELEBA,
        photos=len(photos),
        photos_sha256=photo_list_sha256(photos),
        size=size,
        template=TEMPLATE,
        alignment=Alignment.EYE_LINE,
        like_queries=False,
        detector="centerface",
        detector_sha256="0" * 64,
    )
    counts = {role: Counts(detector=sum(p.role is role for p in photos)) for role in {p.role for p in photos}}
    (folder / "summary.json").write_text(Summary(settings=settings, acquired=counts).model_dump_json())
    return folder
