"""What was freed is given back, whatever lies between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESIDENT = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
"""

CODE = """
import sys
import numpy as np
from service.app import LARGE_BLOCK, _give_memory_back

if sys.argv[1] == "asked":
    _give_memory_back()
np.ones(2 * LARGE_BLOCK, np.uint8)
before = resident()
# Something small stays behind each large photo, as in a service with many requests.
photos, kept = [], []
for _ in range(20):
    photos.append(np.ones(2 * LARGE_BLOCK, np.uint8))
    kept.append(np.ones(50_000, np.uint8))
del photos
print((resident() - before) // LARGE_BLOCK)
"""


LOOKS = """
import sys
from pathlib import Path
import numpy as np
from service.app import _give_memory_back
from service.vision.detector import FaceDetector
from service.vision.onnx import OnnxModel

_give_memory_back()
if sys.argv[1] == "not asked":
    run = OnnxModel.run
    OnnxModel.run = lambda self, inputs, release=False: run(self, inputs)
detector = FaceDetector.load(Path("models/centerface"))
# Where nobody is, small faces are looked for.
detector.detect(np.zeros((480, 480, 3), np.uint8))
before = resident()
detector.detect(np.zeros((1200, 1600, 3), np.uint8))
print((resident() - before) // 2**20)
"""


def left(how: str, code: str = CODE) -> int:
    """How many large blocks' memory is still held when twenty photos of two blocks are gone; or what ``code`` tells."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT + code, how],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_the_memory_of_large_photos_is_given_back() -> None:
    assert left("asked") <= 1
    # Else this would show nothing.
    assert left("not asked") >= 20


def test_the_memory_of_a_look_at_small_faces_is_given_back() -> None:
    """In MiB."""
    assert left("asked", LOOKS) < 60
    assert left("not asked", LOOKS) > 150
