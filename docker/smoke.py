"""Run the service by compose as a user would, ask it everything once, and print what came.

    python docker/smoke.py

It needs a Docker engine, the image (`docker compose build`), and the test environment (`make test`). It makes a project
of its own name, on port 8123, and removes it with its volume at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "tests" / "images"
PORT = "8123"
# The plugin where there is one, else the program of the same job.
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def compose(*arguments: str) -> str:
    """Run compose on a project of our own and return what it prints."""
    environment = os.environ | {"COMPOSE_PROJECT_NAME": "vultus-smoke", "VULTUS_PORT": PORT}
    done = subprocess.run(
        [*COMPOSE, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def wait(client: httpx.Client) -> float:
    """Return the seconds until the service is ready."""
    started = time.monotonic()
    while time.monotonic() < started + 60:
        try:
            if client.get("/readyz").status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(compose("logs"))


def ask(client: httpx.Client, path: str, *photos: tuple[str, str], **fields: str) -> Any:
    """Send photos, each a field and a file of tests/images, and return the answer."""
    files = [(field, (name, (IMAGES / name).read_bytes())) for field, name in photos]
    answer = client.post(path, data=fields, files=files)
    if answer.status_code >= 400:
        raise SystemExit(f"{path}: {answer.text}")
    return answer.json()


def calls(client: httpx.Client) -> None:
    """Identify, verify and search, and print the answers."""
    for name in ("obama2.jpg", "obama3.jpg", "astronaut.png"):
        (face,) = ask(client, "/identify", ("image", name))["faces"]
        print(f"identify {name}: {face['decision']} {face['subject']}")
    for other in ("obama2.jpg", "biden.jpg"):
        print(
            f"verify obama.jpg {other}: {ask(client, '/verify', ('image_a', 'obama.jpg'), ('image_b', other))['match']}"
        )
    (face,) = ask(client, "/search-similar", ("image", "obama2.jpg"))["faces"]
    print("search-similar by photo:", [item["subject"] for item in face["similar"]])
    answer = client.post("/search-similar", json={"face_id": face["similar"][0]["face_id"]}).json()
    print("search-similar by face_id:", [item["subject"] for item in answer["faces"][0]["similar"]])


def main() -> None:
    """See the module's text."""
    try:
        key = compose("run", "--rm", "vultus", "keys", "add", "smoke", "--role", "admin").strip().splitlines()[-1]
        compose("up", "-d")
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=60) as client:
            print(f"ready after {wait(client):.1f} s")
            print("without a key:", httpx.get(f"http://127.0.0.1:{PORT}/galleries").json()["code"])
            container = compose("ps", "-q").strip()
            memory = subprocess.check_output(["docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", container])
            print("idle memory:", memory.decode().strip())
            ask(client, "/enroll", ("images", "biden.jpg"), subject="Joe Biden")
            photos = ["obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"]
            found = ask(client, "/search-unknown", *[("images", name) for name in photos])
            groups = [[photos[face["image_index"]] for face in group["faces"]] for group in found["unknown"]]
            print("search-unknown, only Joe Biden enrolled:", groups)
            ask(client, "/enroll", ("images", "obama.jpg"), subject="Barack Obama")
            calls(client)
            compose("down")
            compose("up", "-d")
            print(f"down and up again, ready after {wait(client):.1f} s")
            calls(client)
        user = subprocess.check_output(["docker", "exec", compose("ps", "-q").strip(), "id", "-u"])
        print("user:", user.decode().strip())
        size = subprocess.check_output(["docker", "image", "inspect", "--format", "{{.Size}}", "vultus"])
        print(f"image: {int(size) / 1e6:.0f} MB")
    finally:
        compose("down", "--volumes")


if __name__ == "__main__":
    sys.exit(main())
