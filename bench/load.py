"""How near HTTP comes to the pipeline itself, and what becomes of too much load.

    python -m bench.load --photos DIR

`/identify` on photos of one face each, from DIR, with 10,000 people enrolled; the service and the client share the
cores. It needs `wrk`. Three parts:

- capacity: the recogniser called from threads in this process, and the service asked by wrk with 8 connections, in
  turns; the ratio of the medians.
- at 80 % of that: requests at a constant rate, whatever the answers do; p50 and p99 from when each was due.
- overload: four times the capacity for a while, then the light rate again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import harness
from service.app import configure_logging, open_parts
from service.domain import DEFAULT_GALLERY
from service.recognizer import Recognizer
from service.settings import Settings
from tests.support import Server

SCRIPT = Path(__file__).with_name("identify.lua")
CALLERS = (2, 4, 8)
BOUNDARY = "vultus-bench-7d1f"
IDLE = 3.0
"""Seconds after which a connection is not used again."""


@dataclass(frozen=True)
class Answer:
    """``waited``: seconds from when the request was due to the end of its answer. ``at``: when it was due."""

    at: float
    waited: float
    status: int
    retry_after: str | None


def in_process(recognizer: Recognizer, photos: Sequence[bytes], threads: int, seconds: float) -> float:
    """Return photos per second that ``threads`` callers get from the recogniser."""
    end = time.perf_counter() + seconds

    def call(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            recognizer.identify(photos[(first + done) % len(photos)], DEFAULT_GALLERY, None, 5)
            done += 1
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(call, range(0, threads * 7, 7)))
    return done / (time.perf_counter() - started)


def wrk(url: str, files: Sequence[Path], clients: int, seconds: float) -> dict[str, float]:
    """Return what wrk found with ``clients`` connections that ask without a pause."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "-s", str(SCRIPT), url, "--", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"wrk: {done.stderr or done.stdout}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = (found["answers"] - found["refused"]) / found["seconds"]
    return found


def requests_of(photos: Sequence[bytes]) -> list[bytes]:
    """Return each photo's request, ready to send."""
    made = []
    for photo in photos:
        body = (
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="image"; filename="photo"\r\n\r\n'.encode()
            + photo
            + f"\r\n--{BOUNDARY}--\r\n".encode()
        )
        head = (
            f"POST /identify HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
            f"content-type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


async def at_rate(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> list[Answer]:
    """Send ``rate`` requests a second at even distances, each on a connection of its own that is free by then."""
    free: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
    answers: list[Answer] = []
    start = time.perf_counter() + 0.05

    async def ask(number: int) -> None:
        due = number / rate
        # The service closes connections that were idle for five seconds; those that are used are the last of the list.
        while free and time.perf_counter() - free[0][0] > IDLE:
            free.pop(0)[2].close()
        _, reader, writer = free.pop() if free else (0.0, *await asyncio.open_connection("127.0.0.1", port))
        writer.write(requests[number % len(requests)])
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        await reader.readexactly(int(fields["content-length"]))
        waited = time.perf_counter() - start - due
        answers.append(Answer(due, waited, int(head.split(" ", 2)[1]), fields.get("retry-after")))
        if fields.get("connection") == "close":
            writer.close()
        else:
            free.append((time.perf_counter(), reader, writer))

    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            group.create_task(ask(number))
    for *_, writer in free:
        writer.close()
    return answers


def times(answers: Sequence[Answer]) -> str:
    """Describe the waiting times of answers."""
    waited = [1e3 * answer.waited for answer in answers]
    p50, p99 = np.percentile(waited, [50, 99])
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.2f} × p50), longest {max(waited):.1f} ms"


def one_face(recognizer: Recognizer, paths: Sequence[Path]) -> list[Path]:
    """Return those photos that show one face."""
    return [path for path in paths if len(recognizer.detect(path.read_bytes())) == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=harness.ROOT / "tests" / "images", help="folder of photos")
    parser.add_argument("--gallery", type=int, default=10_000, help="people enrolled")
    # The 99th percentile of a few dozen would be that of the slowest one.
    parser.add_argument("--different", type=int, default=1000, help="photos, evenly drawn from those of the folder")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the first part")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("here", "served"):
            harness.fill(folder / name, asked.gallery)
        settings = Settings(data_dir=folder / "here")
        configure_logging("error")
        with open_parts(settings) as parts, Server(folder / "served") as server:
            recognizer = parts.recognizer
            files = one_face(recognizer, harness.photos(asked.photos, asked.different))
            photos = [path.read_bytes() for path in files]
            kilobytes = statistics.mean(map(len, photos)) / 1e3
            print(f"{harness.machine(settings)}; {asked.gallery:,} people")
            print(f"{len(files)} photos of one face, {kilobytes:.0f} kB on average; {asked.clients} clients")
            capacity = capacity_of(recognizer, server, files, photos, asked)
            requests = requests_of(photos)
            light(server, requests, 0.8 * capacity, asked.seconds)
            overload(server, requests, capacity, asked.seconds)
            light(server, requests, 0.8 * capacity, asked.seconds / 2)


def capacity_of(
    recognizer: Recognizer, server: Server, files: Sequence[Path], photos: Sequence[bytes], asked: argparse.Namespace
) -> float:
    """Print both rates and their ratio; return that of HTTP."""
    here: dict[int, list[float]] = {threads: [] for threads in CALLERS}
    served = []
    wrk(server.url, files, asked.clients, 3)
    assert server.process is not None
    served_before, here_before = harness.cpu_seconds(server.process.pid), time.process_time()
    for _ in range(asked.rounds):
        for threads, found in here.items():
            found.append(in_process(recognizer, photos, threads, asked.seconds))
        served.append(wrk(server.url, files, asked.clients, asked.seconds))
    here_cpu = (time.process_time() - here_before) / sum(map(sum, here.values())) / asked.seconds
    served_cpu = (harness.cpu_seconds(server.process.pid) - served_before) / sum(found["answers"] for found in served)
    best = max(statistics.median(found) for found in here.values())
    rates = [found["rate"] for found in served]
    for threads, found in here.items():
        print(f"in-process, {threads} callers: {statistics.median(found):.1f} faces/s  ({_list(found)})")
    print(f"HTTP, {asked.clients} clients: {statistics.median(rates):.1f} faces/s  ({_list(rates)})")
    last = served[-1]
    print(f"  p50 {1e3 * last['p50']:.1f} ms, p99 {1e3 * last['p99']:.1f} ms, errors {last['errors']:.0f}")
    print(f"processor time of a face: {1e3 * here_cpu:.1f} ms in-process, {1e3 * served_cpu:.1f} ms of the service")
    print(f"ratio to the best of those in-process: {statistics.median(rates) / best:.3f} (at least 0.85)")
    return statistics.median(rates)


def light(server: Server, requests: Sequence[bytes], rate: float, seconds: float) -> None:
    """Print the waiting times at a rate that the service can keep up with."""
    answers = asyncio.run(at_rate(server.port, requests, rate, seconds))
    refused = sum(answer.status != 200 for answer in answers)
    print(f"at {rate:.1f}/s: {times(answers)}; {refused} of {len(answers)} refused (p99 at most 3 × p50)")


def overload(server: Server, requests: Sequence[bytes], capacity: float, seconds: float) -> None:
    """Print what is accepted and what refused at four times the capacity."""
    answers = asyncio.run(at_rate(server.port, requests, 4 * capacity, seconds))
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    # The first second fills the queue; what is answered after the end was accepted before it.
    steady = [answer for answer in accepted if 1 <= answer.at + answer.waited < seconds]
    rate = len(steady) / (seconds - 1)
    print(f"at {4 * capacity:.1f}/s: {len(accepted)} accepted, {len(refused)} refused, of {len(answers)}")
    print(f"  accepted: {rate:.1f}/s, {rate / capacity:.3f} of the capacity (at least 0.85); {times(accepted)}")
    print(f"  refused: {times(refused)}; Retry-After {sorted({answer.retry_after for answer in refused})}")


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()
