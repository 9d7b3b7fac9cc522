"""Whether the service grows: photos of 200 sizes, people enrolled, identified and deleted, for half an hour.

    python -m bench.soak --photos DIR [--minutes 30]

Each minute a line of what the process holds: resident memory, threads, open files. A look catches more or fewer photos
in progress, so that the mean of the last five minutes is compared with that of the five from minute 5 on: at most 5 %
more. Then the service is left alone for half a minute; no thread or file more than at minute 5 may be left.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from bench import harness
from service.settings import Settings
from tests.support import Server

SIZES, SHORTEST, LONGEST = 200, 120, 2400
CLIENTS = 4
PEOPLE = 200
REST = 30.0


def made(folder: Path, chance: random.Random) -> list[bytes]:
    """Return one photo of each of :data:`SIZES` sizes: those of the folder, brought to a random width, edges cut."""
    paths = harness.photos(folder, SIZES)
    found = []
    for number in range(SIZES):
        with Image.open(paths[number % len(paths)]) as opened:
            image = opened.convert("RGB")
        factor = chance.uniform(SHORTEST, LONGEST) / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)))
        cut = [chance.uniform(0, 0.1) * side for side in image.size]
        image = image.crop((round(cut[0]), round(cut[1]), round(image.width - cut[0]), round(image.height - cut[1])))
        image.thumbnail((LONGEST, LONGEST))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=chance.randrange(70, 95))
        found.append(buffer.getvalue())
    return found


class Users:
    """Clients who enrol, identify and delete, ``rate`` calls a second in all, until told to stop."""

    def __init__(self, url: str, photos: list[bytes], rate: float) -> None:
        self.answers: Counter[str] = Counter()
        self._url, self._photos, self._pause = url, photos, CLIENTS / rate
        self._enrolled: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._use, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _use(self, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                due = max(due, time.monotonic() - 1) + self._pause
                call, answer = self._call(client, chance)
                with self._lock:
                    self.answers[f"{call} {answer.status_code}"] += 1

    def _call(self, client: httpx.Client, chance: random.Random) -> tuple[str, httpx.Response]:
        photo = ("photo", chance.choice(self._photos))
        with self._lock:
            full = len(self._enrolled) >= PEOPLE
            call = chance.choices(("identify", "enroll", "delete"), (6, 1 if full else 3, 3 if full else 1))[0]
            name = self._enrolled.pop(chance.randrange(len(self._enrolled))) if call == "delete" and full else None
        if name is not None:
            return "delete", client.delete(f"/subjects/{name}")
        if call == "enroll":
            name = f"person {chance.randrange(10**9)}"
            # The same people come under many names.
            data = {"subject": name, "allow_conflict": "true"}
            answer = client.post("/enroll", data=data, files={"images": photo})
            if answer.status_code == 201:
                with self._lock:
                    self._enrolled.append(name)
            return call, answer
        return "identify", client.post("/identify", files={"image": photo})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=harness.ROOT / "tests" / "images", help="folder of photos")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--rate", type=float, default=10, help="calls a second")
    asked = parser.parse_args()
    photos = made(asked.photos, random.Random(0))
    sizes = f"{min(map(len, photos)) // 1000} to {max(map(len, photos)) // 1000} kB"
    print(f"{harness.machine(Settings())}; {len(photos)} photos, {sizes}; {asked.rate:g} calls a second", flush=True)
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "data") as server:
        assert server.process is not None
        pid = server.process.pid
        show("ready", harness.held(pid))
        users = Users(server.url, photos, asked.rate)
        started = time.monotonic()
        looks: list[harness.Held] = []
        try:
            for minute in range(1, asked.minutes + 1):
                time.sleep(max(0.0, started + 60 * minute - time.monotonic()))
                looks.append(harness.held(pid))
                show(f"minute {minute}", looks[-1])
        finally:
            users.stop()
        time.sleep(REST)
        left = harness.held(pid)
        show("left alone", left)
        print("answers:", ", ".join(f"{name}: {count}" for name, count in sorted(users.answers.items())))
        fifth = looks[min(4, len(looks) - 1)]
        before, after = (statistics.mean(look.memory for look in part) for part in (looks[4:9] or looks, looks[-5:]))
        print(f"memory after minute 5: {100 * (after / before - 1):+.1f} % (at most +5 %)")
        print(f"threads {left.threads - fifth.threads:+d}, files {left.files - fifth.files:+d} (none left behind)")


def show(when: str, held: harness.Held) -> None:
    print(f"{when}: {held.memory / 2**20:.0f} MiB, {held.threads} threads, {held.files} files", flush=True)


if __name__ == "__main__":
    main()
