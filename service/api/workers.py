"""How much photo work is in progress at once, how long it may wait, and the end of patience."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect

from service.errors import InvalidRequest, Overloaded

T = TypeVar("T")

_WEIGHT = 1 / 16
"""Weight of the last request in the mean time that one takes."""


class Place:
    """A request's place among those in progress."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.held = 0

    def hold(self, size: int) -> None:
        """Count the body as ``size`` bytes at least. Raises ``Overloaded`` if that is too much."""
        if size > self.held:
            self._workers.take_bytes(size - self.held)
            self.held = size


class Workers:
    """Runs photo work in threads and bounds what waits for them.

    ``threads``: how many run at once. ``max_queue``: most requests in progress, with those whose body is being read.
    ``max_wait``: seconds that one may wait for its turn. ``max_bytes``: most bytes of all their bodies together.
    """

    def __init__(self, threads: int, max_queue: int, max_wait: float, max_bytes: int) -> None:
        self.threads = threads
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._max_bytes = max_bytes
        self._turns = asyncio.Semaphore(threads)
        self._limiter = CapacityLimiter(threads)
        self._alone = CapacityLimiter(1)
        self._occupied = False
        self._bytes = 0
        self._seconds = 0.0
        self.in_progress = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[Place]:
        """Hold a request's place from before its body is read.

        Raises ``Overloaded`` at once when all are taken, or when those before it will take longer than it may wait.
        """
        if self.in_progress >= self._max_queue or self._expected_wait() > self._max_wait:
            raise self._overloaded()
        self.in_progress += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.in_progress -= 1
            self._bytes -= place.held

    def take_bytes(self, count: int) -> None:
        """Count more bytes of bodies. Raises ``Overloaded`` if that is too many."""
        if self._bytes + count > self._max_bytes:
            raise self._overloaded()
        self._bytes += count

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread when its turn comes, and return what it returns.

        Raises ``Overloaded`` when that has not come in time.
        """
        try:
            async with asyncio.timeout(self._max_wait):
                await self._turns.acquire()
        except TimeoutError:
            raise self._overloaded() from None
        started = time.monotonic()
        try:
            return await to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._turns.release()
            self._seconds += _WEIGHT * (time.monotonic() - started - self._seconds)

    @asynccontextmanager
    async def admitted_alone(self) -> AsyncIterator[None]:
        """Hold the one place there is for work of minutes. Raises ``Overloaded`` when it is taken."""
        if self._occupied:
            raise Overloaded(
                "An evaluation or a batch is in progress; try again when it is done.", headers={"retry-after": "30"}
            )
        self._occupied = True
        try:
            yield
        finally:
            self._occupied = False

    async def run_alone(
        self, work: Callable[[Callable[[], None]], T], gone: Callable[[], Awaitable[bool]], seconds: float
    ) -> T:
        """Run work of minutes in a thread beside the others', so that it takes none of their places.

        ``work`` is given a function to call often, which raises when nobody waits any more (``gone``, asked once a
        second) with ``ClientDisconnect``, or after ``seconds`` with ``InvalidRequest``.
        """
        left = threading.Event()
        deadline = time.monotonic() + seconds

        def checkpoint() -> None:
            if left.is_set():
                raise ClientDisconnect
            if time.monotonic() > deadline:
                raise InvalidRequest(f"This took longer than {seconds:g} seconds: send fewer or smaller photos.")

        async def watch() -> None:
            while not await gone():
                await asyncio.sleep(1)
            left.set()

        watcher = asyncio.create_task(watch())
        try:
            return await to_thread.run_sync(lambda: work(checkpoint), limiter=self._alone, abandon_on_cancel=True)
        finally:
            left.set()
            watcher.cancel()

    def _expected_wait(self) -> float:
        """Seconds until the turn of one who comes now."""
        ahead = self.in_progress + 1 - self.threads
        return max(0, ahead) / self.threads * self._seconds

    def _overloaded(self) -> Overloaded:
        seconds = max(1, math.ceil(self._expected_wait()))
        return Overloaded("Every place is taken; try again shortly.", headers={"retry-after": str(seconds)})
