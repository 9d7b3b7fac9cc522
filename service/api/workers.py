"""How much photo work is in progress at once, and the end of patience."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from service.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """Runs photo work in threads, ``threads`` at a time; ``max_queue`` requests in all may be in progress."""

    def __init__(self, threads: int, max_queue: int) -> None:
        self._limiter = CapacityLimiter(threads)
        self._max_queue = max_queue
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
