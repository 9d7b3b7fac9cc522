"""How long the service takes from its command to ready: `python -m bench.start`.

With nobody enrolled, and with 50,000 templates. The files are in the system's cache, as after an update of the service.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from bench import harness
from service.settings import Settings
from tests.support import Server

EMPTY_SECONDS, FULL_SECONDS = 3, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=50_000)
    parser.add_argument("--starts", type=int, default=5)
    asked = parser.parse_args()
    print(harness.machine(Settings()))
    with tempfile.TemporaryDirectory() as temporary:
        full = Path(temporary) / "full"
        harness.fill(full, asked.templates)
        for name, folder, most in (
            ("empty", Path(temporary) / "empty", EMPTY_SECONDS),
            (f"{asked.templates:,} templates", full, FULL_SECONDS),
        ):
            times = []
            for _ in range(asked.starts):
                started = time.monotonic()
                with Server(folder):
                    times.append(time.monotonic() - started)
            print(
                f"{name}: ready after {statistics.median(times):.2f} s, longest {max(times):.2f} s (at most {most} s)"
            )


if __name__ == "__main__":
    main()
