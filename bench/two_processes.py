"""One process with batches of 96 against two with 48 each, on real crops.

    python bench/two_processes.py --crops CROPS --work /tmp/two-processes

Cross-entropy with frozen batch statistics and plain crops, 60 steps; the stages begin with the weights of
`models/resnext-26`, head and classifier anew. The two processes run under torchrun and share their gradients
(DistributedDataParallel, gloo). Beside the losses stand those of one process with another seed: how far apart two runs
may be by chance. CROPS: from `vultus-train prepare --training --role class`; with `validation` people in them it
measures accuracy too, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
INIT = ROOT / "models" / "resnext-26"
EACH = 6

CONFIG = """
seed = {seed}
people = ["class"]
size = 96
batch = 96
steps = 60
learning_rate = 0.1
warm_up = 0.3
frozen_statistics = true
measure_every = {each}

[backbone]
layers = [2, 2, 2, 2]
groups = 8
group_width = 8
stem = "imagenet"
head = "places"
dimension = 256

[loss]
kind = "cross-entropy"

[augment]
mirror = 0.0
"""


def losses(name: str, seed: int, processes: int, options: argparse.Namespace) -> NDArray[np.float64]:
    """Mean losses of every :data:`EACH` steps of one run."""
    config, out = options.work / f"{name}.toml", options.work / name
    options.work.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG.format(seed=seed, each=EACH), encoding="utf-8")
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    if not (out / "final.pt").exists():
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = ["training.cli", "train", config, "--crops", options.crops, "--init", INIT, "--out", out]
        subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), "-m", *command, "--threads", threads],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            check=True,
        )
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss_named"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=Path, required=True, help="training crops with class people")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    alone = losses("alone", 0, 1, options)
    shared = losses("shared", 0, 2, options)
    other = losses("other-seed", 1, 1, options)
    print(f"{os.cpu_count()} cores; mean loss of every {EACH} steps")
    print("| step | 1 × 96 | 2 × 48 | 1 × 96, another seed |")
    print("| ---: | ---: | ---: | ---: |")
    for number, cells in enumerate(zip(alone, shared, other, strict=True), start=1):
        print(f"| {EACH * number} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    by_sharing, by_chance = (np.abs(one - alone).mean() for one in (shared, other))
    print(f"\nmean difference: of two processes {by_sharing:.3f}, of another seed {by_chance:.3f}")


if __name__ == "__main__":
    main()
