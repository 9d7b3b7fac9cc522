"""One queue in front of the embedder, so that crops of different requests share a run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.errors import NotReady, Overloaded

Crops: TypeAlias = NDArray[np.uint8]
"""Aligned crops, ``uint8[N, S, S, 3]``."""

Embeddings: TypeAlias = NDArray[np.float32]
"""``float32[N, D]``, one row for each crop."""


@dataclass(eq=False)
class _Submission:
    """``taken``: how many of its crops have left the queue. ``parts``: their embeddings, in order."""

    crops: Crops
    future: Future[Embeddings]
    taken: int = 0
    parts: list[Embeddings] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        return len(self.crops) - self.taken


@dataclass(frozen=True)
class _Piece:
    """What one submission contributes to one batch."""

    submission: _Submission
    crops: Crops


class Batcher:
    """One worker thread that runs ``embed`` on whatever waits, first come, first served.

    ``embed``: ``uint8[N, S, S, 3]`` to ``float32[N, D]``; only ever called from the worker. ``max_batch``:
    the most crops in one call. ``max_queue``: the most crops that may wait. The worker takes what is there
    as soon as it is free and never lingers for more: a lone request pays nothing for the batching, and
    under load the queue fills the batches by itself.
    """

    def __init__(self, embed: Callable[[Crops], Embeddings], max_batch: int, max_queue: int) -> None:
        if max_batch < 1 or max_queue < 1:
            raise ValueError(f"max_batch and max_queue must be at least 1, not {max_batch} and {max_queue}")
        self._embed = embed
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue: deque[_Submission] = deque()
        self._batch: list[_Piece] = []
        self._changed = threading.Condition()
        self._closed = False
        self._dead = False
        self._worker = threading.Thread(target=self._work, name="embedder", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether crops are taken: False for good once it is closed or its worker has died."""
        with self._changed:
            return not (self._closed or self._dead)

    @property
    def waiting(self) -> int:
        """Crops in the queue, without those that are being embedded now."""
        with self._changed:
            return self._waiting()

    def submit(self, crops: Crops) -> Future[Embeddings]:
        """Queue ``uint8[N, S, S, 3]``; the future gives ``float32[N, D]`` in the same order, once.

        The caller must leave the array as it is until then. More than ``max_batch`` crops take several runs.
        Whatever a run raises goes to each future with crops in it and to no other; a future that is
        cancelled before its first run costs no run.

        Raises :class:`~service.errors.Overloaded` if more than ``max_queue`` crops would wait, except that an
        empty queue takes any number, as otherwise they could never be embedded. Raises
        :class:`~service.errors.NotReady` if the batcher is closed or its worker has died, and ValueError if
        the array is of another shape or type.
        """
        if crops.ndim != 4 or crops.shape[3] != 3 or crops.dtype != np.uint8:
            raise ValueError(f"crops must be uint8[N, S, S, 3], not {crops.dtype}{list(crops.shape)}")
        with self._changed:
            if self._closed or self._dead:
                raise NotReady("The embedder has stopped")
            waiting = self._waiting()
            if waiting > 0 and waiting + len(crops) > self._max_queue:
                raise Overloaded(f"{waiting} faces are waiting already", headers={"Retry-After": "1"})
            submission = _Submission(crops, Future())
            self._queue.append(submission)
            self._changed.notify()
        return submission.future

    def close(self) -> None:
        """Take nothing more, embed what is queued, and wait until it is done. Repeated calls are harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _waiting(self) -> int:
        # Counted afresh each time, so that a request which is given up makes room at once.
        return sum(item.waiting for item in self._queue if not item.future.cancelled())

    def _work(self) -> None:
        try:
            while True:
                pieces = self._take()
                if not pieces:
                    return
                self._run(pieces)
        except BaseException as error:  # not even an exit may leave somebody waiting for ever
            self._die(error)

    def _take(self) -> list[_Piece]:
        """The next batch; empty when closed and nothing is left. Its crops are all of one shape."""
        with self._changed:
            # Filled in place: a submission is at every moment in the queue or in the batch, where _die looks.
            pieces = self._batch = []
            room = self._max_batch
            while not pieces:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                while self._queue and room > 0:
                    submission = self._queue[0]
                    if pieces and submission.crops.shape[1:] != pieces[0].crops.shape[1:]:
                        break
                    if submission.taken == 0 and not submission.future.set_running_or_notify_cancel():
                        self._queue.popleft()
                        continue
                    end = min(submission.taken + room, len(submission.crops))
                    piece = _Piece(submission, submission.crops[submission.taken : end])
                    pieces.append(piece)
                    room -= len(piece.crops)
                    submission.taken = end
                    if submission.waiting == 0:
                        self._queue.popleft()
            return pieces

    def _run(self, pieces: list[_Piece]) -> None:
        try:
            crops = pieces[0].crops if len(pieces) == 1 else np.concatenate([piece.crops for piece in pieces])
            embeddings = self._embed(crops)
            if len(embeddings) != len(crops):
                raise RuntimeError(f"{len(crops)} crops gave {len(embeddings)} embeddings")
        except Exception as error:
            self._fail(pieces, error)
            return
        start = 0
        for piece in pieces:
            end = start + len(piece.crops)
            piece.submission.parts.append(embeddings[start:end])
            start = end
            if piece.submission.waiting == 0:
                # This copies, so that nobody sees, or keeps alive, the embeddings of the others in the batch.
                piece.submission.future.set_result(np.concatenate(piece.submission.parts))

    def _fail(self, pieces: list[_Piece], error: Exception) -> None:
        failed = [piece.submission for piece in pieces]
        with self._changed:
            # The rest of a split submission is of no use to anybody.
            while self._queue and self._queue[0] in failed:
                self._queue.popleft()
        for submission in failed:
            submission.future.set_exception(error)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._dead = True
            left = [piece.submission for piece in self._batch]
            left += [item for item in self._queue if item not in left]
            self._queue.clear()
        for submission in left:
            future = submission.future
            if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
                continue
            stopped = NotReady("The embedder has stopped")
            stopped.__cause__ = error
            future.set_exception(stopped)
