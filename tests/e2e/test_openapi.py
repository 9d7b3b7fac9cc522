"""schemathesis sends what the OpenAPI document allows, and what it does not, to the running service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from service.api.routes import router
from tests.support import Server, photo


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of its own, for what is sent deletes and makes things."""
    with Server(tmp_path_factory.mktemp("fuzzed") / "data") as server:
        server.enroll("A", "obama.jpg")
        yield server


OPERATIONS = sorted(
    f"{method} {route.path.replace(':path', '')}"
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_makes_a_server_error(fuzzed: Server, name: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    method, path = name.split(" ")
    sent = 0

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        nonlocal sent
        case.call_and_validate(checks=[not_a_server_error])
        sent += 1

    try:
        send()
    except Unsatisfiable:
        # Some calls take nothing that could be wrong.
        assert mode is GenerationMode.NEGATIVE
    else:
        assert sent


def test_the_fuzzed_service_still_answers(fuzzed: Server) -> None:
    answer = fuzzed.client.post("/detect", files={"image": ("photo", photo("obama.jpg"))})
    assert len(answer.json()["faces"]) == 1
