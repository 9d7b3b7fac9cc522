"""What goes over the wire."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from service import domain
from service.domain import DEFAULT_GALLERY, LANDMARK_NAMES, MAX_ENROLL_PHOTOS, MAX_SUBJECT_NAME, subject_name
from service.evaluation import FPRS, STRANGERS

MAX_SET_PHOTOS = 100
MAX_METADATA_BYTES = 65_536


def _photo(value: Any) -> Any:
    if isinstance(value, str):
        # Browsers' canvases and file readers hand out data URLs.
        encoded = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ValueError("not base64") from exc
    return value


def _metadata(value: Any) -> Any:
    if isinstance(value, str):
        value = from_json(value, allow_inf_nan=False)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    if len(json.dumps(value)) > MAX_METADATA_BYTES:
        raise ValueError(f"must not exceed {MAX_METADATA_BYTES} bytes as JSON")
    return value


Photo = Annotated[
    bytes,
    BeforeValidator(_photo),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}),
]
Archive = Annotated[
    bytes,
    BeforeValidator(_photo),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "application/zip"}),
]
SubjectName = Annotated[str, Field(min_length=1, max_length=MAX_SUBJECT_NAME), AfterValidator(subject_name)]
GalleryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Fpr = Annotated[float, Field(gt=0, lt=1, description="False-positive rate, between 0 and 1.")]
Metadata = Annotated[dict[str, Any], BeforeValidator(_metadata)]


OwnCalibration = Annotated[
    domain.OwnCalibrationMode,
    Field(description="Its own people may make its thresholds only `stricter`, or in `full` also more permissive."),
]


class Body(BaseModel):
    """A request body, multipart or JSON. ``photos``: the fields that hold photos, and how many at most.

    ``media``: what they hold; anything but photos may be as large as a request. ``lists``: other fields that a form
    may repeat.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    photos: ClassVar[Mapping[str, int]] = {}
    media: ClassVar[str] = "image/*"
    lists: ClassVar[frozenset[str]] = frozenset()


class DetectBody(Body):
    photos: ClassVar = {"image": 1}

    image: Photo


class EmbedBody(Body):
    photos: ClassVar = {"image": 1}

    image: Photo


class EnrollBody(Body):
    photos: ClassVar = {"images": MAX_ENROLL_PHOTOS}

    subject: SubjectName
    images: Annotated[list[Photo], Field(min_length=1, max_length=MAX_ENROLL_PHOTOS)]
    gallery: GalleryName = DEFAULT_GALLERY
    metadata: Metadata | None = None
    allow_conflict: Annotated[bool, Field(description="Enrol even if the photos show another subject.")] = False


class EnrollBatchBody(Body):
    photos: ClassVar = {"archive": 1}
    media: ClassVar = "application/zip"

    archive: Archive
    gallery: GalleryName = DEFAULT_GALLERY
    allow_conflict: Annotated[bool, Field(description="Enrol even if photos show another subject.")] = False


class IdentifyBody(Body):
    photos: ClassVar = {"image": 1}

    image: Photo
    gallery: GalleryName = DEFAULT_GALLERY
    fpr: Fpr | None = None
    top_k: Annotated[int, Field(ge=1, le=100)] = 5


class VerifyBody(Body):
    photos: ClassVar = {"image_a": 1, "image_b": 1}

    image_a: Photo
    image_b: Photo | None = None
    subject: SubjectName | None = None
    gallery: GalleryName = DEFAULT_GALLERY
    fpr: Fpr | None = None

    @model_validator(mode="after")
    def _one_of(self) -> VerifyBody:
        if (self.image_b is None) == (self.subject is None):
            raise ValueError("give either image_b or subject")
        return self


class SearchSimilarBody(Body):
    photos: ClassVar = {"image": 1}

    image: Photo | None = None
    face_id: Annotated[str, Field(max_length=64)] | None = None
    gallery: Annotated[GalleryName | None, Field(description="Default: `default`, or the face's own gallery.")] = None
    top_k: Annotated[int, Field(ge=1, le=1000)] = 10
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> SearchSimilarBody:
        if (self.image is None) == (self.face_id is None):
            raise ValueError("give either image or face_id")
        return self


class SearchUnknownBody(Body):
    photos: ClassVar = {"images": MAX_SET_PHOTOS}

    images: Annotated[list[Photo], Field(min_length=1, max_length=MAX_SET_PHOTOS)]
    gallery: GalleryName = DEFAULT_GALLERY
    fpr: Fpr | None = None


class EvaluateBody(Body):
    photos: ClassVar = {"archive": 1}
    media: ClassVar = "application/zip"
    lists: ClassVar = frozenset({"fpr"})

    archive: Archive
    fpr: Annotated[list[Fpr], Field(min_length=1, max_length=20)] = list(FPRS)
    enrol: Annotated[int, Field(ge=1, le=20, description="Photos of each person to enrol, the first by name.")] = 1
    strangers: Annotated[
        str, Field(min_length=1, max_length=256, pattern=r"^[^/]+$", description="Name of the strangers' folder.")
    ] = STRANGERS
    groups: Annotated[str, Field(max_length=2**20, description="CSV: `person-or-file,group`.")] | None = None
    picture: Annotated[Literal["svg", "png"] | None, Field(description="Draw the DET curve too.")] = None


class GalleryBody(Body):
    gallery: GalleryName


class GalleryPatch(Body):
    own_calibration: OwnCalibration


class SubjectPatch(Body):
    metadata: Metadata


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(frozen=True)


class Box(Answer):
    x: float
    y: float
    width: float
    height: float


class Landmarks(Answer):
    left_eye: tuple[float, float]
    right_eye: tuple[float, float]
    nose: tuple[float, float]
    mouth_left: tuple[float, float]
    mouth_right: tuple[float, float]


class Quality(Answer):
    size: float = Field(description="Shorter side of the face, pixels.")
    sharpness: float = Field(description="0 (blurred) … 1 (sharp).")
    yaw: float = Field(description="Degrees; 0 looks at the camera.")
    pitch: float = Field(description="Degrees; 0 looks at the camera.")
    roll: float = Field(description="Degrees in the picture's plane; 0 is upright.")


class Face(Answer):
    box: Box
    landmarks: Landmarks
    detection_score: float
    quality: Quality


def face_fields(face: domain.Face) -> dict[str, Any]:
    """Return the members of a *Face*; coordinates to a hundredth of a pixel."""
    box, quality = face.box, face.quality
    return {
        "box": Box(x=_px(box.x), y=_px(box.y), width=_px(box.width), height=_px(box.height)),
        "landmarks": Landmarks(
            **{name: (_px(x), _px(y)) for name, (x, y) in zip(LANDMARK_NAMES, face.landmarks.tolist(), strict=True)}
        ),
        "detection_score": face.detection_score,
        "quality": Quality(**vars(quality)),
    }


def face(seen: domain.Face) -> Face:
    """Return the *Face* of the API."""
    return Face(**face_fields(seen))


def _px(value: float) -> float:
    return round(value, 2)


class DetectAnswer(Answer):
    faces: list[Face]


class EmbeddedFace(Face):
    embedding: list[float]


class EmbedAnswer(Answer):
    model_id: str
    faces: list[EmbeddedFace]


class EnrolledFace(Face):
    face_id: str


class Rejected(Answer):
    index: int = Field(description="Position of the photo in the request, from 0.")
    code: str
    detail: str


class EnrollAnswer(Answer):
    subject: str
    gallery: str
    model_id: str
    faces: list[EnrolledFace]
    rejected: list[Rejected]


class RejectedFile(Answer):
    file: str
    code: str
    detail: str


class ConflictingFile(Answer):
    file: str
    subject: str
    face_id: str
    similarity: float
    threshold: float


class EnrolledPerson(Answer):
    subject: str
    faces: int = Field(description="Photos of this person that are enrolled now.")
    rejected: list[RejectedFile]
    conflicts: list[ConflictingFile] = Field(description="Photos that show another subject.")


class EnrollBatchAnswer(Answer):
    gallery: str
    model_id: str
    faces: int = Field(description="Photos that are enrolled now, of all people.")
    people: list[EnrolledPerson]
    ignored: int = Field(description="Files that are no photos.")


_PROBABILITY = "That these two faces are one person's, if both answers were equally likely before the comparison."


class Candidate(Answer):
    subject: str
    face_id: str
    similarity: float = Field(description="Cosine, −1…1.")
    probability: float = Field(description=_PROBABILITY)


class IdentifiedFace(Face):
    decision: Literal["match", "unknown"]
    subject: str | None
    similarity: float | None = Field(description="The best candidate's, match or not; null without candidates.")
    margin: float | None = Field(description="Its lead over the next subject; null if there is no other.")
    probability: float | None = Field(description="The best candidate's; null without candidates.")
    candidates: list[Candidate]


class IdentifyAnswer(Answer):
    model_id: str
    gallery: str
    gallery_size: int = Field(description="Subjects in the gallery.")
    templates: int = Field(description="Their enrolled faces.")
    fpr: float
    threshold: float
    extrapolated: bool = Field(description="The threshold lies beyond the calibration sample, in its modelled tail.")
    faces: list[IdentifiedFace]


class VerifyAnswer(Answer):
    match: bool
    similarity: float
    probability: float = Field(description=_PROBABILITY)
    model_id: str
    fpr: float
    threshold: float
    extrapolated: bool
    face_a: Face
    face_b: Face = Field(description="The other photo's largest face, or the subject's most similar enrolled face.")
    face_id: str | None = Field(description="The enrolled face that was compared, if a subject was asked about.")
    templates: int = Field(description="Faces that image_a was compared with; the threshold allows for them.")


class SimilarFace(Answer):
    face_id: str
    subject: str
    similarity: float


class FaceWithSimilar(Face):
    similar: list[SimilarFace]


class SearchSimilarAnswer(Answer):
    model_id: str
    gallery: str
    faces: list[FaceWithSimilar]


class Best(Answer):
    subject: str
    similarity: float


class SeenFace(Answer):
    image_index: int
    box: Box
    best: Best | None = Field(description="The most similar enrolled subject, whether or not it is a match.")


class KnownPerson(Answer):
    subject: str
    faces: list[SeenFace]


class UnknownPerson(Answer):
    group: int
    faces: list[SeenFace]


class SearchUnknownAnswer(Answer):
    model_id: str
    gallery: str
    gallery_size: int
    templates: int
    fpr: float
    threshold: float
    extrapolated: bool
    group_threshold: float = Field(description="Any two faces of one group are at least this similar.")
    photos: int
    faces: int
    rejected: list[Rejected]
    known: list[KnownPerson]
    unknown: list[UnknownPerson]


class Gallery(Answer):
    gallery: str
    subjects: int
    templates: int
    created_at: datetime
    own_calibration: OwnCalibration


class GalleriesAnswer(Answer):
    galleries: list[Gallery]


class StoredFace(Face):
    face_id: str
    subject: str
    gallery: str
    model_id: str
    created_at: datetime


class Subject(Answer):
    subject: str
    gallery: str
    metadata: dict[str, Any]
    created_at: datetime
    faces: list[StoredFace]


class SubjectsAnswer(Answer):
    subjects: list[Subject]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page; null on the last.")


class AskedPoint(Answer):
    fpr: float
    threshold: float
    extrapolated: bool


class OperatingPoint(AskedPoint):
    basis: domain.Basis = Field(description="What the threshold rests on.")
    model_identities: int = Field(description="People of the model's calibration.")
    gallery_identities: int = Field(description="People of the gallery itself who count; 0 with basis `model`.")


class Drift(Answer):
    """Whether strangers score as the calibration says, by the recent probes of this gallery."""

    probes: int = Field(description="How many recent probes it rests on, 1000 at most.")
    expected: float = Field(description="Share of them that should be more similar than the median stranger.")
    measured: float | None = Field(description="Share of them that is; null without probes.")
    warning: str | None = Field(description="Says so when strangers score higher, beyond chance.")


class OperatingPointsAnswer(Answer):
    model_id: str
    gallery: str
    gallery_size: int
    templates: int
    identification: OperatingPoint
    verification: OperatingPoint
    drift: Drift


class ModelPart(Answer):
    model_id: str
    sha256: str
    license: str
    commercial_use: bool
    notice: str | None = Field(description="What to know before using these weights.")
    author: str
    trained_on: str


class CalibrationPart(Answer):
    source: str
    terms: str
    identities: int
    images: int
    impostor_pairs: int
    supported_fmr: float = Field(description="Rates of one comparison below this are extrapolated.")
    smallest_fmr: float = Field(description="`fpr` of /verify below this is refused with `fpr_unsupported`.")
    smallest_fpir: float = Field(description="`fpr` of /identify below this is refused with `fpr_unsupported`.")


class ModelAnswer(ModelPart):
    dimension: int
    crop_size: int
    flip: bool
    calibration: CalibrationPart
    detector: ModelPart


class Estimate(Answer):
    rate: float | None = Field(description="`errors` / `trials`; null without trials.")
    errors: int
    trials: int
    people: int = Field(description="Who stood for the trials.")
    people_in_error: int = Field(description="Those with an error at least.")
    low: float | None = Field(description="Lower end of the 95 % interval, people drawn anew.")
    high: float | None
    supported: bool = Field(description="Whether the sample is large enough for this rate.")
    note: str = Field(description="What the sample lacks; empty if nothing.")


class EvaluatedPoint(AskedPoint):
    fpir: Estimate = Field(description="Strangers' searches that are answered with somebody.")
    fnir: Estimate = Field(description="Enrolled people's probes that are not answered with that person.")
    matches: int = Field(description="Enrolled people's probes that are.")
    mistaken: int = Field(description="Enrolled people's probes that are answered with somebody else.")


class EvaluatedPairs(AskedPoint):
    fmr: float | None
    false_matches: int
    impostor_pairs: int
    fnmr: float | None
    false_non_matches: int
    genuine_pairs: int


class GroupPoint(Answer):
    group: str
    fpr: float
    fpir: Estimate
    fnir: Estimate


class DetPoint(Answer):
    threshold: float
    fpir: float
    fnir: float | None


class Acquisition(Answer):
    photos: int
    failed: int = Field(description="Photos from which no face could be taken.")
    codes: dict[str, int] = Field(description="Why, by error code.")


class FailedPhoto(Answer):
    file: str
    use: Literal["enrolled", "probe", "stranger"]
    code: str


class EvaluateAnswer(Answer):
    model_id: str
    enrol: int
    resamples: int = Field(description="Draws of people behind the intervals.")
    people: int
    gallery_size: int = Field(description="People of whom a photo could be enrolled.")
    templates: int
    stranger_people: int
    enrolled: Acquisition
    probes: Acquisition
    strangers: Acquisition
    ignored: int = Field(description="Files that are no photos.")
    rank1: Estimate = Field(description="Probes whose best candidate is not that person, whatever the similarity.")
    points: list[EvaluatedPoint]
    pairs: list[EvaluatedPairs] = Field(description="The same rates asked of comparisons of two photos.")
    groups: list[GroupPoint]
    det: list[DetPoint] = Field(description="The DET curve, thresholds falling.")
    failures: list[FailedPhoto]
    notes: list[str]
    picture: str | None = Field(None, description="The DET curve as a data URL, if one was asked for.")


class Status(Answer):
    status: Literal["alive", "ready"]


class Problem(Answer):
    """RFC 9457 problem details; `code` is of the documented list."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


class Conflict(Answer):
    """A photo that shows another subject."""

    index: int = Field(description="Position of the photo in the request, from 0.")
    subject: str
    face_id: str
    similarity: float
    threshold: float


class EnrollProblem(Problem):
    rejected: list[Rejected] = []
    conflicts: list[Conflict] = []


def rejected(found: tuple[domain.Rejected, ...]) -> list[Rejected]:
    """Return the photos of a set that could not be used."""
    return [Rejected(**vars(item)) for item in found]


def stored_face(template: domain.Template) -> StoredFace:
    """Return one enrolled face, without its vector."""
    return StoredFace(
        **face_fields(template.face),
        face_id=template.face_id,
        subject=template.subject,
        gallery=template.gallery,
        model_id=template.model_id,
        created_at=template.created_at,
    )


def detection(faces: list[domain.Face]) -> DetectAnswer:
    return DetectAnswer(faces=[face(found) for found in faces])


def embedding(model_id: str, faces: list[domain.EmbeddedFace]) -> EmbedAnswer:
    return EmbedAnswer(
        model_id=model_id,
        faces=[EmbeddedFace(**face_fields(item.face), embedding=item.embedding.tolist()) for item in faces],
    )


def enrollment(done: domain.Enrollment) -> EnrollAnswer:
    return EnrollAnswer(
        subject=done.subject,
        gallery=done.gallery,
        model_id=done.model_id,
        faces=[EnrolledFace(**face_fields(item.face), face_id=item.face_id) for item in done.templates],
        rejected=rejected(done.rejected),
    )


def batch(done: domain.BatchEnrollment) -> EnrollBatchAnswer:
    return EnrollBatchAnswer.model_validate(
        {**vars(done), "faces": sum(person.faces for person in done.people)}, from_attributes=True
    )


def identification(found: domain.Identification) -> IdentifyAnswer:
    return IdentifyAnswer(
        model_id=found.model_id,
        gallery=found.gallery,
        gallery_size=found.gallery_size,
        templates=found.templates,
        **vars(found.point),
        faces=[
            IdentifiedFace(
                **face_fields(item.face),
                **vars(item.decision),
                candidates=[Candidate(**vars(candidate)) for candidate in item.candidates],
            )
            for item in found.faces
        ],
    )


def verification(found: domain.Verification) -> VerifyAnswer:
    return VerifyAnswer(
        match=found.match,
        similarity=found.similarity,
        probability=found.probability,
        model_id=found.model_id,
        **vars(found.point),
        face_a=face(found.face_a),
        face_b=face(found.face_b),
        face_id=found.face_id,
        templates=found.templates,
    )


def similar(model_id: str, gallery: str, found: list[domain.SimilarFaces]) -> SearchSimilarAnswer:
    return SearchSimilarAnswer(
        model_id=model_id,
        gallery=gallery,
        faces=[
            FaceWithSimilar(
                **face_fields(item.face),
                similar=[
                    SimilarFace(face_id=other.face_id, subject=other.subject, similarity=other.similarity)
                    for other in item.similar
                ],
            )
            for item in found
        ],
    )


def unknown_search(found: domain.UnknownSearch) -> SearchUnknownAnswer:
    return SearchUnknownAnswer(
        model_id=found.model_id,
        gallery=found.gallery,
        gallery_size=found.gallery_size,
        templates=found.templates,
        **vars(found.point),
        group_threshold=found.group_threshold,
        photos=found.photos,
        faces=sum(len(faces) for _, faces in found.known) + sum(map(len, found.unknown)),
        rejected=rejected(found.rejected),
        known=[KnownPerson(subject=subject, faces=_seen(faces)) for subject, faces in found.known],
        unknown=[UnknownPerson(group=number, faces=_seen(faces)) for number, faces in enumerate(found.unknown)],
    )


def _seen(faces: tuple[domain.SeenFace, ...]) -> list[SeenFace]:
    return [
        SeenFace(
            image_index=item.image_index,
            box=face(item.face).box,
            best=Best(subject=item.best.subject, similarity=item.best.similarity) if item.best else None,
        )
        for item in faces
    ]


def gallery(found: domain.Gallery) -> Gallery:
    return Gallery(gallery=found.name, **{name: value for name, value in vars(found).items() if name != "name"})


def subject(found: domain.Subject) -> Subject:
    return Subject(
        subject=found.name,
        gallery=found.gallery,
        metadata=found.metadata,
        created_at=found.created_at,
        faces=[stored_face(template) for template in found.faces],
    )


def evaluation(found: domain.Evaluation, picture: str | None) -> EvaluateAnswer:
    return EvaluateAnswer.model_validate({**vars(found), "picture": picture}, from_attributes=True)
