"""Every error as RFC 9457 problem details, with the request's id."""

from __future__ import annotations

import errno
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.api.bodies import explain
from service.api.schemas import Conflict, EnrollProblem, Problem, rejected
from service.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    StorageFull,
    VultusError,
)
from service.recognizer import EnrolledElsewhere, NothingAccepted

CONTENT_TYPE = "application/problem+json"


def problem(error: VultusError, request_id: str) -> JSONResponse:
    """Return the response that tells of an error."""
    body: dict[str, Any] = {
        "type": f"urn:vultus:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
    }
    if isinstance(error, NothingAccepted):
        answer: Problem = EnrollProblem(**body, rejected=rejected(error.rejected))
    elif isinstance(error, EnrolledElsewhere):
        answer = EnrollProblem(**body, conflicts=[Conflict(**vars(item)) for item in error.conflicts])
    else:
        answer = Problem(**body)
    return JSONResponse(answer.model_dump(mode="json"), error.status, headers=error.headers, media_type=CONTENT_TYPE)


def responses(*errors: type[VultusError]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the errors that a route may answer with."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({error.status for error in errors}):
        codes = sorted(error.code for error in errors if error.status == status)
        described[status] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "content": {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return described


def as_vultus_error(exc: BaseException) -> VultusError:
    """Return the documented error for anything that a request can raise."""
    if isinstance(exc, VultusError):
        return exc
    if isinstance(exc, RequestValidationError):
        return InvalidRequest(explain(exc.errors()))
    if isinstance(exc, HTTPException):
        headers = dict(exc.headers or {})
        if exc.status_code == 404:
            return NotFound(headers=headers)
        if exc.status_code == 405:
            return MethodNotAllowed(headers=headers)
        return InvalidRequest(str(exc.detail), headers=headers)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("There is no room for the upload.")
    return InternalError("The reason is in the service's log under this request's id.")


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` as a problem."""

    async def handle(request: Request, exc: Exception) -> JSONResponse:
        return problem(as_vultus_error(exc), request.state.request_id)

    for kind in (VultusError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)
