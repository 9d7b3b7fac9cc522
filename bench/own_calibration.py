"""How long a gallery's own calibration takes: `python -m bench.own_calibration`.

The start with 50,000 templates, an enrolment and a deletion in a gallery of 100,000, and a look-up.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from numpy.typing import NDArray

from bench.harness import Strangers
from service.calibration import Calibration
from service.domain import IndexEntries, Members
from service.own_calibration import OwnCalibrations
from service.settings import BUNDLED_MODELS

SUBJECTS, EACH, STARTING, DIMENSION, CHANGES, LOOK_UPS = 100_000, 3, 50_000, 128, 200, 2000
SAMPLED = 950


def main() -> None:
    generator = np.random.default_rng(0)
    calibration = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")
    strangers = Strangers(DIMENSION, generator)

    def entries(row_ids: NDArray[np.int64]) -> IndexEntries:
        return IndexEntries("g", row_ids, row_ids // EACH, strangers.more(len(row_ids)))

    def fetch(row_ids: object) -> NDArray[np.float32]:
        return entries(np.asarray(row_ids, np.int64)).embeddings

    def started(templates: int) -> tuple[OwnCalibrations, float]:
        own = OwnCalibrations(calibration, fetch)
        row_ids = np.arange(templates, dtype=np.int64)
        begin = time.perf_counter()
        own.load(Members("g", row_ids, row_ids // EACH))
        return own, time.perf_counter() - begin

    print(f"start with {STARTING:,} templates: {started(STARTING)[1]:.2f} s")
    own, seconds = started(SUBJECTS * EACH)
    print(f"start with {SUBJECTS:,} subjects, {EACH} templates each: {seconds:.2f} s")
    timed: dict[str, list[float]] = {"enrolment": [], "deletion": []}
    for change in range(CHANGES):
        batch = entries(np.arange(EACH, dtype=np.int64) + EACH * (SUBJECTS + change))
        begin = time.perf_counter()
        own.add(batch)
        timed["enrolment"].append(time.perf_counter() - begin)
    for change in range(CHANGES):
        begin = time.perf_counter()
        own.remove("g", list(range(EACH * change, EACH * change + EACH)))
        timed["deletion"].append(time.perf_counter() - begin)
    for name, times in timed.items():
        print(f"{name}: median {1e3 * statistics.median(times):.1f} ms, longest {1e3 * max(times):.1f} ms")
    sample = started(3 * SAMPLED)[0]
    times = []
    for change in range(CHANGES):
        batch = entries(np.arange(EACH, dtype=np.int64) + EACH * (SAMPLED + change))
        begin = time.perf_counter()
        sample.add(batch)
        times.append(time.perf_counter() - begin)
        sample.remove("g", batch.row_ids.tolist())
    print(f"enrolment that changes the sample: median {1e3 * statistics.median(times):.1f} ms")
    point = calibration.identification_point(0.01, SUBJECTS, EACH * SUBJECTS)
    begin = time.perf_counter()
    for _ in range(LOOK_UPS):
        found = own.combined(point, "g", "stricter", SUBJECTS, EACH * SUBJECTS)
    print(f"look-up: {1e6 * (time.perf_counter() - begin) / LOOK_UPS:.1f} µs, {found}")


if __name__ == "__main__":
    main()
