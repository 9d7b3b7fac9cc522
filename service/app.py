"""Puts the parts together. Only this module knows every one of them; only it and the command read the settings."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import structlog
from fastapi import FastAPI
from filelock import FileLock, Timeout
from prometheus_client import CollectorRegistry, Gauge
from starlette.middleware.cors import CORSMiddleware
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

from service import __version__
from service.api import problems
from service.api.auth import Keyring
from service.api.docs import install_docs
from service.api.metrics import ProbeMetrics
from service.api.middleware import AroundRequests, Metrics
from service.api.parts import Parts
from service.api.routes import router
from service.api.schemas import CalibrationPart, ModelAnswer, ModelPart
from service.api.workers import Workers
from service.calibration import Calibration
from service.gallery.faiss_gallery import FaissGallery
from service.recognizer import Recognizer, RecognizerOptions
from service.settings import Settings
from service.store.repository import Repository
from service.vision.batcher import Batcher
from service.vision.detector import FaceDetector
from service.vision.embedder import Embedder
from service.vision.manifest import DetectorManifest, EmbedderManifest

LARGE_BLOCK = 4 * 2**20
"""Bytes. A photo of 1.4 megapixels and more; what the detector works on is smaller, and quicker to use again."""

_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

_log = structlog.get_logger("vultus")


class StartError(RuntimeError):
    """The service cannot start with these settings; the message says what to change."""


def create_app(settings: Settings, parts: Parts) -> FastAPI:
    """Return the service as an ASGI application. ``parts`` come from ``open_parts`` and outlive it."""
    app = FastAPI(
        title="Vultus",
        version=__version__,
        summary="Face recognition that keeps the false-positive rate you ask for",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
    )
    app.state.parts = parts
    app.include_router(router)
    install_docs(app)
    problems.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    hosts = settings.allowed_hosts or (LOOPBACK_NAMES if settings.loopback and not len(parts.keyring) else ())
    app.add_middleware(AroundRequests, hosts=hosts, origins=settings.cors_origins, metrics=Metrics(parts.registry))
    return app


@contextmanager
def open_repository(settings: Settings) -> Iterator[Repository]:
    """Open the record for this process alone.

    Raises ``StartError`` if another process has the data folder.
    """
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(settings.data_dir / "lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise StartError(
            f"Another process uses the data folder {settings.data_dir.resolve()}; stop it first."
        ) from None
    except OSError as exc:
        raise StartError(f"The data folder {settings.data_dir.resolve()} cannot be written: {exc}") from exc
    with ExitStack() as stack:
        stack.callback(lock.release)
        repository = Repository(settings.sql_url)
        stack.callback(repository.close)
        yield repository


def load_embedder(settings: Settings, threads: int | None = None) -> Embedder:
    """Return the embedder of the settings. ``threads``: of one run; the settings' if None.

    Raises ``StartError``, and ``ModelError`` for a broken one.
    """
    return Embedder.load(_model_folder(settings, settings.model), threads or _threads(settings))


def load_models(settings: Settings, threads: int | None = None) -> tuple[FaceDetector, Embedder, Calibration]:
    """Return what an evaluation needs, which is no data. ``threads``: of one run; the settings' if None.

    Raises ``StartError``, and ``ModelError`` for a broken one.
    """
    cores = _threads(settings)
    threads = threads or cores
    folder = _model_folder(settings, settings.detector)
    detector = FaceDetector.load(folder, threads, large_looks=max(1, cores // threads))
    embedder = load_embedder(settings, threads)
    return detector, embedder, _calibration(_model_folder(settings, settings.model), embedder.manifest)


def configure_logging(level: str) -> None:
    """Log JSON lines to standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Local variables would put photos, vectors and names into the log.
            ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def open_parts(settings: Settings) -> Iterator[Parts]:
    """Open data and models, warm the models, fill the index; close all of it afterwards.

    Raises ``StartError`` for settings that must not be served, and ``ModelError`` for a broken model.
    """
    _give_memory_back()
    keyring = _load_keyring(settings)
    registry = CollectorRegistry()
    with ExitStack() as stack:
        repository = stack.enter_context(open_repository(settings))
        threads = _threads(settings)
        # Several photos at once, each on one core, get more from the cores than one after the other on all of them.
        detector, embedder, calibration = load_models(settings, threads=1)
        embedder.warm_up()
        # About half of the work on a photo is the embedder's.
        batcher = Batcher(embedder.embed, settings.max_batch, max(1, threads // 2))
        stack.callback(batcher.close)
        index = FaissGallery(embedder.dimension, folder=settings.data_dir / "index", model_id=embedder.model_id)
        stack.callback(index.close)
        recognizer = Recognizer(
            detector=detector,
            embedder=embedder,
            queue=batcher,
            calibration=calibration,
            index=index,
            repository=repository,
            options=RecognizerOptions(
                fpr=settings.fpr,
                verify_fpr=settings.verify_fpr,
                conflict_fpr=settings.conflict_fpr,
                max_image_bytes=settings.max_image_bytes,
                max_image_pixels=settings.max_image_pixels,
                keep_crops=settings.keep_crops,
            ),
        )
        registry.register(ProbeMetrics(recognizer.probe_similarities))
        # While some wait for the embedder, as many others are decoded and searched for faces.
        workers = Workers(2 * threads, settings.max_queue, settings.max_wait, 2 * settings.max_request_bytes)
        Gauge("vultus_requests_in_progress", "Requests with photos in progress.", registry=registry).set_function(
            lambda: workers.in_progress
        )
        model = _model_answer(embedder.manifest, calibration, detector.manifest)
        _log.info(
            "ready",
            model=model.model_id,
            license=model.license,
            commercial_use=model.commercial_use,
            notice=model.notice,
            trained_on=model.trained_on,
            calibrated_on=calibration.source,
            calibration_terms=calibration.terms,
        )
        yield Parts(
            recognizer=recognizer,
            workers=workers,
            keyring=keyring,
            registry=registry,
            model=model,
            embedder_alive=lambda: batcher.alive,
            max_image_bytes=settings.max_image_bytes,
            max_request_bytes=settings.max_request_bytes,
        )


def _give_memory_back() -> None:
    """Let blocks of :data:`LARGE_BLOCK` bytes and more go back to the system when they are freed.

    glibc would learn from the first large photo to keep blocks of up to 32 MiB, in one heap for each few threads, and
    photos of many sizes leave holes in all of them. Another C library has no ``mallopt``, and other habits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def _load_keyring(settings: Settings) -> Keyring:
    """Return the keys. Raises ``StartError`` if they are unreadable, or missing where others can connect."""
    try:
        keyring = Keyring(settings.api_keys_file)
    except (OSError, ValueError) as exc:
        raise StartError(f"The keys file {settings.api_keys_file} cannot be read: {exc}") from exc
    if not settings.loopback and not len(keyring):
        raise StartError(
            f"{settings.host} can be reached from other machines, and there are no API keys. "
            "Make one with `vultus keys add NAME`, or listen on 127.0.0.1."
        )
    return keyring


def _threads(settings: Settings) -> int:
    return settings.threads or len(os.sched_getaffinity(0))


def _model_folder(settings: Settings, model_id: str) -> Path:
    folder = settings.models_dir / model_id
    if Path(model_id).name != model_id or not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in settings.models_dir.glob("*/manifest.json")))
        raise StartError(f"There is no model {model_id!r} in {settings.models_dir}; there is: {known or 'none'}.")
    return folder


def _calibration(folder: Path, manifest: EmbedderManifest) -> Calibration:
    path = folder / "calibration.json"
    try:
        calibration = Calibration.load(path)
    except (OSError, ValueError) as exc:
        raise StartError(
            f"{manifest.model_id} has no usable {path.name}; make one with `vultus-train calibrate`: {exc}"
        ) from exc
    if calibration.model_sha256 != manifest.sha256:
        raise StartError(f"{path} was made for other weights; run `vultus-train calibrate` again.")
    return calibration


def _model_part(manifest: EmbedderManifest | DetectorManifest) -> ModelPart:
    return ModelPart(
        model_id=manifest.model_id,
        sha256=manifest.sha256,
        license=manifest.license.spdx,
        commercial_use=manifest.license.commercial_use,
        notice=manifest.license.notice,
        author=manifest.provenance.author,
        trained_on=manifest.provenance.trained_on,
    )


def _model_answer(embedder: EmbedderManifest, calibration: Calibration, detector: DetectorManifest) -> ModelAnswer:
    return ModelAnswer(
        **_model_part(embedder).model_dump(),
        dimension=embedder.dimension,
        crop_size=embedder.input.size,
        flip=embedder.flip,
        calibration=CalibrationPart(
            source=calibration.source,
            terms=calibration.terms,
            identities=calibration.identities,
            images=calibration.images,
            impostor_pairs=calibration.impostor_pairs,
            supported_fmr=calibration.supported_fmr,
            smallest_fmr=calibration.smallest_fmr,
            smallest_fpir=calibration.smallest_fpir,
        ),
        detector=_model_part(detector),
    )
