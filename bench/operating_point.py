"""How long it takes to look up the operating point of a gallery: `python bench/operating_point.py`."""

from __future__ import annotations

import timeit

from service.calibration import Calibration
from service.settings import BUNDLED_MODELS

SUBJECTS, EACH, TIMES = 100_000, 5, 20_000


def main() -> None:
    calibration = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")
    seconds = timeit.timeit(lambda: calibration.identification_point(0.01, SUBJECTS, EACH * SUBJECTS), number=TIMES)
    point = calibration.identification_point(0.01, SUBJECTS, EACH * SUBJECTS)
    print(f"{SUBJECTS:,} subjects, {EACH} templates each: {point}, looked up in {1e6 * seconds / TIMES:.1f} µs")


if __name__ == "__main__":
    main()
