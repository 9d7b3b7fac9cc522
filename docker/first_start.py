"""Start the installed service once, ask it for a page, faces and a picture, and stop it: while an image is built.

What is missing from the image shows here, and Python leaves the compiled form of every module that is loaded.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg  # noqa: F401
from PIL import Image

URL = f"http://127.0.0.1:{os.environ.get('VULTUS_PORT', '8000')}"


def main() -> None:
    """See the module's text."""
    process = subprocess.Popen([str(Path(sys.executable).with_name("vultus")), "serve"])
    try:
        for _ in range(600):
            try:
                httpx.get(f"{URL}/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise SystemExit("the service does not start") from None
                time.sleep(0.1)
        httpx.get(f"{URL}/docs").raise_for_status()
        photo = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(photo, "JPEG")
        httpx.post(f"{URL}/detect", files={"image": ("grey.jpg", photo.getvalue())}, timeout=60).raise_for_status()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    main()
