"""What happens around every request: its id, who may send it, its line in the log, its metrics."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import as_vultus_error, problem
from service.errors import Forbidden

CLIENT_GONE = 499
"""What the log says of a request whose sender did not wait for the answer."""

REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_log = structlog.get_logger("vultus.http")


class Metrics:
    """Counts and times of requests, by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "vultus_http_requests_total",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "vultus_http_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["route"],
            registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )


class AroundRequests:
    """The outermost layer: no request leaves without an id, a log line and a documented answer.

    ``hosts``: host names that the Host header may give; empty for any. ``origins``: web origins that may call
    besides the service's own. Log lines name the route, never the path, which can hold people's names.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], origins: Collection[str], metrics: Metrics) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.origins = set(origins)
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if REQUEST_ID.match(asked_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(headers)
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception as exc:
            error = as_vultus_error(exc)
            if error.status >= 500:
                _log.error("request failed", code=error.code, exc_info=exc)
            if status:
                raise
            await problem(error, request_id)(scope, receive, send_with_id)
        finally:
            self._note(scope, status, time.perf_counter() - started)
            structlog.contextvars.unbind_contextvars("request_id")

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if REQUEST_HOST.match(host) else None
        if self.hosts and name not in self.hosts:
            raise Forbidden("The service does not answer to this host name; see VULTUS_ALLOWED_HOSTS.")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit_host(origin) != host.lower():
            raise Forbidden("Pages of this origin may not call the service; see VULTUS_CORS_ORIGINS.")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(scope["method"] if route != "none" else "any", route, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        _log.info(
            "request",
            method=scope["method"],
            route=route,
            status=status,
            milliseconds=round(seconds * 1000, 1),
        )


REQUEST_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?$")


def urlsplit_host(origin: str) -> str | None:
    """Return the host and port of a web origin, or None for one that has none, as ``null``."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
