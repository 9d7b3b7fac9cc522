"""What the routes work with; ``app.py`` puts it together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from service.api.auth import Keyring
from service.api.schemas import ModelAnswer
from service.api.workers import Workers
from service.recognizer import Recognizer


@dataclass(frozen=True)
class Parts:
    """``max_image_bytes`` and ``max_request_bytes`` bound what is read of a request."""

    recognizer: Recognizer
    workers: Workers
    keyring: Keyring
    registry: CollectorRegistry
    model: ModelAnswer
    embedder_alive: Callable[[], bool]
    max_image_bytes: int
    max_request_bytes: int
