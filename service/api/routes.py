"""The routes: HTTP in and out, no logic."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service import errors, pictures
from service.api import schemas
from service.api.auth import Admin, Reader, Writer
from service.api.bodies import read_body, request_body
from service.api.examples import example
from service.api.metrics import VisibleMetrics
from service.api.parts import Parts
from service.api.problems import responses
from service.api.schemas import Fpr, GalleryName, SubjectName
from service.domain import DEFAULT_GALLERY
from service.errors import InvalidRequest, NotReady
from service.evaluation import Plan, read_groups

router = APIRouter()

_KEY = (errors.Unauthorized, errors.Forbidden, errors.NotReady, errors.InternalError)
_BODY = (
    *_KEY,
    errors.InvalidRequest,
    errors.UnsupportedMediaType,
    errors.ImageTooLarge,
    errors.Overloaded,
    errors.StorageFull,
)
_PHOTO = (*_BODY, errors.InvalidImage, errors.TooManyPixels, errors.NoFace)
_SEARCH = (errors.GalleryNotFound, errors.ModelMismatch)

LONGEST_SECONDS = 1800
"""An evaluation or a batch that takes longer is given up."""

_BASE64 = "/9j/4AAQSkZJRg…"

GalleryQuery = Annotated[GalleryName, Query(description="The gallery's name.")]


def _answer(answer: schemas.Answer, status: int = 200) -> Response:
    """Return an answer as bytes. Called where the work is done: what is long holds up nobody else's request."""
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


# --- photos


@router.post(
    "/detect",
    response_model=schemas.DetectAnswer,
    tags=["photos"],
    summary="Find the faces in a photo",
    responses={200: example("DetectAnswer"), **responses(*_BODY, errors.InvalidImage, errors.TooManyPixels)},
    openapi_extra=request_body(schemas.DetectBody, {"image": _BASE64}),
)
async def detect(request: Request, _: Reader) -> Response:
    """Return every face, the largest first. None is an empty list."""
    parts = _parts(request)
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.DetectBody, place)

        def work() -> Response:
            return _answer(schemas.detection(parts.recognizer.detect(body.image)))

        return await parts.workers.run(work)


@router.post(
    "/embed",
    response_model=schemas.EmbedAnswer,
    tags=["photos"],
    summary="Turn the faces in a photo into embeddings",
    responses={200: example("EmbedAnswer"), **responses(*_PHOTO)},
    openapi_extra=request_body(schemas.EmbedBody, {"image": _BASE64}),
)
async def embed(request: Request, _: Reader) -> Response:
    """Return every face with its embedding, a vector of length 1. Embeddings of two models cannot be compared."""
    parts = _parts(request)
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.EmbedBody, place)

        def work() -> Response:
            recognizer = parts.recognizer
            return _answer(schemas.embedding(recognizer.model_id, recognizer.embed(body.image)))

        return await parts.workers.run(work)


@router.post(
    "/enroll",
    response_model=schemas.EnrollAnswer,
    status_code=201,
    tags=["recognition"],
    summary="Enrol a person",
    responses={
        201: example("EnrollAnswer"),
        **responses(
            *_PHOTO, *_SEARCH, errors.SeveralFaces, errors.FaceTooSmall, errors.LowQuality, errors.SubjectConflict
        ),
    },
    openapi_extra=request_body(schemas.EnrollBody, {"subject": "Ada", "images": [_BASE64], "metadata": {"badge": 7}}),
)
async def enroll(request: Request, key: Writer) -> Response:
    """Add photos of one person, each showing exactly one usable face, and nobody else's.

    Photos that cannot be used are listed in `rejected`, and so are those that do not match the others; if that is
    all of them, the answer is 422 with the first one's code. If a photo shows another subject of the gallery, nothing
    is stored and the answer is 409 with `conflicts`, unless `allow_conflict`. A photo that this subject has
    already is not stored twice. 201 means: it is on disk.
    """
    parts = _parts(request)
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.EnrollBody, place)
        key.require(body.gallery)

        def work() -> Response:
            done = parts.recognizer.enroll(
                body.gallery, body.subject, body.images, body.metadata, allow_conflict=body.allow_conflict
            )
            return _answer(schemas.enrollment(done), 201)

        return await parts.workers.run(work)


@router.post(
    "/enroll/batch",
    response_model=schemas.EnrollBatchAnswer,
    tags=["recognition"],
    summary="Enrol many people",
    responses={200: example("EnrollBatchAnswer"), **responses(*_BODY, *_SEARCH, errors.InvalidArchive)},
    openapi_extra=request_body(schemas.EnrollBatchBody, {"archive": "UEsDBBQAAAAI…"}),
)
async def enroll_batch(request: Request, key: Writer) -> Response:
    """Enrol everybody in a ZIP with a folder of photos for each person, as `/enroll` would one after the other.

    Who could not be enrolled, and why, is listed for each person. What is enrolled stays, however the call ends; sent
    again, the same archive goes on where it was. One batch or evaluation runs at a time, for half an hour at most.
    """
    parts = _parts(request)
    async with parts.workers.admitted_alone():
        body = await read_body(request, schemas.EnrollBatchBody)
        key.require(body.gallery)

        def work(checkpoint: Callable[[], None]) -> Response:
            done = parts.recognizer.enroll_archive(
                body.archive,
                body.gallery,
                parts.max_request_bytes,
                checkpoint,
                allow_conflict=body.allow_conflict,
            )
            return _answer(schemas.batch(done))

        return await parts.workers.run_alone(work, request.is_disconnected, LONGEST_SECONDS)


@router.post(
    "/identify",
    response_model=schemas.IdentifyAnswer,
    tags=["recognition"],
    summary="Say who is in a photo",
    responses={200: example("IdentifyAnswer"), **responses(*_PHOTO, *_SEARCH)},
    openapi_extra=request_body(schemas.IdentifyBody, {"image": _BASE64, "fpr": 0.01, "top_k": 5}),
)
async def identify(request: Request, key: Reader) -> Response:
    """Answer every face: `match` with the subject, or `unknown`.

    `fpr` is the share of strangers, on average, who are answered with somebody; the service derives the
    `threshold` from it for the loaded model and the gallery's present size.
    """
    parts = _parts(request)
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.IdentifyBody, place)
        key.require(body.gallery)

        def work() -> Response:
            found = parts.recognizer.identify(body.image, body.gallery, body.fpr, body.top_k)
            return _answer(schemas.identification(found))

        return await parts.workers.run(work)


@router.post(
    "/verify",
    response_model=schemas.VerifyAnswer,
    tags=["recognition"],
    summary="Say whether two faces are one person's",
    responses={200: example("VerifyAnswer"), **responses(*_PHOTO, *_SEARCH, errors.SubjectNotFound)},
    openapi_extra=request_body(schemas.VerifyBody, {"image_a": _BASE64, "image_b": _BASE64, "fpr": 0.001}),
)
async def verify(request: Request, key: Reader) -> Response:
    """Compare the largest face of `image_a` with that of `image_b`, or with an enrolled `subject`."""
    parts = _parts(request)
    recognizer = parts.recognizer
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.VerifyBody, place)
        if body.subject is not None:
            key.require(body.gallery)

        def work() -> Response:
            if body.subject is not None:
                found = recognizer.verify_subject(body.image_a, body.gallery, body.subject, body.fpr)
            else:
                found = recognizer.verify_photos(body.image_a, body.image_b or b"", body.fpr)
            return _answer(schemas.verification(found))

        return await parts.workers.run(work)


@router.post(
    "/search-similar",
    response_model=schemas.SearchSimilarAnswer,
    tags=["recognition"],
    summary="Find the enrolled faces most similar to a face",
    responses={200: example("SearchSimilarAnswer"), **responses(*_PHOTO, *_SEARCH, errors.FaceNotFound)},
    openapi_extra=request_body(schemas.SearchSimilarBody, {"image": _BASE64, "top_k": 10}),
)
async def search_similar(request: Request, key: Reader) -> Response:
    """Return the most similar enrolled faces, whoever they are: of each face in `image`, or of `face_id`."""
    parts = _parts(request)
    recognizer = parts.recognizer
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.SearchSimilarBody, place)

        def by_photo() -> Response:
            gallery = body.gallery or DEFAULT_GALLERY
            key.require(gallery)
            found = recognizer.similar_to_photo(body.image or b"", gallery, body.top_k, body.min_similarity)
            return _answer(schemas.similar(recognizer.model_id, gallery, found))

        def by_face(face_id: str) -> Response:
            template = recognizer.face(face_id)
            key.require_face(template)
            gallery = body.gallery or template.gallery
            key.require(gallery)
            found = recognizer.similar_to_face(template, gallery, body.top_k, body.min_similarity)
            return _answer(schemas.similar(recognizer.model_id, gallery, found))

        face_id = body.face_id
        return await parts.workers.run(by_photo if face_id is None else lambda: by_face(face_id))


@router.post(
    "/search-unknown",
    response_model=schemas.SearchUnknownAnswer,
    tags=["recognition"],
    summary="Find everybody in a set of photos whom nobody enrolled",
    responses={200: example("SearchUnknownAnswer"), **responses(*_BODY, *_SEARCH)},
    openapi_extra=request_body(schemas.SearchUnknownBody, {"images": [_BASE64, _BASE64]}),
)
async def search_unknown(request: Request, key: Reader) -> Response:
    """Sort the faces of a photo set into enrolled people and strangers, the strangers grouped by person.

    Photos that are broken or show no face are listed in `rejected`.
    """
    parts = _parts(request)
    async with parts.workers.admitted() as place:
        body = await read_body(request, schemas.SearchUnknownBody, place)
        key.require(body.gallery)

        def work() -> Response:
            return _answer(schemas.unknown_search(parts.recognizer.search_unknown(body.images, body.gallery, body.fpr)))

        return await parts.workers.run(work)


@router.post(
    "/evaluate",
    response_model=schemas.EvaluateAnswer,
    tags=["service"],
    summary="Measure the rates on your own photos",
    responses={
        200: example("EvaluateAnswer"),
        **responses(*_BODY, errors.InvalidArchive, errors.FprUnsupported),
    },
    openapi_extra=request_body(schemas.EvaluateBody, {"archive": "UEsDBBQAAAAI…", "fpr": [0.1, 0.01]}),
)
async def evaluate(request: Request, _: Admin) -> Response:
    """Enrol the first photos of each person of a ZIP, search with the others and with strangers', and count.

    The ZIP holds a folder for each person, and one of strangers. Nothing of it is stored, and galleries are not
    touched. One evaluation runs at a time, for half an hour at most.
    """
    parts = _parts(request)
    async with parts.workers.admitted_alone():
        body = await read_body(request, schemas.EvaluateBody)
        if body.picture is not None and not pictures.available():
            raise InvalidRequest(f"picture: {pictures.MISSING}")
        try:
            groups = None if body.groups is None else read_groups(body.groups)
        except ValueError as exc:
            raise InvalidRequest(f"{exc}.") from None
        plan = Plan(fprs=tuple(dict.fromkeys(body.fpr)), enrol=body.enrol, groups=groups)

        def work(checkpoint: Callable[[], None]) -> Response:
            found = parts.recognizer.evaluate(body.archive, body.strangers, plan, parts.max_request_bytes, checkpoint)
            url = None if body.picture is None else pictures.data_url(found, body.picture)
            return _answer(schemas.evaluation(found, url))

        return await parts.workers.run_alone(work, request.is_disconnected, LONGEST_SECONDS)


# --- what is enrolled


@router.get("/galleries", tags=["galleries"], summary="List the galleries", responses=responses(*_KEY))
def galleries(request: Request, key: Reader) -> schemas.GalleriesAnswer:
    """Return the galleries that the key opens."""
    found = _parts(request).recognizer.galleries()
    return schemas.GalleriesAnswer(galleries=[schemas.gallery(gallery) for gallery in found if key.sees(gallery.name)])


@router.post(
    "/galleries",
    status_code=201,
    tags=["galleries"],
    summary="Make a gallery",
    responses=responses(*_BODY, errors.GalleryExists),
    openapi_extra=request_body(schemas.GalleryBody, {"gallery": "staff"}),
)
async def create_gallery(request: Request, key: Admin) -> schemas.Gallery:
    """Make an empty gallery. Galleries know nothing of one another."""
    parts = _parts(request)
    body = await read_body(request, schemas.GalleryBody)
    key.require(body.gallery)
    return schemas.gallery(await parts.workers.run(lambda: parts.recognizer.create_gallery(body.gallery)))


@router.get(
    "/galleries/{gallery}",
    tags=["galleries"],
    summary="Show a gallery",
    responses=responses(*_KEY, errors.GalleryNotFound, errors.InvalidRequest),
)
def gallery(request: Request, gallery: GalleryName, key: Reader) -> schemas.Gallery:
    """Return how much a gallery holds."""
    key.require(gallery)
    return schemas.gallery(_parts(request).recognizer.gallery(gallery))


@router.patch(
    "/galleries/{gallery}",
    tags=["galleries"],
    summary="Say what a gallery's own people may do to its thresholds",
    responses=responses(*_BODY, errors.GalleryNotFound),
    openapi_extra=request_body(schemas.GalleryPatch, {"own_calibration": "full"}),
)
async def update_gallery(request: Request, gallery: GalleryName, key: Admin) -> schemas.Gallery:
    """Let the gallery's own people make its thresholds only `stricter`, or in `full` also more permissive."""
    parts = _parts(request)
    key.require(gallery)
    body = await read_body(request, schemas.GalleryPatch)
    recognizer = parts.recognizer
    return schemas.gallery(
        await parts.workers.run(lambda: recognizer.set_own_calibration(gallery, body.own_calibration))
    )


@router.delete(
    "/galleries/{gallery}",
    status_code=204,
    tags=["galleries"],
    summary="Delete a gallery",
    responses=responses(*_KEY, errors.GalleryNotFound, errors.InvalidRequest, errors.StorageFull),
)
def delete_gallery(request: Request, gallery: GalleryName, key: Admin) -> None:
    """Delete a gallery and everybody in it, for good. `default` cannot be deleted."""
    key.require(gallery)
    _parts(request).recognizer.delete_gallery(gallery)


@router.get(
    "/subjects",
    tags=["subjects"],
    summary="List the subjects of a gallery",
    responses=responses(*_KEY, errors.GalleryNotFound, errors.InvalidRequest),
)
def subjects(
    request: Request,
    key: Reader,
    gallery: GalleryQuery = DEFAULT_GALLERY,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> schemas.SubjectsAnswer:
    """Return a page of subjects in the order of enrolment."""
    key.require(gallery)
    found, after = _parts(request).recognizer.subjects(gallery, _after(cursor), limit)
    return schemas.SubjectsAnswer(
        subjects=[schemas.subject(subject) for subject in found],
        next_cursor=None if after is None else base64.urlsafe_b64encode(b"s%d" % after).decode(),
    )


@router.get(
    "/subjects/{subject:path}",
    tags=["subjects"],
    summary="Show a subject",
    responses=responses(*_KEY, errors.GalleryNotFound, errors.SubjectNotFound, errors.InvalidRequest),
)
def subject(
    request: Request, subject: SubjectName, key: Reader, gallery: GalleryQuery = DEFAULT_GALLERY
) -> schemas.Subject:
    """Return a subject's metadata and faces."""
    key.require(gallery)
    return schemas.subject(_parts(request).recognizer.subject(gallery, subject))


@router.patch(
    "/subjects/{subject:path}",
    tags=["subjects"],
    summary="Replace a subject's metadata",
    responses=responses(*_BODY, errors.GalleryNotFound, errors.SubjectNotFound),
    openapi_extra=request_body(schemas.SubjectPatch, {"metadata": {"badge": 8}}),
)
async def update_subject(
    request: Request, subject: SubjectName, key: Writer, gallery: GalleryQuery = DEFAULT_GALLERY
) -> schemas.Subject:
    """Replace the whole metadata object; it comes back as it went in."""
    parts = _parts(request)
    key.require(gallery)
    body = await read_body(request, schemas.SubjectPatch)
    recognizer = parts.recognizer
    return schemas.subject(await parts.workers.run(lambda: recognizer.update_subject(gallery, subject, body.metadata)))


@router.delete(
    "/subjects/{subject:path}",
    status_code=204,
    tags=["subjects"],
    summary="Delete a subject",
    responses=responses(
        *_KEY, errors.GalleryNotFound, errors.SubjectNotFound, errors.InvalidRequest, errors.StorageFull
    ),
)
def delete_subject(
    request: Request, subject: SubjectName, key: Writer, gallery: GalleryQuery = DEFAULT_GALLERY
) -> None:
    """Delete a subject with all templates and crops, for good: nothing stays in the data folder's files."""
    key.require(gallery)
    _parts(request).recognizer.delete_subject(gallery, subject)


@router.get(
    "/faces/{face_id}",
    tags=["subjects"],
    summary="Show an enrolled face",
    responses=responses(*_KEY, errors.FaceNotFound, errors.InvalidRequest),
)
def face(request: Request, face_id: str, key: Reader) -> schemas.StoredFace:
    """Return one enrolled face, without its vector."""
    template = _parts(request).recognizer.face(face_id)
    key.require_face(template)
    return schemas.stored_face(template)


@router.delete(
    "/faces/{face_id}",
    status_code=204,
    tags=["subjects"],
    summary="Delete an enrolled face",
    responses=responses(*_KEY, errors.FaceNotFound, errors.InvalidRequest, errors.StorageFull),
)
def delete_face(request: Request, face_id: str, key: Writer) -> None:
    """Delete one template and its crop, for good. The subject stays, even without a face."""
    recognizer = _parts(request).recognizer
    key.require_face(recognizer.face(face_id))
    recognizer.delete_face(face_id)


# --- what is loaded


@router.get("/model", tags=["service"], summary="Show the loaded model", responses=responses(*_KEY))
def model(request: Request, _: Reader) -> schemas.ModelAnswer:
    """Return which networks are loaded, where they come from, and on what terms."""
    return _parts(request).model


@router.get(
    "/operating-points",
    tags=["service"],
    summary="Say which threshold a false-positive rate means now",
    responses=responses(*_KEY, *_SEARCH, errors.InvalidRequest),
)
def operating_points(
    request: Request,
    key: Reader,
    fpr: Annotated[Fpr | None, Query(description="Default: the service's own for each.")] = None,
    gallery: GalleryQuery = DEFAULT_GALLERY,
) -> schemas.OperatingPointsAnswer:
    """Return the thresholds of `/identify` and `/verify` for a rate, and what they rest on.

    That of `/identify` is for the loaded model, the gallery's size and its own people; that of `/verify` is for two
    photos.
    """
    key.require(gallery)
    recognizer = _parts(request).recognizer
    identification, verification, subjects, templates = recognizer.operating_points(gallery, fpr)
    return schemas.OperatingPointsAnswer(
        model_id=recognizer.model_id,
        gallery=gallery,
        gallery_size=subjects,
        templates=templates,
        identification=schemas.OperatingPoint(**vars(identification)),
        verification=schemas.OperatingPoint(**vars(verification)),
        drift=schemas.Drift(**vars(recognizer.drift(gallery))),
    )


@router.get("/livez", tags=["service"], summary="Is the process alive?")
async def livez() -> schemas.Status:
    """Answer as long as the process runs. Needs no key."""
    return schemas.Status(status="alive")


@router.get("/readyz", tags=["service"], summary="Can it answer?", responses=responses(errors.NotReady))
def readyz(request: Request) -> schemas.Status:
    """Answer 200 once models are loaded and warm and the index is filled, 503 before. Needs no key."""
    parts = _parts(request)
    if not parts.embedder_alive():
        raise NotReady("The embedder's worker has stopped.")
    parts.recognizer.repository.ping()
    return schemas.Status(status="ready")


@router.get(
    "/metrics",
    tags=["service"],
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses(*_KEY)},
)
def metrics(request: Request, key: Reader) -> Any:
    """Return counts and times in Prometheus' text format; of galleries those that the key opens."""
    return Response(generate_latest(VisibleMetrics(_parts(request).registry, key)), media_type=CONTENT_TYPE_LATEST)


def _after(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        decoded = base64.b64decode(cursor, altchars=b"-_", validate=True)
        if not (decoded[:1] == b"s" and decoded[1:].isdigit() and len(decoded) < 20):
            raise ValueError
        return int(decoded[1:])
    except (binascii.Error, ValueError):
        raise InvalidRequest("cursor: not one that this service gave.") from None
