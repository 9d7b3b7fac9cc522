"""API keys: who asks, what they may do, and in which galleries.

The keys file is JSON, ``{"keys": [{"name", "sha256", "role", "galleries"}]}``. It holds the SHA-256 of each key
and never a key; a key is 256 random bits, so that a plain hash cannot be searched.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import threading
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.domain import Template
from service.errors import FaceNotFound, Forbidden, NotReady, Unauthorized

RoleName = Literal["read", "write", "admin"]
ALL_GALLERIES = "*"

_log = structlog.get_logger("vultus.auth")


class Role(IntEnum):
    """What a key may do; each role may do what the ones before it may.

    ``read`` asks, ``write`` enrols, changes and deletes subjects, ``admin`` makes and deletes galleries.
    """

    read = 1
    write = 2
    admin = 3


class Key(BaseModel):
    """One line of the keys file. ``galleries``: names, or ``*`` for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: RoleName
    galleries: tuple[str, ...] = Field(min_length=1)


class KeysFile(BaseModel):
    """The keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @classmethod
    def read(cls, path: Path) -> KeysFile:
        """Raises ``OSError``, and ``ValueError`` where the file is not of the documented form."""
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """Replace the file in one step, readable by its owner alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Principal(BaseModel):
    """Who asks."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: Role
    galleries: tuple[str, ...]

    def sees(self, gallery: str) -> bool:
        """Whether the gallery is one of this key's."""
        return ALL_GALLERIES in self.galleries or gallery in self.galleries

    def require(self, gallery: str) -> None:
        """Raise ``Forbidden`` for another tenant's gallery, whether or not it exists."""
        if not self.sees(gallery):
            raise Forbidden(f"This key does not open the gallery {gallery!r}.")

    def require_face(self, template: Template) -> None:
        """Raise ``FaceNotFound`` for another tenant's face: that it exists is theirs to know."""
        if not self.sees(template.gallery):
            raise FaceNotFound(f"There is no enrolled face {template.face_id!r}.")


ANYBODY = Principal(name="anybody", role=Role.admin, galleries=(ALL_GALLERIES,))
"""Who asks where no keys are set; the service then listens on a loopback address alone."""


class Keyring:
    """The keys file, read again whenever it changes. Without a file everybody may do everything."""

    def __init__(self, path: Path | None) -> None:
        """Raises ``OSError`` or ``ValueError`` if the file cannot be read now."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}
        if path is not None:
            self._refresh(path)

    def __len__(self) -> int:
        return len(self._keys)

    def principal(self, key: str | None) -> Principal:
        """Return who holds this key. Raises ``Unauthorized``, and ``NotReady`` while the file is unreadable."""
        if self._path is None:
            return ANYBODY
        try:
            self._refresh(self._path)
        except (OSError, ValueError) as exc:
            _log.error("keys file unreadable", error=type(exc).__name__)
            raise NotReady("The service cannot read its keys.") from exc
        found = self._keys.get(digest(key)) if key else None
        if found is None:
            raise Unauthorized(
                "Send a valid key as `Authorization: Bearer KEY`.", headers={"www-authenticate": "Bearer"}
            )
        return Principal(name=found.name, role=Role[found.role], galleries=found.galleries)

    def _refresh(self, path: Path) -> None:
        with self._lock:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._keys = {key.sha256: key for key in KeysFile.read(path).keys}
                self._stamp = stamp


def digest(key: str) -> str:
    """Return the hexadecimal SHA-256 under which a key is kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(path: Path, name: str, role: RoleName, galleries: tuple[str, ...]) -> str:
    """Add a key to the file, making the file if need be, and return the key, which is kept nowhere.

    Raises ``ValueError`` if the name is taken or something is not of the documented form.
    """
    held = KeysFile.read(path).keys if path.exists() else ()
    if any(key.name == name for key in held):
        raise ValueError(f"there is a key named {name!r} already")
    secret = "vultus_" + secrets.token_urlsafe(32)
    try:
        key = Key(name=name, sha256=digest(secret), role=role, galleries=galleries)
    except ValidationError as exc:
        raise ValueError(str(exc)) from exc
    KeysFile(keys=(*held, key)).write(path)
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises ``ValueError`` if there is none of that name."""
    held = KeysFile.read(path).keys
    kept = tuple(key for key in held if key.name != name)
    if len(kept) == len(held):
        raise ValueError(f"there is no key named {name!r}")
    KeysFile(keys=kept).write(path)


def _presented(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _at_least(role: Role) -> Any:
    # Not in a thread: it is a look-up and at most the reading of a small file.
    async def check(request: Request) -> Principal:
        keyring: Keyring = request.app.state.parts.keyring
        principal = keyring.principal(_presented(request))
        if principal.role < role:
            raise Forbidden(f"This needs a key of role {role.name}; this one's is {principal.role.name}.")
        return principal

    return Depends(check)


Reader = Annotated[Principal, _at_least(Role.read)]
Writer = Annotated[Principal, _at_least(Role.write)]
Admin = Annotated[Principal, _at_least(Role.admin)]
