"""The manager's settings: arguments, else the environment (KVFABRIC_MANAGER_...), else these."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvfabric.settings import make_runtime_dir, runtime_dir

STORE_FILE = "manager.db"


class ManagerSettings(BaseSettings):
    """Refused values raise pydantic's ValidationError, which names the field."""

    model_config = SettingsConfigDict(env_prefix="KVFABRIC_MANAGER_", extra="forbid", frozen=True)

    listen: str = Field(default="127.0.0.1:7400", pattern=r"^.+:\d{1,5}$")
    """host:port of ControlService; port 0 takes a free one."""

    store: str = ""
    """The MetadataStore's address; empty: a SQLite file in the runtime directory."""

    runtime_dir: str = ""
    """Empty: the user's, see kvfabric.settings.runtime_dir."""

    heartbeat_ms: int = Field(default=500, ge=10, le=60_000)
    """What nodes are told to keep between two heartbeats."""

    silence_ms: int = Field(default=5_000, ge=50, le=600_000)
    """A node that is silent for longer is lost."""

    metrics: str = ""
    """host:port of Prometheus metrics; empty: not served."""

    @model_validator(mode="after")
    def _silence_spans_heartbeats(self) -> Self:
        if self.silence_ms < 2 * self.heartbeat_ms:
            raise ValueError(
                f"silence_ms {self.silence_ms} must be at least twice heartbeat_ms "
                f"{self.heartbeat_ms}, or nodes are lost between two heartbeats"
            )
        return self

    def store_address(self) -> str:
        """`store`, or the default file, whose directory is made."""
        if self.store:
            return self.store
        folder = Path(self.runtime_dir) if self.runtime_dir else runtime_dir()
        return f"sqlite:{make_runtime_dir(folder) / STORE_FILE}"
