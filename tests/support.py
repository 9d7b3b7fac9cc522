"""The real service as its users meet it: a process of its own, reached over HTTP; and what crops are measured against."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

from service.domain import Crop, Image
from service.vision.alignment import Transform

IMAGES = Path(__file__).parent / "images"
START_SECONDS = 60


def photo(name: str) -> bytes:
    """Return the bytes of a photo in tests/images."""
    return (IMAGES / name).read_bytes()


def supersampled(image: Image, transform: Transform, size: int) -> Crop:
    """The crop with 8×8 samples for each pixel."""
    finer = np.array([[8, 0, 3.5], [0, 8, 3.5], [0, 0, 1]]) @ np.vstack([transform, [0, 0, 1]])
    large = cv2.warpAffine(image, finer[:2], (size * 8, size * 8), flags=cv2.INTER_LINEAR)
    return np.asarray(cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(data_dir: Path, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with only the given ``VULTUS_`` settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VULTUS_")}
    return kept | {"VULTUS_DATA_DIR": str(data_dir)} | dict(settings or {})


def vultus(*arguments: str, data_dir: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the ``vultus`` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        env=environment(data_dir, settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Server:
    """``vultus serve`` on a data folder. A context manager; ``client`` speaks to it."""

    def __init__(self, data_dir: Path, *, key: str | None = None, **settings: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"{data_dir.name}-{self.port}.log"
        self._settings = {"VULTUS_PORT": str(self.port)} | settings
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, timeout=120, headers=headers)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.client.close()

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"],
                env=environment(self.data_dir, self._settings),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the service did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """End the process as an operator would."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """End the process as a power switch would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def enroll(self, subject: str, *names: str | bytes, **fields: str) -> dict[str, Any]:
        """Enrol from photos, by name in tests/images or as bytes; anything but 201 fails the test."""
        answer = self.client.post(
            "/enroll",
            data={"subject": subject, **fields},
            files=[("images", ("photo", _bytes(name))) for name in names],
        )
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def identify(self, name: str | bytes, **fields: Any) -> dict[str, Any]:
        """Identify everybody in a photo; anything but 200 fails the test."""
        answer = self.client.post("/identify", data=fields, files={"image": ("photo", _bytes(name))})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body


def _bytes(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else photo(name)
