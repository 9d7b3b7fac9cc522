"""The way of a photo, written once for every verb of the API.

bytes → image → faces → aligned crops → embeddings → candidates → decision. Everything here blocks; call it
from worker threads. Any number of them may.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service import decision, evaluation, layout
from service.archive import Archive, read_archive
from service.calibration import Calibration
from service.domain import (
    DEFAULT_GALLERY,
    MAX_ENROLL_PHOTOS,
    BatchEnrollment,
    Candidate,
    Conflict,
    ConflictingFile,
    Decision,
    Drift,
    EmbeddedFace,
    Enrollment,
    Evaluation,
    Face,
    Gallery,
    Hit,
    Identification,
    IdentifiedFace,
    Image,
    NewTemplate,
    OperatingPoint,
    OwnCalibrationMode,
    PersonEnrollment,
    Rejected,
    RejectedFile,
    Removal,
    SeenFace,
    SimilarFaces,
    Subject,
    Template,
    UnknownSearch,
    Verification,
    subject_name,
)
from service.drift import Histogram, Probes
from service.errors import (
    FaceNotFound,
    IdentityMismatch,
    InvalidArchive,
    InvalidRequest,
    ModelMismatch,
    NoFace,
    PhotoError,
    SubjectConflict,
    SubjectNotFound,
    VultusError,
)
from service.evaluation import Placed, Plan, Shot
from service.gallery.base import GalleryIndex
from service.own_calibration import OwnCalibrations
from service.store.repository import Repository
from service.vision.alignment import align, cut_portrait
from service.vision.embedder import Embedder
from service.vision.image import decode_image
from service.vision.quality import one_usable, searchable

REEMBED_BATCH = 32

SPARE = 4
"""Candidates that are asked of the index beyond those wanted: its similarities may be off in the fourth digit."""

SIBLING_FPR = 0.05
"""FMR at which a photo counts as its siblings'. There about as many strangers are let in as right photos are refused,
2 to 3 %; measured by ``vultus-train guards`` on ``validation``."""


class Detector(Protocol):
    """Finds faces, the largest first."""

    def detect(self, image: Image) -> list[Face]: ...


class EmbeddingQueue(Protocol):
    """Turns crops ``uint8[N, S, S, 3]`` into embeddings ``float32[N, D]``, when it is their turn."""

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class PhotoLimits(Protocol):
    """The limits of one photo."""

    @property
    def max_image_bytes(self) -> int: ...

    @property
    def max_image_pixels(self) -> int: ...


@dataclass(frozen=True)
class RecognizerOptions:
    """``fpr`` and ``verify_fpr`` are the defaults of 1:N and 1:1; the limits are those of one photo.

    ``conflict_fpr``: share of new people who may be mistaken for enrolled ones when they are enrolled.
    """

    fpr: float
    verify_fpr: float
    conflict_fpr: float
    max_image_bytes: int
    max_image_pixels: int
    keep_crops: bool


class Recognizer:
    """All that the service knows how to do with photos, galleries, subjects and faces."""

    def __init__(
        self,
        *,
        detector: Detector,
        embedder: Embedder,
        queue: EmbeddingQueue,
        calibration: Calibration,
        index: GalleryIndex,
        repository: Repository,
        options: RecognizerOptions,
    ) -> None:
        self.model_id = embedder.model_id
        self.repository = repository
        self._detector = detector
        self._embedder = embedder
        self._queue = queue
        self._calibration = calibration
        self._index = index
        self._options = options
        # Record and index change together: one writer at a time, so that nobody deletes what is half enrolled.
        self._writing = threading.Lock()
        self._probes = Probes()
        self._counting = threading.Lock()
        self._own = OwnCalibrations(calibration, repository.embeddings)
        record = repository.members(self.model_id)
        for missing in index.restore(record, *repository.renew_stamp()):
            for entries in repository.index_entries(missing):
                index.add(entries)
        for members in record:
            self._own.load(members)
        self._foreign = repository.foreign_models(self.model_id)

    # --- photos

    def detect(self, photo: bytes) -> list[Face]:
        """Return every face of a photo, the largest first."""
        return self._see(photo)[1]

    def embed(self, photo: bytes) -> list[EmbeddedFace]:
        """Return every face of a photo with its embedding. Raises ``NoFace``."""
        faces, embeddings = self._probe(photo)
        return [EmbeddedFace(face, vector) for face, vector in zip(faces, embeddings, strict=True)]

    def enroll(
        self,
        gallery: str,
        subject: str,
        photos: Sequence[bytes],
        metadata: dict[str, Any] | None,
        *,
        allow_conflict: bool = False,
    ) -> Enrollment:
        """Enrol a person from photos that show nobody else.

        Photos that cannot be used are listed in ``rejected``, and so are those that show another person than most of
        them; if that is all of them, the first one's error is raised, with ``rejected`` among its members. If another
        subject is found in a photo, ``EnrolledElsewhere`` is raised and nothing is stored, unless ``allow_conflict``.
        A photo that the subject has already is not looked at again. When this returns, the accepted faces are on disk.
        """
        self._require(gallery)
        digests = [hashlib.sha256(photo).hexdigest() for photo in photos]
        known = self.repository.enrolled_photos(gallery, subject, digests)
        accepted: list[tuple[int, Face, Image | None]] = []
        rejected: list[Rejected] = []
        for position, (photo, digest) in enumerate(zip(photos, digests, strict=True)):
            if digest in known:
                accepted.append((position, known[digest].face, None))
                continue
            try:
                image, faces = self._see(photo)
                accepted.append((position, one_usable(faces), image))
            except PhotoError as exc:
                rejected.append(Rejected(position, exc.code, exc.detail))
        if not accepted:
            raise NothingAccepted(rejected)
        looked_at = iter(self._embed([(image, face) for _, face, image in accepted if image is not None]))
        embeddings = np.stack(
            [
                known[digests[position]].embedding if image is None else next(looked_at)
                for position, _, image in accepted
            ]
        )
        same = decision.siblings(embeddings, self._sibling_threshold(len(accepted)))
        rejected += [
            Rejected(item[0], IdentityMismatch.code, "This photo does not show whom the others show.")
            for item, one in zip(accepted, same, strict=True)
            if not one
        ]
        rejected.sort(key=lambda item: item.index)
        accepted = [item for item, one in zip(accepted, same, strict=True) if one]
        embeddings = embeddings[same]
        new = [
            NewTemplate(
                digests[position],
                self.model_id,
                face,
                embedding,
                None if image is None or not self._options.keep_crops else cut_portrait(image, face),
            )
            for (position, face, image), embedding in zip(accepted, embeddings, strict=True)
        ]
        with self._writing:
            mode = self._require(gallery)
            # Under the lock: of two who enrol one person under two names at once the second finds the first.
            if not known or len(self.repository.enrolled_photos(gallery, subject, list(known))) == len(known):
                if not allow_conflict:
                    self._refuse_conflicts(gallery, mode, subject, [position for position, *_ in accepted], embeddings)
                templates, entries = self.repository.enroll(gallery, subject, metadata, new)
                self._index.add(entries)
                self._own.add(entries)
                return Enrollment(subject, gallery, self.model_id, tuple(templates), tuple(rejected))
        # A face that was known has been deleted meanwhile: its photo is looked at after all.
        return self.enroll(gallery, subject, photos, metadata, allow_conflict=allow_conflict)

    def enroll_archive(
        self,
        archive: bytes,
        gallery: str,
        max_bytes: int,
        checkpoint: Callable[[], None],
        *,
        allow_conflict: bool = False,
    ) -> BatchEnrollment:
        """Enrol everybody in a ZIP with a folder of photos for each person, one after the other, as ``enroll`` does.

        Of a person with more than :data:`~service.domain.MAX_ENROLL_PHOTOS` photos so many are enrolled at a time.
        ``max_bytes``: limit on what the ZIP holds, unpacked. ``checkpoint``: called before each time; what it raises
        ends the work, and what is enrolled by then stays, as with every other error on the way. Sent again, the same
        archive goes on where it was. Raises ``InvalidArchive`` and ``ImageTooLarge`` before anybody is enrolled.
        """
        self._require(gallery)
        with read_archive(archive, max_bytes) as files:
            photos, ignored = layout.people(files.names)
            if not photos:
                raise InvalidArchive("In the archive there are no photos in folders: each person needs one.")
            people: dict[str, PersonEnrollment] = {}
            for person, _ in photos:
                try:
                    people[person] = PersonEnrollment(subject_name(person), 0, (), ())
                except ValueError as exc:
                    raise InvalidArchive(f"A folder's name cannot be a subject's: it {exc}.") from None
            for lot in layout.lots(photos, MAX_ENROLL_PHOTOS):
                checkpoint()
                done, before = self._enroll_lot(files, lot, gallery, allow_conflict), people[lot.person]
                people[lot.person] = PersonEnrollment(
                    lot.person,
                    before.faces + done.faces,
                    before.rejected + done.rejected,
                    before.conflicts + done.conflicts,
                )
        return BatchEnrollment(gallery, self.model_id, tuple(people.values()), ignored)

    def identify(self, photo: bytes, gallery: str, fpr: float | None, top_k: int) -> Identification:
        """Say of every face in a photo who in the gallery it is, or that it is nobody there. Raises ``NoFace``."""
        mode = self._require(gallery)
        faces, embeddings = self._probe(photo)
        # Of two at least, so that the margin is known.
        found, subjects, templates = self._candidates(gallery, embeddings, max(top_k, 2))
        point = self._identification_point(gallery, mode, self._fpr(fpr), subjects, templates)
        decisions = [decision.decide(candidates, point) for candidates in found]
        self._count(gallery, decisions, subjects, templates)
        return Identification(
            self.model_id,
            gallery,
            subjects,
            templates,
            point,
            tuple(
                IdentifiedFace(face, decided, tuple(candidates[:top_k]))
                for face, decided, candidates in zip(faces, decisions, found, strict=True)
            ),
        )

    def verify_photos(self, photo_a: bytes, photo_b: bytes, fpr: float | None) -> Verification:
        """Say whether the largest faces of two photos are one person's. Raises ``NoFace``."""
        seen = [self._see(photo) for photo in (photo_a, photo_b)]
        for name, (_, faces) in zip(("image_a", "image_b"), seen, strict=True):
            if not faces:
                raise NoFace(f"No face was found in {name}.")
        first, second = self._embed([(image, faces[0]) for image, faces in seen])
        point = self._calibration.verification_point(self._verify_fpr(fpr))
        return self._verified(float(first @ second), point, seen[0][1][0], seen[1][1][0], None, 1)

    def verify_subject(self, photo: bytes, gallery: str, subject: str, fpr: float | None) -> Verification:
        """Say whether the largest face of a photo is an enrolled subject's. Raises ``NoFace``.

        The subject's best template counts, and the threshold allows for how many there are.
        """
        mode = self._require(gallery)
        image, faces = self._see(photo)
        if not faces:
            raise NoFace("No face was found in image_a.")
        (probe,) = self._embed([(image, faces[0])])
        enrolled = self.repository.subject(gallery, subject).faces
        vectors = self.repository.embeddings([template.row_id for template in enrolled])
        if len(vectors) != len(enrolled) or not len(enrolled):
            raise SubjectNotFound(f"The subject {subject!r} of the gallery {gallery!r} has no enrolled face.")
        similarities = vectors @ probe
        best = int(np.argmax(similarities))
        point = self._calibration.subject_point(self._verify_fpr(fpr), len(enrolled))
        point = self._own.combined(point, gallery, mode, 1, len(enrolled))
        best_face = enrolled[best]
        return self._verified(
            float(similarities[best]), point, faces[0], best_face.face, best_face.face_id, len(enrolled)
        )

    def similar_to_photo(
        self, photo: bytes, gallery: str, top_k: int, min_similarity: float | None
    ) -> list[SimilarFaces]:
        """Return for each face of a photo the most similar enrolled faces. Raises ``NoFace``."""
        self._require(gallery)
        faces, embeddings = self._probe(photo)
        return self._similar(faces, embeddings, gallery, top_k, min_similarity, None)

    def similar_to_face(
        self, template: Template, gallery: str, top_k: int, min_similarity: float | None
    ) -> list[SimilarFaces]:
        """Return the enrolled faces most similar to an enrolled one, without that one itself."""
        for name in {template.gallery, gallery}:
            self._require(name)
        vectors = self.repository.embeddings([template.row_id])
        if not len(vectors):
            raise FaceNotFound(f"There is no enrolled face {template.face_id!r}.")
        return self._similar([template.face], vectors, gallery, top_k, min_similarity, template.row_id)

    def search_unknown(self, photos: Sequence[bytes], gallery: str, fpr: float | None) -> UnknownSearch:
        """Find every face in a set of photos that belongs to nobody enrolled, and group them by person.

        Photos that are broken or show no face are listed in ``rejected``.
        """
        mode = self._require(gallery)
        rejected: list[Rejected] = []
        faces: list[tuple[int, Face]] = []
        vectors: list[NDArray[np.float32]] = []
        for position, photo in enumerate(photos):
            try:
                found, embeddings = self._probe(photo)
            except PhotoError as exc:
                rejected.append(Rejected(position, exc.code, exc.detail))
                continue
            faces.extend((position, face) for face in found)
            vectors.append(embeddings)
        probes = np.concatenate(vectors) if vectors else np.empty((0, self._embedder.dimension), np.float32)
        candidates, subjects, templates = self._candidates(gallery, probes, 1)
        rate = self._fpr(fpr)
        point = self._identification_point(gallery, mode, rate, subjects, templates)
        seen = [
            SeenFace(position, face, best[0] if best else None)
            for (position, face), best in zip(faces, candidates, strict=True)
        ]
        known: dict[str, list[SeenFace]] = {}
        strangers: list[int] = []
        decisions = [decision.decide(best, point) for best in candidates]
        self._count(gallery, decisions, subjects, templates)
        for number, (face, decided) in enumerate(zip(seen, decisions, strict=True)):
            if decided.subject is None:
                strangers.append(number)
            else:
                known.setdefault(decided.subject, []).append(face)
        # A stranger's face is compared with every other one's, as a probe is with a gallery's templates.
        others = len(strangers) - 1
        group_threshold = self._identification_point(gallery, mode, rate, others, others).threshold
        groups: dict[int, list[SeenFace]] = {}
        for number, label in zip(strangers, decision.group(probes[strangers], group_threshold), strict=True):
            groups.setdefault(int(label), []).append(seen[number])
        return UnknownSearch(
            self.model_id,
            gallery,
            subjects,
            templates,
            point,
            group_threshold,
            len(photos),
            tuple(rejected),
            tuple((subject, tuple(held)) for subject, held in known.items()),
            tuple(tuple(held) for held in groups.values()),
        )

    def evaluate(
        self, archive: bytes, strangers: str, plan: Plan, max_bytes: int, checkpoint: Callable[[], None]
    ) -> Evaluation:
        """Measure how well people are recognised on the photos of a ZIP; nothing of it is stored anywhere.

        ``strangers``: its folder of strangers. ``max_bytes``: limit on what it holds, unpacked. ``checkpoint``: called
        before each photo; what it raises ends the work. No place of the embedder's queue is taken. Raises
        ``InvalidArchive``, ``ImageTooLarge`` and ``FprUnsupported``.
        """
        for fpr in plan.fprs:
            self._calibration.identification_point(fpr, 1, 1)
        with read_archive(archive, max_bytes) as files:
            try:
                placed, ignored = evaluation.laid_out(files.names, strangers)
            except ValueError as exc:
                raise InvalidArchive(f"In the archive {exc}.") from None

            def photos() -> Iterator[tuple[Placed, bytes]]:
                for photo in placed:
                    checkpoint()
                    # Of a photo that is too large only so much is read; its own check then names the limit.
                    yield photo, files.read(photo.file, self._options.max_image_bytes + 1)

            shots = list(acquire(photos(), self._detector, self._embedder, self._options))
        return evaluation.evaluate(shots, self._calibration, replace(plan, ignored=ignored))

    # --- what is enrolled

    def galleries(self) -> list[Gallery]:
        """Return every gallery."""
        return self.repository.galleries()

    def gallery(self, name: str) -> Gallery:
        """Return one gallery. Raises ``GalleryNotFound``."""
        return self.repository.gallery(name)

    def create_gallery(self, name: str) -> Gallery:
        """Add an empty gallery. Raises ``GalleryExists``."""
        with self._writing:
            return self.repository.create_gallery(name)

    def set_own_calibration(self, gallery: str, mode: OwnCalibrationMode) -> Gallery:
        """Say what a gallery's own people may do to its thresholds. Raises ``GalleryNotFound``."""
        with self._writing:
            return self.repository.set_own_calibration(gallery, mode)

    def delete_gallery(self, name: str) -> None:
        """Delete a gallery and all that it holds, for good. Raises ``GalleryNotFound``, ``InvalidRequest``."""
        if name == DEFAULT_GALLERY:
            raise InvalidRequest("The default gallery cannot be deleted; delete its subjects instead.")
        self._delete(self.repository.deleting_gallery(name))
        with self._counting:
            self._probes.forget(name)

    def subjects(self, gallery: str, after: int, limit: int) -> tuple[list[Subject], int | None]:
        """Return a page of subjects, and the mark to go on ``after``, if there are more."""
        return self.repository.subjects(gallery, after, limit)

    def subject(self, gallery: str, name: str) -> Subject:
        """Return one subject with its faces. Raises ``GalleryNotFound`` and ``SubjectNotFound``."""
        return self.repository.subject(gallery, name)

    def update_subject(self, gallery: str, name: str, metadata: dict[str, Any]) -> Subject:
        """Replace a subject's metadata. Raises ``GalleryNotFound`` and ``SubjectNotFound``."""
        with self._writing:
            updated = self.repository.update_subject(gallery, name, metadata)
        # What was replaced is personal data too.
        self.repository.forget()
        return updated

    def delete_subject(self, gallery: str, name: str) -> None:
        """Delete a subject, its templates and crops, for good. Raises as ``subject`` does."""
        self._delete(self.repository.deleting_subject(gallery, name))

    def face(self, face_id: str) -> Template:
        """Return one enrolled face. Raises ``FaceNotFound``."""
        return self.repository.template(face_id)

    def delete_face(self, face_id: str) -> None:
        """Delete one template and its crop, for good; the subject stays. Raises ``FaceNotFound``."""
        self._delete(self.repository.deleting_face(face_id))

    def operating_points(self, gallery: str, fpr: float | None) -> tuple[OperatingPoint, OperatingPoint, int, int]:
        """Return the 1:N and the 1:1 operating point now, and how many subjects and templates there are."""
        mode = self._require(gallery)
        subjects, templates = self._index.sizes(gallery)
        return (
            self._identification_point(gallery, mode, self._fpr(fpr), subjects, templates),
            self._calibration.verification_point(self._verify_fpr(fpr)),
            subjects,
            templates,
        )

    def drift(self, gallery: str) -> Drift:
        """Say whether strangers have scored as the calibration says, since the service started."""
        with self._counting:
            return self._probes.drift(gallery)

    def probe_similarities(self) -> dict[tuple[str, str], Histogram]:
        """Return the best similarities of probes since the service started, by gallery and decision."""
        with self._counting:
            return copy.deepcopy(self._probes.similarities)

    # --- steps

    def _enroll_lot(self, files: Archive, lot: layout.Lot, gallery: str, allow_conflict: bool) -> PersonEnrollment:
        names: list[str] = []
        photos: list[bytes] = []
        rejected: list[RejectedFile] = []
        for name in lot.files:
            try:
                # Of a photo that is too large only so much is read; its own check then names the limit.
                photos.append(files.read(name, self._options.max_image_bytes + 1))
                names.append(name)
            except InvalidArchive as exc:
                rejected.append(RejectedFile(name, exc.code, exc.detail))
        faces = 0
        unusable: tuple[Rejected, ...] = ()
        conflicts: tuple[ConflictingFile, ...] = ()
        try:
            if photos:
                done = self.enroll(gallery, lot.person, photos, None, allow_conflict=allow_conflict)
                faces, unusable = len(done.templates), done.rejected
        except NothingAccepted as exc:
            unusable = exc.rejected
        except EnrolledElsewhere as exc:
            conflicts = tuple(
                ConflictingFile(names[item.index], item.subject, item.face_id, item.similarity, item.threshold)
                for item in exc.conflicts
            )
            elsewhere = {conflict.index for conflict in exc.conflicts}
            unusable = tuple(
                Rejected(index, exc.code, "Another photo of this person shows somebody else, and nothing was stored.")
                for index in range(len(names))
                if index not in elsewhere
            )
        rejected += [RejectedFile(names[item.index], item.code, item.detail) for item in unusable]
        return PersonEnrollment(lot.person, faces, tuple(rejected), conflicts)

    def _sibling_threshold(self, photos: int) -> float:
        fpr = max(SIBLING_FPR, self._calibration.smallest_fmr)
        return self._calibration.subject_point(fpr, max(photos - 1, 1)).threshold

    def _refuse_conflicts(
        self,
        gallery: str,
        mode: OwnCalibrationMode,
        subject: str,
        positions: Sequence[int],
        embeddings: NDArray[np.float32],
    ) -> None:
        """Raise ``EnrolledElsewhere`` if the gallery's best match of a photo is another subject than ``subject``."""
        found, subjects, templates = self._candidates(gallery, embeddings, 1)
        fpr = max(self._options.conflict_fpr, self._calibration.smallest_fpir)
        point = self._identification_point(gallery, mode, fpr, subjects, templates)
        conflicts = [
            Conflict(position, candidates[0].subject, candidates[0].face_id, candidates[0].similarity, point.threshold)
            for position, candidates in zip(positions, found, strict=True)
            if decision.decide(candidates, point).subject not in (None, subject)
        ]
        if conflicts:
            raise EnrolledElsewhere(conflicts)

    def _count(self, gallery: str, decisions: Sequence[Decision], subjects: int, templates: int) -> None:
        with self._counting:
            # Of a gallery that was deleted since the search nothing may stay behind.
            if not self._index.sizes(gallery)[0]:
                return
            for decided in decisions:
                if decided.similarity is not None:
                    rate = self._calibration.identification_rate(decided.similarity, subjects, templates)
                    self._probes.add(gallery, decided.decision, decided.similarity, rate, subjects)

    def _require(self, gallery: str) -> OwnCalibrationMode:
        mode = self.repository.own_calibration(gallery)
        others = self._foreign.get(gallery)
        if others:
            raise ModelMismatch(
                f"The gallery {gallery!r} was enrolled with {', '.join(sorted(others))}, and {self.model_id} is "
                "loaded. Load the other model again, or stop the service and run `vultus reembed`."
            )
        return mode

    def _identification_point(
        self, gallery: str, mode: OwnCalibrationMode, fpr: float, subjects: int, templates: int
    ) -> OperatingPoint:
        point = self._calibration.identification_point(fpr, subjects, templates)
        return self._own.combined(point, gallery, mode, subjects, templates)

    def _see(self, photo: bytes) -> tuple[Image, list[Face]]:
        image = decode_image(photo, self._options.max_image_bytes, self._options.max_image_pixels)
        return image, self._detector.detect(image)

    def _embed(self, faces: Sequence[tuple[Image, Face]]) -> NDArray[np.float32]:
        return self._queue.embed(cut_crops(self._embedder, faces))

    def _probe(self, photo: bytes) -> tuple[list[Face], NDArray[np.float32]]:
        image, faces = self._see(photo)
        if not faces:
            raise NoFace
        return faces, self._embed([(image, face) for face in faces])

    def _candidates(
        self, gallery: str, probes: NDArray[np.float32], top_k: int
    ) -> tuple[list[list[Candidate]], int, int]:
        found = self._index.search_subjects(gallery, probes, top_k + SPARE)
        return self._named(found.hits, probes, top_k), found.subjects, found.templates

    def _similar(
        self,
        faces: Sequence[Face],
        probes: NDArray[np.float32],
        gallery: str,
        top_k: int,
        min_similarity: float | None,
        without: int | None,
    ) -> list[SimilarFaces]:
        found = self._index.search_faces(gallery, probes, top_k + SPARE)
        others = [[hit for hit in hits if hit.row_id != without] for hits in found]
        lowest = -2.0 if min_similarity is None else min_similarity
        return [
            SimilarFaces(face, tuple(candidate for candidate in candidates if candidate.similarity >= lowest))
            for face, candidates in zip(faces, self._named(others, probes, top_k), strict=True)
        ]

    def _named(self, found: Sequence[Sequence[Hit]], probes: NDArray[np.float32], top_k: int) -> list[list[Candidate]]:
        """Name the ``top_k`` most similar of what was found, with similarities from the embeddings as enrolled."""
        labels = self.repository.labels(list({hit.row_id for hits in found for hit in hits}))
        named = []
        for hits, probe in zip(found, probes, strict=True):
            # Whoever was deleted since the search is no candidate.
            held = [labels[hit.row_id] for hit in hits if hit.row_id in labels]
            scored = [(float(label.embedding @ probe), label) for label in held]
            scored.sort(key=lambda item: -item[0])
            named.append(
                [
                    Candidate(
                        label.subject, label.face_id, _cosine(similarity), self._calibration.probability(similarity)
                    )
                    for similarity, label in scored[:top_k]
                ]
            )
        return named

    def _verified(
        self,
        similarity: float,
        point: OperatingPoint,
        face_a: Face,
        face_b: Face,
        face_id: str | None,
        templates: int,
    ) -> Verification:
        return Verification(
            similarity >= point.threshold,
            _cosine(similarity),
            self._calibration.probability(similarity),
            self.model_id,
            point,
            face_a,
            face_b,
            face_id,
            templates,
        )

    def _delete(self, deletion: AbstractContextManager[Removal]) -> None:
        removed: Removal | None = None
        committed = False
        try:
            with self._writing:
                try:
                    with deletion as removed:
                        for entries in removed.by_model.values():
                            self._index.remove(removed.gallery, entries.row_ids)
                except BaseException:
                    if removed is not None and self.model_id in removed.by_model:
                        self._index.add(removed.by_model[self.model_id])
                    raise
                committed = True
                if removed.by_model.keys() - {self.model_id}:
                    self._foreign = self.repository.foreign_models(self.model_id)
                if self.model_id in removed.by_model:
                    self._own.remove(removed.gallery, removed.by_model[self.model_id].row_ids.tolist())
        finally:
            if committed:
                self.repository.forget()

    def _fpr(self, asked: float | None) -> float:
        return self._options.fpr if asked is None else asked

    def _verify_fpr(self, asked: float | None) -> float:
        return self._options.verify_fpr if asked is None else asked


class NothingAccepted(VultusError):
    """An enrolment of which no photo could be used: 422 with the first photo's code."""

    status = 422
    title = "None of the photos can be enrolled"

    def __init__(self, rejected: Sequence[Rejected]) -> None:
        super().__init__(rejected[0].detail)
        self.code = rejected[0].code
        self.rejected = tuple(rejected)


class EnrolledElsewhere(SubjectConflict):
    """An enrolment of photos that show another subject of the gallery; nothing was stored."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        named = ", ".join(sorted({repr(conflict.subject) for conflict in conflicts}))
        super().__init__(
            f"Photos of this enrolment show {named}, enrolled already. Nothing was stored. Enrol them there, or send "
            "allow_conflict=true."
        )
        self.conflicts = tuple(conflicts)


def cut_crops(embedder: Embedder, faces: Sequence[tuple[Image, Face]]) -> NDArray[np.uint8]:
    """Cut each face's aligned crop as the embedder wants it, ``uint8[N, S, S, 3]``."""
    template, size = embedder.manifest.template.points, embedder.manifest.input.size
    if not faces:
        return np.empty((0, size, size, 3), np.uint8)
    return np.stack([align(image, face.landmarks, template, size) for image, face in faces])


def acquire(
    photos: Iterable[tuple[Placed, bytes]], detector: Detector, embedder: Embedder, limits: PhotoLimits
) -> Iterator[Shot]:
    """See each photo as enrolment does, and say what became of it, with the embedding of its face."""
    for photo, data in photos:
        try:
            image = decode_image(data, limits.max_image_bytes, limits.max_image_pixels)
        except PhotoError as exc:
            yield Shot(photo, exc.code, None)
            continue
        face, problem = searchable(detector.detect(image))
        yield Shot(photo, problem, None if face is None else embedder.embed(cut_crops(embedder, [(image, face)]))[0])


def reembed(repository: Repository, embedder: Embedder, progress: Callable[[int], None] = lambda _: None) -> int:
    """Move every template to ``embedder``'s model, from the kept crops.

    ``progress`` is told how many were done. It can be interrupted and repeated. Returns how many templates
    remain of other models, because no crop of them was kept.
    """
    for batch in _portraits(repository, embedder.model_id):
        crops = [
            align(
                decode_image(stored.portrait.data, len(stored.portrait.data), 2**31),
                stored.portrait.landmarks,
                embedder.manifest.template.points,
                embedder.manifest.input.size,
            )
            for stored in batch
        ]
        vectors = embedder.embed(np.stack(crops))
        repository.replace_embeddings(
            embedder.model_id,
            [(stored.row_id, vector) for stored, vector in zip(batch, vectors, strict=True)],
        )
        progress(len(batch))
    repository.forget()
    return repository.count_templates(embedder.model_id)


def _portraits(repository: Repository, model_id: str) -> Iterator[list[Any]]:
    after = 0
    while batch := repository.portraits(model_id, after, REEMBED_BATCH):
        yield batch
        after = batch[-1].row_id


def _cosine(similarity: float) -> float:
    return min(1.0, max(-1.0, similarity))
