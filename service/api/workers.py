"""How much photo work is in progress at once, and the end of patience."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect

from service.errors import InvalidRequest, Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """Runs photo work in threads, ``threads`` at a time; ``max_queue`` requests in all may be in progress."""

    def __init__(self, threads: int, max_queue: int) -> None:
        self._limiter = CapacityLimiter(threads)
        self._max_queue = max_queue
        self._alone = CapacityLimiter(1)
        self._occupied = False
        self.in_progress = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold a request's place from before its body is read. Raises ``Overloaded`` when all are taken."""
        if self.in_progress >= self._max_queue:
            raise Overloaded("Every place is taken; try again shortly.", headers={"retry-after": "1"})
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a thread of its own and return what it returns."""
        return await to_thread.run_sync(lambda: work(*args, **kwargs), limiter=self._limiter)

    @asynccontextmanager
    async def admitted_alone(self) -> AsyncIterator[None]:
        """Hold the one place there is for work of minutes. Raises ``Overloaded`` when it is taken."""
        if self._occupied:
            raise Overloaded("An evaluation is in progress; try again when it is done.", headers={"retry-after": "30"})
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
