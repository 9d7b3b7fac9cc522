"""The queue in front of the embedder: who shares a run, who waits, who is told when it fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import NotReady
from service.vision.batcher import Batcher
from service.vision.embedder import Embedder

MODELS = Path(__file__).parents[2] / "models"
WAIT = 10
"""Seconds after which a future is taken for forgotten."""


def numbered(*numbers: int, size: int = 4) -> NDArray[np.uint8]:
    """One crop for each number, filled with it."""
    filled = np.array(numbers, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(filled, (len(numbers), size, size, 3)).copy()


def numbers_of(embeddings: NDArray[np.float32]) -> list[int]:
    return [int(row[0]) for row in embeddings]


class Engine:
    """A tiny embedder: a crop's embedding is its number and its size. It can be held, and made to fail.

    ``sizes``: how many crops each run had. ``poison``: a number whose run raises ``error``.
    """

    def __init__(self, poison: int = -1, error: BaseException | None = None) -> None:
        self.sizes: list[int] = []
        self.started = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self._poison = poison
        self._error = error or ZeroDivisionError("poison")

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.started.set()
        assert self.go.wait(WAIT)
        self.sizes.append(len(crops))
        if (crops == self._poison).any():
            raise self._error
        numbers = crops[:, 0, 0, 0].astype(np.float32)
        return np.stack([numbers, np.full_like(numbers, crops.shape[1])], axis=1)

    def hold(self, batcher: Batcher) -> Future[NDArray[np.float32]]:
        """Occupy the worker with crop number 0 until ``go`` is set."""
        self.go.clear()
        self.started.clear()
        future = batcher.submit(numbered(0))
        assert self.started.wait(WAIT)
        return future


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_batch=8)
    yield batcher
    engine.go.set()
    batcher.close()


def test_a_lone_submission_is_embedded(batcher: Batcher, engine: Engine) -> None:
    embeddings = batcher.submit(numbered(3, 1, 2)).result(WAIT)
    assert numbers_of(embeddings) == [3, 1, 2]
    assert embeddings.dtype == np.float32
    assert engine.sizes == [3]


def test_who_comes_alone_is_embedded_on_his_own_thread(batcher: Batcher, engine: Engine) -> None:
    threads: list[threading.Thread] = []

    def embed(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        threads.append(threading.current_thread())
        return engine(crops)

    alone = Batcher(embed, max_batch=8)
    assert numbers_of(alone.embed(numbered(3, 1, 2))) == [3, 1, 2]
    assert threads == [threading.current_thread()]
    # More than a batch is for the workers, who split it.
    assert numbers_of(alone.embed(numbered(*range(9)))) == list(range(9))
    assert engine.sizes == [3, 8, 1]
    assert threading.current_thread() not in threads[1:]
    alone.close()
    with pytest.raises(NotReady):
        alone.embed(numbered(1))
    with pytest.raises(ValueError, match="crops must be"):
        batcher.embed(np.zeros((4, 4, 3), np.uint8))


def test_who_comes_to_a_busy_embedder_shares_a_run(batcher: Batcher, engine: Engine) -> None:
    first = engine.hold(batcher)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(batcher.embed, numbered(number)) for number in range(1, 5)]
        while batcher.waiting < 4:
            assert not first.done()
        engine.go.set()
        assert [numbers_of(other.result(WAIT)) for other in others] == [[1], [2], [3], [4]]
    assert engine.sizes == [1, 4]


def test_runs_on_a_callers_thread_count_among_those_at_once(engine: Engine) -> None:
    batcher = Batcher(engine, max_batch=8)
    engine.go.clear()
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(batcher.embed, numbered(1))
        assert engine.started.wait(WAIT)
        later = [batcher.submit(numbered(number)) for number in (2, 3)]
        closing = threading.Thread(target=batcher.close)
        closing.start()
        closing.join(0.05)
        # The worker has not begun, or it would not be waiting.
        assert batcher.waiting == 2
        assert closing.is_alive()
        engine.go.set()
        assert numbers_of(alone.result(WAIT)) == [1]
        assert [numbers_of(future.result(WAIT)) for future in later] == [[2], [3]]
    closing.join(WAIT)
    assert not closing.is_alive()
    assert engine.sizes == [1, 2]


def test_a_failed_run_on_a_callers_thread_frees_its_place() -> None:
    batcher = Batcher(Engine(poison=13), max_batch=4)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="poison"):
            batcher.embed(numbered(13))
    assert batcher.alive
    assert numbers_of(batcher.embed(numbered(4))) == [4]
    assert numbers_of(batcher.submit(numbered(5)).result(WAIT)) == [5]
    batcher.close()


def test_submissions_that_wait_share_a_run(batcher: Batcher, engine: Engine) -> None:
    first = engine.hold(batcher)
    futures = [batcher.submit(numbered(2 * i, 2 * i + 1)) for i in range(5)]
    assert batcher.waiting == 10
    engine.go.set()
    assert numbers_of(first.result(WAIT)) == [0]
    assert [numbers_of(future.result(WAIT)) for future in futures] == [[2 * i, 2 * i + 1] for i in range(5)]
    assert engine.sizes == [1, 8, 2]
    assert batcher.waiting == 0


def test_a_submission_may_be_spread_over_runs(batcher: Batcher, engine: Engine) -> None:
    engine.hold(batcher)
    small, large = batcher.submit(numbered(1, 2, 3)), batcher.submit(numbered(*range(10, 17)))
    engine.go.set()
    assert numbers_of(small.result(WAIT)) == [1, 2, 3]
    assert numbers_of(large.result(WAIT)) == list(range(10, 17))
    assert engine.sizes == [1, 8, 2]


def test_more_than_a_batch_takes_several_runs(batcher: Batcher, engine: Engine) -> None:
    assert numbers_of(batcher.submit(numbered(*range(25))).result(WAIT)) == list(range(25))
    assert engine.sizes == [8, 8, 8, 1]


def test_what_is_left_of_a_large_submission_counts_as_waiting(batcher: Batcher, engine: Engine) -> None:
    engine.go.clear()
    large = batcher.submit(numbered(*range(20)))
    assert engine.started.wait(WAIT)
    assert batcher.waiting == 12
    engine.go.set()
    assert len(large.result(WAIT)) == 20


def test_crops_of_two_sizes_do_not_share_a_run(batcher: Batcher, engine: Engine) -> None:
    engine.hold(batcher)
    futures = [batcher.submit(numbered(1, size=size)) for size in (4, 4, 6, 4)]
    engine.go.set()
    assert [int(future.result(WAIT)[0, 1]) for future in futures] == [4, 4, 6, 4]
    assert engine.sizes == [1, 2, 1, 1]


def test_no_crops_give_no_embeddings(batcher: Batcher) -> None:
    assert batcher.submit(numbered()).result(WAIT).shape == (0, 2)


def test_nobody_shares_the_memory_of_a_result(batcher: Batcher, engine: Engine) -> None:
    engine.hold(batcher)
    one, other = batcher.submit(numbered(1)), batcher.submit(numbered(2))
    engine.go.set()
    assert one.result(WAIT).base is None
    assert not np.shares_memory(one.result(WAIT), other.result(WAIT))


@pytest.mark.parametrize(
    "crops",
    [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 3, 4, 4), np.uint8)],
)
def test_what_is_not_crops_is_refused(batcher: Batcher, crops: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="crops must be"):
        batcher.submit(crops)


def test_a_failed_run_fails_for_everyone_in_it_and_for_nobody_else() -> None:
    engine = Engine(poison=13)
    batcher = Batcher(engine, max_batch=4)
    first = engine.hold(batcher)
    together = [batcher.submit(numbered(1, 2)), batcher.submit(numbered(13)), batcher.submit(numbered(3))]
    after = batcher.submit(numbered(4, 5))
    engine.go.set()
    for future in together:
        with pytest.raises(ZeroDivisionError, match="poison"):
            future.result(WAIT)
    assert numbers_of(first.result(WAIT)) == [0]
    assert numbers_of(after.result(WAIT)) == [4, 5]
    assert engine.sizes == [1, 4, 2]
    assert batcher.alive
    batcher.close()


def test_a_submission_that_failed_in_part_is_not_run_on() -> None:
    engine = Engine(poison=13)
    batcher = Batcher(engine, max_batch=4)
    engine.hold(batcher)
    spread, after = batcher.submit(numbered(1, 2, 13, *range(20, 40))), batcher.submit(numbered(4))
    engine.go.set()
    with pytest.raises(ZeroDivisionError):
        spread.result(WAIT)
    assert numbers_of(after.result(WAIT)) == [4]
    assert engine.sizes == [1, 4, 1]
    batcher.close()


def test_a_submission_whose_last_part_fails_fails_once() -> None:
    engine = Engine(poison=13)
    batcher = Batcher(engine, max_batch=4)
    engine.hold(batcher)
    spread, sharing = batcher.submit(numbered(1, 2, 3, 4, 5)), batcher.submit(numbered(13))
    engine.go.set()
    for future in (spread, sharing):
        with pytest.raises(ZeroDivisionError):
            future.result(WAIT)
    assert numbers_of(batcher.submit(numbered(6)).result(WAIT)) == [6]
    batcher.close()


def test_an_embedder_that_loses_a_crop_is_an_error() -> None:
    batcher = Batcher(lambda crops: np.zeros((len(crops) - 1, 2), np.float32), max_batch=4)
    with pytest.raises(RuntimeError, match="2 crops gave 1 embeddings"):
        batcher.submit(numbered(1, 2)).result(WAIT)
    assert batcher.alive
    batcher.close()


def test_a_cancelled_submission_is_not_run(batcher: Batcher, engine: Engine) -> None:
    engine.hold(batcher)
    given_up, kept = batcher.submit(numbered(*range(1, 10))), batcher.submit(numbered(10))
    assert given_up.cancel()
    assert batcher.waiting == 1
    late = batcher.submit(numbered(11))
    engine.go.set()
    assert numbers_of(kept.result(WAIT)) == [10]
    assert numbers_of(late.result(WAIT)) == [11]
    with pytest.raises(CancelledError):
        given_up.result(WAIT)
    assert engine.sizes == [1, 2]


def test_a_submission_that_runs_cannot_be_cancelled(batcher: Batcher, engine: Engine) -> None:
    running = engine.hold(batcher)
    assert not running.cancel()
    engine.go.set()
    assert numbers_of(running.result(WAIT)) == [0]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_nobody_waits_for_a_dead_worker(error: BaseException) -> None:
    engine = Engine(poison=13, error=error)
    batcher = Batcher(engine, max_batch=2)
    first = engine.hold(batcher)
    given_up = batcher.submit(numbered(1))
    given_up.cancel()
    running = batcher.submit(numbered(2))
    spread = batcher.submit(numbered(13, 3, 4, 5))
    behind = [batcher.submit(numbered(6)) for _ in range(3)]
    gone = batcher.submit(numbered(7))
    gone.cancel()
    engine.go.set()
    assert numbers_of(first.result(WAIT)) == [0]
    for future in [running, spread, *behind]:
        with pytest.raises(NotReady) as caught:
            future.result(WAIT)
        assert caught.value.__cause__ is error
    assert not batcher.alive
    assert batcher.waiting == 0
    with pytest.raises(NotReady):
        batcher.submit(numbered(1))
    batcher.close()


def test_close_finishes_what_is_queued(batcher: Batcher, engine: Engine) -> None:
    first = engine.hold(batcher)
    futures = [batcher.submit(numbered(i, i)) for i in range(1, 6)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(NotReady):
        batcher.submit(numbered(1))
    assert not any(future.done() for future in [first, *futures])
    engine.go.set()
    closing.join(WAIT)
    assert all(future.done() for future in [first, *futures])
    assert [numbers_of(future.result()) for future in futures] == [[i, i] for i in range(1, 6)]
    batcher.close()
    assert not batcher.alive


def test_a_callback_may_submit(batcher: Batcher) -> None:
    second: Future[Future[NDArray[np.float32]]] = Future()
    batcher.submit(numbered(1)).add_done_callback(lambda _: second.set_result(batcher.submit(numbered(2))))
    assert numbers_of(second.result(WAIT).result(WAIT)) == [2]


@pytest.mark.parametrize(("max_batch", "workers"), [(0, 1), (1, 0), (-1, 5)])
def test_limits_are_positive(max_batch: int, workers: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(Engine(), max_batch, workers)


class Meeting:
    """An embedder of which two runs must be in progress at once."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._barrier.wait(WAIT)
        return crops[:, 0, 0, :2].astype(np.float32)


def test_two_workers_run_at_once() -> None:
    batcher = Batcher(Meeting(), max_batch=1, workers=2)
    one, other = batcher.submit(numbered(1)), batcher.submit(numbered(2))
    assert [numbers_of(future.result(WAIT)) for future in (one, other)] == [[1], [2]]
    batcher.close()


def test_two_workers_share_a_large_submission() -> None:
    batcher = Batcher(Meeting(), max_batch=2, workers=2)
    assert numbers_of(batcher.submit(numbered(*range(8))).result(WAIT)) == list(range(8))
    batcher.close()


def test_when_one_worker_dies_nobody_waits_for_the_others() -> None:
    engine = Engine(poison=13, error=SystemExit(1))
    batcher = Batcher(engine, max_batch=1, workers=2)
    held = engine.hold(batcher)
    engine.started.clear()
    deadly = batcher.submit(numbered(13))
    assert engine.started.wait(WAIT)
    behind = batcher.submit(numbered(2))
    engine.go.set()
    with pytest.raises(NotReady):
        deadly.result(WAIT)
    for future in (held, behind):
        # Either it was embedded before the other worker died, or it is told.
        assert future.exception(WAIT) is None or isinstance(future.exception(), NotReady)
    assert not batcher.alive
    batcher.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_many_threads_get_their_own(workers: int) -> None:
    batcher = Batcher(Engine(poison=255), max_batch=7, workers=workers)

    def client(seed: int) -> dict[str, int]:
        chance = random.Random(seed)
        seen = dict.fromkeys(("embedded", "failed", "cancelled"), 0)
        for _ in range(150):
            numbers = [chance.randrange(250) for _ in range(chance.randrange(0, 20))]
            crops = numbered(*numbers, *([255] if chance.random() < 0.02 else []))
            future = batcher.submit(crops)
            if chance.random() < 0.1 and future.cancel():
                seen["cancelled"] += 1
                continue
            try:
                assert numbers_of(future.result(WAIT)) == numbers
                seen["embedded"] += 1
            except ZeroDivisionError:
                seen["failed"] += 1
        return seen

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(client, range(8)))
    batcher.close()
    total = {key: sum(outcome[key] for outcome in outcomes) for key in outcomes[0]}
    assert sum(total.values()) == 8 * 150
    assert all(total.values()), total


def test_with_the_bundled_embedder() -> None:
    embedder = Embedder.load(MODELS / "dlib-resnet", threads=2)
    batcher = Batcher(embedder.embed, max_batch=4)
    crops = np.random.default_rng(6).integers(0, 256, (9, 150, 150, 3), dtype=np.uint8)
    futures = [batcher.submit(crops[start:end]) for start, end in ((0, 1), (1, 3), (3, 8), (8, 9))]
    result = np.concatenate([future.result(WAIT) for future in futures])
    np.testing.assert_allclose(result, embedder.embed(crops), atol=1e-5)
    batcher.close()
