"""Request bodies: multipart or JSON with base64, one model for both."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from service.api.schemas import MAX_METADATA_BYTES, Body
from service.api.workers import Place
from service.errors import ImageTooLarge, InvalidRequest, UnsupportedMediaType

BodyT = TypeVar("BodyT", bound=Body)

BODY_SECONDS = 120
"""A body that takes longer is given up: whoever sends it holds a place that others wait for."""

# To parse more than this takes longer than to hand it to a thread.
_SMALL = 2**16

# Room for everything of a request that is not a photo.
_OVERHEAD = 2**20
_FORM_FIELDS = 32


async def read_body(request: Request, model: type[BodyT], place: Place | None = None) -> BodyT:
    """Read a request's body into ``model``. ``place``: that of the request, where its bytes count.

    Raises ``UnsupportedMediaType``, ``ImageTooLarge``, ``InvalidRequest`` and ``Overloaded``; ``InvalidRequest`` names
    the fields, and never repeats what they held.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts = request.app.state.parts
    if model.media == Body.media:
        max_image = parts.max_image_bytes
        max_body = min(_max_photos(model) * (max_image * 4 // 3 + 1024) + _OVERHEAD, parts.max_request_bytes)
    else:
        max_image = max_body = parts.max_request_bytes
    if kind != "application/json" and not (kind == "multipart/form-data" and _max_photos(model)):
        accepted = "application/json or multipart/form-data" if _max_photos(model) else "application/json"
        raise UnsupportedMediaType(f"Send {accepted}, not {kind or 'a body without a content type'!r}.")
    stated = request.headers.get("content-length", "")
    if place is not None and stated.isdecimal():
        # What does not fit is refused before it is sent.
        place.hold(min(int(stated), max_body))
    receive = _limited(request.receive, max_body, place)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if kind == "application/json":
                data = await _read(receive)
            else:
                request._receive = receive
                values = await _form(request, model, max_image)
    except TimeoutError:
        raise InvalidRequest(
            f"The body took longer than {BODY_SECONDS} seconds.", headers={"connection": "close"}
        ) from None
    if kind != "application/json":
        return _validated(model, values)
    if len(data) <= _SMALL:
        return _validated(model, from_json_body(data))
    return await to_thread.run_sync(lambda: _validated(model, from_json_body(data)))


def explain(errors: Any) -> str:
    """Say what is wrong with which field, without repeating what was sent."""
    return "; ".join(f"{'.'.join(map(str, error['loc'])) or 'body'}: {error['msg']}" for error in errors[:10]) + "."


def from_json_body(data: bytes) -> Any:
    """Parse JSON; NaN, infinity and lone surrogates are refused. Raises ``InvalidRequest``."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as exc:
        raise InvalidRequest(f"The body is not JSON: {exc}.") from None


def request_body(model: type[Body], example: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAPI's ``requestBody`` for a model: JSON, and multipart where it holds photos."""
    schema = model.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if _max_photos(model):
        form = json.loads(json.dumps(schema))
        for name, most in model.photos.items():
            binary = {"type": "string", "format": "binary", "contentMediaType": model.media}
            form["properties"][name] = (
                binary if most == 1 else {"type": "array", "items": binary, "minItems": 1, "maxItems": most}
            )
        if "metadata" in form["properties"]:
            form["properties"]["metadata"] = {
                "type": "string",
                "contentMediaType": "application/json",
                "description": f"A JSON object, {MAX_METADATA_BYTES} bytes at most.",
            }
        content = {"multipart/form-data": {"schema": form}, **content}
    return {"requestBody": {"required": True, "content": content}}


async def _read(receive: Receive) -> bytes:
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(data)


def _limited(receive: Receive, max_body: int, place: Place | None) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > max_body:
            raise ImageTooLarge(f"The request exceeds {max_body} bytes.", headers={"connection": "close"})
        if place is not None:
            place.hold(taken)
        return message

    return limited


def _validated(model: type[BodyT], values: Any) -> BodyT:
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        raise InvalidRequest(
            explain(exc.errors(include_input=False, include_url=False, include_context=False))
        ) from None


async def _form(request: Request, model: type[Body], max_image: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        form = await request.form(max_files=_max_photos(model), max_fields=_FORM_FIELDS, max_part_size=_OVERHEAD)
    except HTTPException as exc:
        raise InvalidRequest(f"The form is broken: {exc.detail}") from None
    try:
        for name in form:
            parts = form.getlist(name)
            most = model.photos.get(name)
            if most is not None:
                photos = [await _photo(name, part, max_image) for part in parts]
                values[name] = _single(name, photos) if most == 1 else photos
            else:
                if any(isinstance(part, UploadFile) for part in parts):
                    raise InvalidRequest(f"{name}: must not be a file.")
                values[name] = parts if name in model.lists else _single(name, parts)
    finally:
        await form.close()
    return values


async def _photo(name: str, part: UploadFile | str, max_image: int) -> bytes:
    if isinstance(part, str):
        raise InvalidRequest(f"{name}: must be a file.")
    # Of a photo that is too large only so much is read; its own check then names the limit.
    return await part.read(max_image + 1)


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise InvalidRequest(f"{name}: must be given once.")
    return values[0]


def _max_photos(model: type[Body]) -> int:
    return sum(model.photos.values())
