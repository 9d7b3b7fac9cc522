"""The page /docs works on a machine without the internet."""

from __future__ import annotations

import re

from tests.support import Server


def test_the_docs_page_takes_everything_from_this_service(shared_server: Server) -> None:
    page = shared_server.client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    assert len(links) == 3
    for link in links:
        assert link.startswith("/"), link
        assert shared_server.client.get(link).status_code == 200
    document = shared_server.client.get("/openapi.json").json()
    assert "/openapi.json" in page.text and document["info"]["title"] == "Vultus"


def test_every_problem_and_answer_of_the_document_is_described(shared_server: Server) -> None:
    document = shared_server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for reference in set(re.findall(r"#/components/schemas/(\w+)", str(document))):
        assert reference in schemas, reference
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            # FastAPI's own description of a bad request is not what this service answers.
            assert "HTTPValidationError" not in str(operation), (method, path)
