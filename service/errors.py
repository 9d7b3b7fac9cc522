"""One tree of errors. Each class is a documented code; one handler turns them into problem+json."""

from __future__ import annotations

from collections.abc import Mapping


class VultusError(Exception):
    """An answer that is not a success, as RFC 9457 tells it. ``detail`` is for people."""

    code = "internal_error"
    status = 500
    title = "Something went wrong in the service"

    def __init__(self, detail: str = "", *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.headers = dict(headers or {})


class PhotoError(VultusError):
    """What is wrong with one photo; in a set of photos it is listed, and the others are used."""


class InvalidImage(PhotoError):
    code = "invalid_image"
    status = 422
    title = "The file is not a readable photo"


class UnsupportedMediaType(PhotoError):
    code = "unsupported_media_type"
    status = 415
    title = "This kind of content is not accepted"


class ImageTooLarge(PhotoError):
    code = "image_too_large"
    status = 413
    title = "The upload has too many bytes"


class TooManyPixels(PhotoError):
    code = "too_many_pixels"
    status = 422
    title = "The photo has too many pixels"


class NoFace(PhotoError):
    code = "no_face"
    status = 422
    title = "No face was found in the photo"


class SeveralFaces(PhotoError):
    code = "several_faces"
    status = 422
    title = "The photo shows more than one face"


class FaceTooSmall(PhotoError):
    code = "face_too_small"
    status = 422
    title = "The face is too small to be recognised later"


class LowQuality(PhotoError):
    code = "low_quality"
    status = 422
    title = "The face is too blurred, turned away or uncertain to be recognised later"


class SubjectNotFound(VultusError):
    code = "subject_not_found"
    status = 404
    title = "No such subject in this gallery"


class GalleryNotFound(VultusError):
    code = "gallery_not_found"
    status = 404
    title = "No such gallery"


class FaceNotFound(VultusError):
    code = "face_not_found"
    status = 404
    title = "No such enrolled face"


class GalleryExists(VultusError):
    code = "gallery_exists"
    status = 409
    title = "A gallery of this name exists"


class SubjectConflict(VultusError):
    code = "subject_conflict"
    status = 409
    title = "The face belongs to another enrolled subject"


class IdentityMismatch(PhotoError):
    code = "identity_mismatch"
    status = 422
    title = "The photos of one enrolment show different people"


class FprUnsupported(VultusError):
    code = "fpr_unsupported"
    status = 422
    title = "The calibration cannot support this false-positive rate"


class InvalidArchive(VultusError):
    code = "invalid_archive"
    status = 422
    title = "The archive is not a ZIP of the documented form"


class InvalidRequest(VultusError):
    code = "invalid_request"
    status = 422
    title = "The request is not of the documented form"


class NotFound(VultusError):
    code = "not_found"
    status = 404
    title = "No such path"


class MethodNotAllowed(VultusError):
    code = "method_not_allowed"
    status = 405
    title = "This path does not answer this method"


class Unauthorized(VultusError):
    code = "unauthorized"
    status = 401
    title = "An API key is needed"


class Forbidden(VultusError):
    code = "forbidden"
    status = 403
    title = "This is not permitted"


class Overloaded(VultusError):
    code = "overloaded"
    status = 429
    title = "The service is busy; try again shortly"


class NotReady(VultusError):
    code = "not_ready"
    status = 503
    title = "The service is starting or stopping"


class ModelMismatch(VultusError):
    code = "model_mismatch"
    status = 409
    title = "The gallery was enrolled with another embedder"


class StorageFull(VultusError):
    code = "storage_full"
    status = 507
    title = "There is no room left to store this"


class InternalError(VultusError):
    """What a defect of ours becomes; the reason is in the log under the request id."""


def error_classes() -> list[type[VultusError]]:
    """Every error that the API can answer with."""
    return [
        cls
        for base in (VultusError, PhotoError)
        for cls in base.__subclasses__()
        if cls.__module__ == __name__ and cls is not PhotoError
    ]
