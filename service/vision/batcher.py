"""One queue in front of the embedder, so that crops of different requests share a run when it is busy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.errors import NotReady

Crops: TypeAlias = NDArray[np.uint8]
"""Aligned crops, ``uint8[N, S, S, 3]``."""

Embeddings: TypeAlias = NDArray[np.float32]
"""``float32[N, D]``, one row for each crop."""


@dataclass(eq=False)
class _Submission:
    """``taken``: how many of its crops have left the queue. ``parts``: embeddings, by their first crop."""

    crops: Crops
    future: Future[Embeddings]
    taken: int = 0
    parts: dict[int, Embeddings] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        return len(self.crops) - self.taken

    @property
    def complete(self) -> bool:
        return sum(map(len, self.parts.values())) == len(self.crops)


@dataclass(frozen=True)
class _Piece:
    """What one submission contributes to one batch, from its crop ``first`` on."""

    submission: _Submission
    first: int
    crops: Crops


def _checked(crops: Crops) -> Crops:
    if crops.ndim != 4 or crops.shape[3] != 3 or crops.dtype != np.uint8:
        raise ValueError(f"crops must be uint8[N, S, S, 3], not {crops.dtype}{list(crops.shape)}")
    return crops


class Batcher:
    """Worker threads that run ``embed`` on whatever waits, first come, first served.

    ``embed``: ``uint8[N, S, S, 3]`` to ``float32[N, D]``. ``max_batch``: the most crops in one call. ``workers``: how
    many calls at once. A worker takes what is there as soon as it is free and never lingers for more; where one is
    free, :meth:`embed` does not even wake it: a lone request pays nothing for the batching, and under load the queue
    fills the batches by itself. The queue has no bound of its own: whoever submits waits for the answer, and
    how many may do so at once is decided where requests are admitted.
    """

    def __init__(self, embed: Callable[[Crops], Embeddings], max_batch: int, workers: int = 1) -> None:
        if max_batch < 1 or workers < 1:
            raise ValueError(f"max_batch and workers must be at least 1, not {max_batch} and {workers}")
        self._embed = embed
        self._max_batch = max_batch
        self._limit = workers
        self._running = 0
        self._queue: deque[_Submission] = deque()
        self._unanswered: set[_Submission] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._dead = False
        self._workers = [
            threading.Thread(target=self._work, name=f"embedder {number}", daemon=True) for number in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def alive(self) -> bool:
        """Whether crops are taken: False for good once it is closed or a worker has died."""
        with self._changed:
            return not (self._closed or self._dead)

    @property
    def waiting(self) -> int:
        """Crops in the queue, without those that are being embedded now, and those given up."""
        with self._changed:
            return sum(item.waiting for item in self._queue if not item.future.cancelled())

    def embed(self, crops: Crops) -> Embeddings:
        """Return ``float32[N, D]`` of ``uint8[N, S, S, 3]``: on this thread, if nobody waits and a run is free.

        Raises what :meth:`submit` and its future raise.
        """
        _checked(crops)
        with self._changed:
            idle = self._running < self._limit and not (self._queue or self._closed or self._dead)
            alone = idle and len(crops) <= self._max_batch
            if alone:
                self._running += 1
        if not alone:
            return self.submit(crops).result()
        try:
            return self._answer(crops)
        finally:
            self._end_run()

    def submit(self, crops: Crops) -> Future[Embeddings]:
        """Queue ``uint8[N, S, S, 3]``; the future gives ``float32[N, D]`` in the same order, once.

        The caller must leave the array as it is until then. More than ``max_batch`` crops take several runs.
        Whatever a run raises goes to each future with crops in it and to no other; a future that is
        cancelled before its first run costs no run.

        Raises :class:`~service.errors.NotReady` if the batcher is closed or a worker has died, and ValueError if
        the array is of another shape or type.
        """
        submission = _Submission(_checked(crops), Future())
        with self._changed:
            if self._closed or self._dead:
                raise NotReady("The embedder has stopped")
            self._queue.append(submission)
            self._unanswered.add(submission)
            self._changed.notify()
        return submission.future

    def close(self) -> None:
        """Take nothing more, embed what is queued, and wait until it is done. Repeated calls are harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)

    def _work(self) -> None:
        try:
            while True:
                pieces = self._take()
                if not pieces:
                    return
                try:
                    self._run(pieces)
                finally:
                    self._end_run()
        except BaseException as error:  # not even an exit may leave somebody waiting for ever
            self._die(error)

    def _take(self) -> list[_Piece]:
        """The next batch; empty when closed and nothing is left. Its crops are all of one shape."""
        with self._changed:
            pieces: list[_Piece] = []
            room = self._max_batch
            while not pieces:
                self._changed.wait_for(self._may_run)
                if not self._queue:
                    return []
                while self._queue and room > 0:
                    submission = self._queue[0]
                    if pieces and submission.crops.shape[1:] != pieces[0].crops.shape[1:]:
                        break
                    if submission.taken == 0 and not submission.future.set_running_or_notify_cancel():
                        self._queue.popleft()
                        self._unanswered.discard(submission)
                        continue
                    end = min(submission.taken + room, len(submission.crops))
                    piece = _Piece(submission, submission.taken, submission.crops[submission.taken : end])
                    pieces.append(piece)
                    room -= len(piece.crops)
                    submission.taken = end
                    if submission.waiting == 0:
                        self._queue.popleft()
            self._running += 1
            if self._queue:
                self._changed.notify()
            return pieces

    def _may_run(self) -> bool:
        """Whether a worker has something to do, or nothing any more."""
        if self._queue:
            return self._running < self._limit
        return self._closed or self._dead

    def _end_run(self) -> None:
        with self._changed:
            self._running -= 1
            # A worker woken for nothing would take the interpreter from whoever goes on with the answer.
            if self._queue or self._closed:
                self._changed.notify_all()

    def _answer(self, crops: Crops) -> Embeddings:
        embeddings = self._embed(crops)
        if len(embeddings) != len(crops):
            raise RuntimeError(f"{len(crops)} crops gave {len(embeddings)} embeddings")
        return embeddings

    def _run(self, pieces: list[_Piece]) -> None:
        try:
            crops = pieces[0].crops if len(pieces) == 1 else np.concatenate([piece.crops for piece in pieces])
            embeddings = self._answer(crops)
        except Exception as error:
            self._fail(pieces, error)
            return
        start = 0
        for piece in pieces:
            end = start + len(piece.crops)
            submission = piece.submission
            with self._changed:
                submission.parts[piece.first] = embeddings[start:end]
                # Another worker may have failed with the rest, or died.
                ready = submission.complete and submission in self._unanswered
                if ready:
                    self._unanswered.discard(submission)
            start = end
            if ready:
                # This copies, so that nobody sees, or keeps alive, the embeddings of the others in the batch.
                submission.future.set_result(np.concatenate([part for _, part in sorted(submission.parts.items())]))

    def _fail(self, pieces: list[_Piece], error: Exception) -> None:
        with self._changed:
            failed = [piece.submission for piece in pieces if piece.submission in self._unanswered]
            self._unanswered.difference_update(failed)
            # The rest of a split submission is of no use to anybody.
            self._queue = deque(item for item in self._queue if item not in failed)
        for submission in failed:
            submission.future.set_exception(error)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._dead = True
            left = list(self._unanswered)
            self._unanswered.clear()
            self._queue.clear()
            self._changed.notify_all()
        for submission in left:
            future = submission.future
            if not (future.running() or future.set_running_or_notify_cancel()):
                continue
            stopped = NotReady("The embedder has stopped")
            stopped.__cause__ = error
            future.set_exception(stopped)
