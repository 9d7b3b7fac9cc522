"""The nouns of face recognition as frozen values. Nothing in here does I/O.

Coordinates are pixels of the photo after EXIF correction, origin top left, x to the right, y down.
"Left" and "right" are the viewer's: ``left_eye`` is the eye nearer to the left edge of the photo
when the face is upright in it.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
"""A decoded RGB photo, ``uint8[H, W, 3]``."""

Crop: TypeAlias = NDArray[np.uint8]
"""An aligned crop, ``uint8[S, S, 3]``, RGB."""

Landmarks: TypeAlias = NDArray[np.float32]
"""``float32[5, 2]``: left eye, right eye, nose, left mouth corner, right mouth corner, as (x, y)."""

Embedding: TypeAlias = NDArray[np.float32]
"""``float32[D]``, L2-normalised."""

LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
"""The order of the rows of :data:`Landmarks`."""

DEFAULT_GALLERY = "default"

MAX_SUBJECT_NAME = 256

MAX_ENROLL_PHOTOS = 20
"""Most photos that are enrolled in one go, and compared with one another."""

Basis: TypeAlias = Literal["model", "gallery", "both"]
"""Whose similarities a threshold rests on."""

OwnCalibrationMode: TypeAlias = Literal["stricter", "full"]
"""What a gallery's own people may do to its thresholds: only raise them, or lower them too."""


@dataclass(frozen=True)
class Box:
    """An axis-aligned rectangle in pixels; it may reach beyond the photo's edge."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return self.width * self.height


@dataclass(frozen=True)
class Quality:
    """What decides whether a face can be recognised later.

    ``size``: shorter side of the box, pixels. The distance between the eyes would shrink as a head turns.
    ``sharpness``: 0…1, from the fine detail left when the face is brought to 112×112 pixels; portraits are
    above 0.5, what nobody could recognise is below 0.1.
    ``yaw``, ``pitch``, ``roll``: degrees, estimated from the five landmarks to about 10; 0 is frontal and
    upright. Positive yaw looks to the viewer's right (−90…90), positive pitch up (−90…90), positive roll is
    clockwise in the photo (−180…180).
    """

    size: float
    sharpness: float
    yaw: float
    pitch: float
    roll: float


@dataclass(frozen=True)
class Face:
    """One detected face. ``detection_score`` is 0…1."""

    box: Box
    landmarks: Landmarks
    detection_score: float
    quality: Quality


@dataclass(frozen=True)
class Gallery:
    """A named set of subjects that is searched as one. ``own_calibration``: whether its own people may only raise
    its thresholds, or lower them too."""

    name: str
    subjects: int
    templates: int
    created_at: datetime
    own_calibration: OwnCalibrationMode


@dataclass(frozen=True)
class Subject:
    """An enrolled person of one gallery."""

    name: str
    gallery: str
    metadata: dict[str, Any]
    created_at: datetime
    faces: tuple[Template, ...] = ()


@dataclass(frozen=True)
class Template:
    """An enrolled face. ``row_id`` is its key in the index; ``face_id`` its public name."""

    row_id: int
    face_id: str
    subject: str
    gallery: str
    model_id: str
    face: Face
    created_at: datetime


@dataclass(frozen=True)
class Portrait:
    """A kept crop: a face with margin, from which the crop of any embedder can be cut later.

    ``data``: the picture as a JPEG file. ``landmarks``: ``float32[5, 2]``, in pixels of that picture.
    """

    data: bytes
    landmarks: Landmarks


@dataclass(frozen=True)
class StoredPortrait:
    """The kept crop of one enrolled face."""

    row_id: int
    portrait: Portrait


@dataclass(frozen=True)
class NewTemplate:
    """A face on its way into a gallery. ``image_sha256``: hexadecimal digest of the photo's bytes."""

    image_sha256: str
    model_id: str
    face: Face
    embedding: Embedding
    portrait: Portrait | None


@dataclass(frozen=True)
class EnrolledPhoto:
    """What is kept of a photo that a subject has already."""

    face: Face
    embedding: Embedding


@dataclass(frozen=True)
class Members:
    """Whose templates a gallery holds, without their vectors. ``row_ids``, ``subject_ids``: ``int64[N]``, by row id."""

    gallery: str
    row_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]


@dataclass(frozen=True)
class IndexEntries:
    """Templates of one gallery as an index holds them.

    ``row_ids``, ``subject_ids``: ``int64[N]``; ``embeddings``: ``float32[N, D]``, L2-normalised.
    """

    gallery: str
    row_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


@dataclass(frozen=True)
class Removal:
    """The templates that a deletion takes away, by model."""

    gallery: str
    by_model: dict[str, IndexEntries]


@dataclass(frozen=True)
class Hit:
    """One neighbour found by an index: the row ids of template and subject, and the cosine."""

    row_id: int
    subject_id: int
    similarity: float


@dataclass(frozen=True)
class Candidate:
    """A subject put forward for a probe, with the template of it that is most similar.

    ``probability``: 0…1, that the two are one person, if both answers were as likely before.
    """

    subject: str
    face_id: str
    similarity: float
    probability: float


@dataclass(frozen=True)
class OperatingPoint:
    """A false-positive rate and the similarity threshold that yields it, for one model.

    ``fpr``: what was asked for. ``threshold``: cosine; a similarity at or above it is a match.
    ``extrapolated``: the calibration sample is too small for this rate, and the threshold is that of a model
    of its tail. ``basis``: what the threshold rests on, the model's calibration, the gallery's own people, or
    both; ``model_identities``, ``gallery_identities``: on how many people of each.
    """

    fpr: float
    threshold: float
    extrapolated: bool
    basis: Basis = "model"
    model_identities: int = 0
    gallery_identities: int = 0


@dataclass(frozen=True)
class Decision:
    """The answer to one probe. ``subject`` is None when the decision is ``unknown``.

    ``similarity``, ``probability``: the best candidate's, match or not; None without candidates. ``margin``: by
    how much its similarity exceeds that of the next subject; None if there is no other.
    """

    decision: Literal["match", "unknown"]
    subject: str | None
    similarity: float | None
    margin: float | None
    probability: float | None


@dataclass(frozen=True)
class Drift:
    """Whether strangers score as the calibration says, in one gallery.

    ``probes``: how many recent ones this rests on. ``expected``, ``measured``: the share of them that is more
    similar than the median stranger, 0…1; ``measured`` is None without probes. ``warning``: for people, or None.
    """

    probes: int
    expected: float
    measured: float | None
    warning: str | None


@dataclass(frozen=True)
class Rejected:
    """A photo of a set that could not be used; ``index`` counts from 0, ``code`` is of the error list."""

    index: int
    code: str
    detail: str


@dataclass(frozen=True)
class Conflict:
    """A photo on its way into a gallery that shows another subject; ``index`` counts from 0.

    ``face_id``: that subject's most similar face. ``threshold``: cosine that ``similarity`` reaches.
    """

    index: int
    subject: str
    face_id: str
    similarity: float
    threshold: float


@dataclass(frozen=True)
class Enrollment:
    """What became of an enrolment."""

    subject: str
    gallery: str
    model_id: str
    templates: tuple[Template, ...]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class RejectedFile:
    """A file of an archive that could not be enrolled; ``code`` is of the error list."""

    file: str
    code: str
    detail: str


@dataclass(frozen=True)
class ConflictingFile:
    """A file of an archive that shows another subject; the rest as in :class:`Conflict`."""

    file: str
    subject: str
    face_id: str
    similarity: float
    threshold: float


@dataclass(frozen=True)
class PersonEnrollment:
    """What became of a person's folder in an archive. ``faces``: how many of its photos are enrolled now."""

    subject: str
    faces: int
    rejected: tuple[RejectedFile, ...]
    conflicts: tuple[ConflictingFile, ...]


@dataclass(frozen=True)
class BatchEnrollment:
    """What became of an archive. ``ignored``: how many of its files are no photos."""

    gallery: str
    model_id: str
    people: tuple[PersonEnrollment, ...]
    ignored: int


@dataclass(frozen=True)
class IdentifiedFace:
    """A face of a probe photo, its decision, and the candidates, most similar first."""

    face: Face
    decision: Decision
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Identification:
    """The answer to a probe photo. ``gallery_size`` counts subjects, ``templates`` their faces."""

    model_id: str
    gallery: str
    gallery_size: int
    templates: int
    point: OperatingPoint
    faces: tuple[IdentifiedFace, ...]


@dataclass(frozen=True)
class Verification:
    """The answer to "the same person?". ``face_b`` is the other photo's face, or the enrolled face
    that is most similar, whose ``face_id`` is given then. ``templates``: how many faces the photo was compared with."""

    match: bool
    similarity: float
    probability: float
    model_id: str
    point: OperatingPoint
    face_a: Face
    face_b: Face
    face_id: str | None
    templates: int


@dataclass(frozen=True)
class SimilarFaces:
    """A face and the enrolled faces most similar to it, whoever they are, most similar first."""

    face: Face
    similar: tuple[Candidate, ...]


@dataclass(frozen=True)
class SeenFace:
    """A face in a set of photos, and the enrolled subject it is most similar to, if anybody is enrolled."""

    image_index: int
    face: Face
    best: Candidate | None


@dataclass(frozen=True)
class UnknownSearch:
    """Who was seen in a set of photos: enrolled subjects with their faces, and strangers person by person.

    ``group_threshold``: cosine that any two faces of one stranger reach.
    """

    model_id: str
    gallery: str
    gallery_size: int
    templates: int
    point: OperatingPoint
    group_threshold: float
    photos: int
    rejected: tuple[Rejected, ...]
    known: tuple[tuple[str, tuple[SeenFace, ...]], ...]
    unknown: tuple[tuple[SeenFace, ...], ...]


@dataclass(frozen=True)
class EmbeddedFace:
    """A face with its embedding."""

    face: Face
    embedding: Embedding


@dataclass(frozen=True)
class Estimate:
    """A measured error rate: ``errors`` of ``trials``.

    ``rate``: None without trials. ``people``: who stood for trials; ``people_in_error``: those with an error at
    least. ``low``, ``high``: 95 % interval, people drawn anew. ``supported``: whether the sample is large enough for
    this rate; ``note`` says in words what it lacks, else it is empty.
    """

    rate: float | None
    errors: int
    trials: int
    people: int
    people_in_error: int
    low: float | None
    high: float | None
    supported: bool
    note: str


@dataclass(frozen=True)
class EvaluatedPoint:
    """What became of an asked rate. ``matches``: probes of enrolled people who were found; ``mistaken``: those who
    were taken for another enrolled person. Both are cases of ``fnir.trials``; the rest was answered ``unknown`` or
    showed no face."""

    fpr: float
    threshold: float
    extrapolated: bool
    fpir: Estimate
    fnir: Estimate
    matches: int
    mistaken: int


@dataclass(frozen=True)
class EvaluatedPairs:
    """1:1, every two photos compared. ``fpr``: the FMR that was asked for. ``fmr`` and ``fnmr`` are None without
    pairs."""

    fpr: float
    threshold: float
    extrapolated: bool
    fmr: float | None
    false_matches: int
    impostor_pairs: int
    fnmr: float | None
    false_non_matches: int
    genuine_pairs: int


@dataclass(frozen=True)
class GroupPoint:
    """The rates of one group at one asked rate, in searches of the whole gallery."""

    group: str
    fpr: float
    fpir: Estimate
    fnir: Estimate


@dataclass(frozen=True)
class DetPoint:
    """One point of the curve of detection error trade-off."""

    threshold: float
    fpir: float
    fnir: float | None


@dataclass(frozen=True)
class Acquisition:
    """How many photos of one use there were, and from how many no face could be taken, by error code."""

    photos: int
    failed: int
    codes: dict[str, int]


@dataclass(frozen=True)
class FailedPhoto:
    """A photo from which no face could be taken for its use."""

    file: str
    use: Literal["enrolled", "probe", "stranger"]
    code: str


@dataclass(frozen=True)
class Evaluation:
    """The service measured on somebody's own photos.

    ``enrol``: how many photos of each person were to be enrolled. ``people``: folders of people; ``gallery_size``:
    those of whom a photo could be enrolled. ``enrolled``, ``probes``, ``strangers``: the photos by their use.
    ``ignored``: files that are no photos. ``notes``: what to know before these figures are believed.
    """

    model_id: str
    enrol: int
    resamples: int
    people: int
    gallery_size: int
    templates: int
    stranger_people: int
    enrolled: Acquisition
    probes: Acquisition
    strangers: Acquisition
    ignored: int
    rank1: Estimate
    points: tuple[EvaluatedPoint, ...]
    pairs: tuple[EvaluatedPairs, ...]
    groups: tuple[GroupPoint, ...]
    det: tuple[DetPoint, ...]
    failures: tuple[FailedPhoto, ...]
    notes: tuple[str, ...]


def subject_name(value: str) -> str:
    """Return ``value`` if a subject may be called so. Raises ValueError, which says what is wrong with it."""
    if not value.strip():
        raise ValueError("must not be blank")
    if len(value) > MAX_SUBJECT_NAME:
        raise ValueError(f"must not exceed {MAX_SUBJECT_NAME} characters")
    if value in (".", ".."):
        raise ValueError("must not be . or .., which no URL can name")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("must not hold control characters")
    return value
