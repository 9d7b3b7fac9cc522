"""What fine-tuning on new people gives, to them and to the others.

    python bench/new_people.py --data DATA --final models/resnext-26 --crops CROPS --work /tmp/new-people

The 50 `validation` people of CelebA-500 are the new ones: `vultus-train finetune` learns from every second photo of
each, and the others test it. The old ones are the `class` people, by the validation split. CROPS: training crops with
the roles `class` and `validation`, from `vultus-train prepare --training`. The network that comes out is for this
comparison alone: it has learned from people by whom models are chosen. WORK holds photos of people: delete it
afterwards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from training.backbone import Backbone
from training.data import Photo, Role, Split, celeba_photos
from training.metrics import numbered, pairs_among, rates
from training.prepare import Prepared, load_prepared
from training.train import FINAL, load_network
from training.validation import centroid_accuracy, centroids, embed

ROOT = Path(__file__).resolve().parent.parent
FPRS = (0.01, 0.001)


def halves(photos: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Every second photo of each person, and the rest; both in the order of the files."""
    people: dict[str, list[Photo]] = defaultdict(list)
    for photo in sorted(photos, key=lambda photo: photo.file):
        people[photo.identity].append(photo)
    return (
        [photo for own in people.values() for photo in own[::2]],
        [photo for own in people.values() for photo in own[1::2]],
    )


def row(network: Backbone, prepared: Prepared, learned: list[Photo], tested: list[Photo], size: int) -> list[float]:
    """Nearest-centroid accuracy, and TPR at each of ``FPRS``, of the tested photos."""
    place = {row.photo.file: index for index, row in enumerate(prepared.rows)}
    own: dict[str, list[int]] = defaultdict(list)
    for photo in learned:
        own[photo.identity].append(place[photo.file])
    taught = embed(network, prepared, [index for indices in own.values() for index in indices], size)
    means = centroids(torch.split(taught, [len(indices) for indices in own.values()]))
    names = [photo.identity for photo in tested]
    vectors = embed(network, prepared, [place[photo.file] for photo in tested], size)
    right = centroid_accuracy(vectors, names, means, list(own))
    genuine, impostor = pairs_among(F.normalize(vectors).numpy(), numbered(names))
    return [right, *(rate.tpr for rate in rates(genuine.similarity, impostor.similarity, FPRS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--final", type=Path, required=True)
    parser.add_argument("--crops", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    prepared = load_prepared(options.crops)
    usable = {prepared.rows[i].photo.file for i in prepared.where(Role.CLASS, Role.VALIDATION)}
    photos = [photo for photo in celeba_photos(options.data, [Role.CLASS, Role.VALIDATION]) if photo.file in usable]
    learned, tested = halves([photo for photo in photos if photo.role is Role.VALIDATION])
    for photo in learned:
        link = options.work / "people" / photo.identity / Path(photo.file).name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((options.data / photo.file).resolve())
    out = options.work / "run"
    subprocess.run(
        [sys.executable, "-m", "training.cli", "finetune", "--from", options.final, "--data", options.work / "people",
         "--out", out, "--epochs", str(options.epochs)],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    old = [photo for photo in photos if photo.role is Role.CLASS]
    print(f"{options.final}: {os.cpu_count()} cores, {len(learned)} photos of new people learned, {len(tested)} tested")
    print("| | people | nearest centroid | " + " | ".join(f"TPR at FPR {fpr:g}" for fpr in FPRS) + " |")
    print("| --- | --- | ---: | " + " | ".join("---:" for _ in FPRS) + " |")
    for when, final in (("before", options.final), ("after", out / FINAL)):
        network, origin, *_ = load_network(final)
        for who, known, asked in (
            ("new", learned, tested),
            ("old", [p for p in old if p.split is Split.TRAIN], [p for p in old if p.split is Split.VALIDATION]),
        ):
            cells = row(network, prepared, known, asked, origin.config.size)
            print(f"| {when} | {who} | " + " | ".join(f"{100 * cell:.1f} %" for cell in cells) + " |")


if __name__ == "__main__":
    main()
