"""Every setting of the service. Only ``app.py`` and ``cli.py`` read it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

BUNDLED_MODELS = Path(__file__).resolve().parent.parent / "models"


class Settings(BaseSettings):
    """Read from the environment, prefix ``VULTUS_``; without any, it all runs on one machine."""

    model_config = SettingsConfigDict(env_prefix="VULTUS_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on. Any but a loopback address needs keys.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on.")
    data_dir: Path = Field(
        Path("data"), description="Folder of the database and of the index's files. One process at a time owns it."
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the record. Default: SQLite in the data folder."
    )
    gallery_url: Literal["faiss:"] = Field(
        "faiss:", description="The index engine. `faiss:` searches in this process's memory."
    )
    models_dir: Path = Field(BUNDLED_MODELS, description="Folder that holds a folder for each model.")
    model: str = Field("dlib-resnet", description="The embedder: a folder name in the models folder.")
    detector: str = Field("centerface", description="The detector: a folder name in the models folder.")
    fpr: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Default false-positive rate (FPIR) of `/identify` and `/search-unknown`.",
    )
    verify_fpr: float = Field(0.001, gt=0, lt=1, description="Default false-positive rate (FMR) of `/verify`.")
    conflict_fpr: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="False-positive rate (FPIR) at which a photo in `/enroll` counts as another subject's.",
    )
    max_image_bytes: ByteSize = Field(ByteSize(10 * 2**20), ge=1, description="Largest photo, bytes as sent.")
    max_image_pixels: int = Field(40_000_000, ge=1, description="Largest photo, width × height.")
    max_request_bytes: ByteSize = Field(
        ByteSize(256 * 2**20), ge=1, description="Largest request body, bytes, however many photos it holds."
    )
    max_batch: int = Field(16, ge=1, le=1024, description="Most faces that the embedder takes in one run.")
    max_queue: int = Field(
        64, ge=1, description="Most requests with photos in progress; beyond it the answer is 429 `overloaded`."
    )
    max_wait: float = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request with photos may wait for its turn; beyond it the answer is 429.",
    )
    threads: int = Field(0, ge=0, description="Photos worked on at once, each on one core; 0 is one for each core.")
    keep_crops: bool = Field(
        True,
        description="Keep a portrait of each enrolled face, so that a change of model needs no new photos.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="JSON file of hashed API keys (`vultus keys add`). Without it: no keys, loopback only.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names that requests may name, comma-separated. Default: loopback names; any with keys.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Web origins whose pages may call the API, comma-separated. Default: none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")

    @field_validator("allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @property
    def sql_url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'vultus.db').resolve()}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
