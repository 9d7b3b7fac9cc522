"""A lock that many searches hold at once and a change holds alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriter:
    """Whoever comes to a waiting writer waits behind it, so that neither readers nor writers are kept out for good.

    Not reentrant.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._left = threading.Condition()
        self._readers = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold it together with other readers."""
        with self._gate, self._left:
            self._readers += 1
        try:
            yield
        finally:
            with self._left:
                self._readers -= 1
                if not self._readers:
                    self._left.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold it alone."""
        with self._gate:
            with self._left:
                self._left.wait_for(lambda: not self._readers)
            yield
