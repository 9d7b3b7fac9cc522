"""Who is admitted, who waits, and who is told to come back when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from service.api.workers import Workers
from service.errors import Overloaded


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


@asynccontextmanager
async def occupied(workers: Workers) -> AsyncIterator[None]:
    """Occupy one thread of the workers."""
    go, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        go.wait()

    task = asyncio.create_task(workers.run(work))
    await started.wait()
    try:
        yield
    finally:
        go.set()
        await task


def test_what_waits_too_long_is_refused_and_never_run() -> None:
    async def test() -> None:
        workers = Workers(threads=1, max_queue=9, max_wait=0.01, max_bytes=9)
        ran: list[int] = []
        async with occupied(workers):
            with pytest.raises(Overloaded) as caught:
                await workers.run(lambda: ran.append(1))
            assert int(caught.value.headers["retry-after"]) >= 1
        await workers.run(lambda: ran.append(2))
        assert ran == [2]

    run(test)


def test_turns_come_in_order() -> None:
    async def test() -> None:
        workers = Workers(threads=1, max_queue=9, max_wait=60, max_bytes=9)
        ran: list[int] = []
        async with asyncio.TaskGroup() as group, occupied(workers):
            for number in range(5):
                group.create_task(workers.run(lambda number=number: ran.append(number)))
                await asyncio.sleep(0)
            assert ran == []
        assert ran == [0, 1, 2, 3, 4]

    run(test)


def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_come() -> None:
    async def test() -> None:
        workers = Workers(threads=1, max_queue=99, max_wait=0.5, max_bytes=9)
        for _ in range(20):
            await workers.run(lambda: threading.Event().wait(0.05))
        async with AsyncExitStack() as stack:
            with pytest.raises(Overloaded):
                for _ in range(40):
                    await stack.enter_async_context(workers.admitted())
            # At about 35 ms each it is some fifteen who fit into half a second.
            assert 3 < workers.in_progress < 40
        assert workers.in_progress == 0
        async with workers.admitted():
            pass

    run(test)


def test_bytes_of_all_bodies_are_bounded_together() -> None:
    async def test() -> None:
        workers = Workers(threads=1, max_queue=9, max_wait=1, max_bytes=100)
        async with workers.admitted() as one, workers.admitted() as other:
            one.hold(60)
            one.hold(60)
            one.hold(10)
            other.hold(40)
            with pytest.raises(Overloaded):
                other.hold(41)
            with pytest.raises(Overloaded):
                one.hold(61)
        async with workers.admitted() as place:
            place.hold(100)

    run(test)


def test_work_that_fails_gives_its_thread_back() -> None:
    async def test() -> None:
        workers = Workers(threads=1, max_queue=9, max_wait=0.5, max_bytes=9)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await workers.run(lambda: 1 // 0)
        assert await workers.run(lambda: 7) == 7

    run(test)
