"""What an operator can set of a node: environment KVFABRIC_NODE_*, or the command line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvfabric.settings import Size, runtime_dir

MIN_SEGMENT_BYTES = 64 << 10
MAX_SEGMENT_BYTES = 1 << 30
SEGMENTS = 16  # at least so many, so that several shard sizes have a slab each
PAGE_BYTES = 4096


class NodeSettings(BaseSettings):
    """Addresses are host:port; port 0 takes a free one, an empty address offers nothing."""

    model_config = SettingsConfigDict(env_prefix="KVFABRIC_NODE_", extra="forbid")

    node: str = Field(default_factory=socket.gethostname, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    memory: Size = 1 << 30
    segment: Size = 0  # 0: a sixteenth of the memory, at most 1 GiB
    runtime_dir: Path = Field(default_factory=runtime_dir)
    manager: str = ""
    tcp: str = "127.0.0.1:0"
    grpc: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    token: str = Field(default="", validation_alias="KVFABRIC_TOKEN")
    labels: dict[str, str] = Field(default_factory=dict)
    lend: Size | None = None  # lent to other nodes at most; default: half the memory
    loan_s: float = Field(default=30.0, gt=0)  # a loan that is not renewed for so long is void
    recall_s: float = Field(default=10.0, gt=0)  # what debtors have to make room elsewhere
    keeper: bool = True  # a process that keeps the memory over a crash of this one
    keep_s: float = Field(default=600.0, gt=0)  # how long it waits for the next start
    keep_on_stop: bool = False  # it waits after an orderly stop, too
    # Of kernels; 0: attention is not computed here.
    attention_threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=0)
    parallel_pulls: int = Field(default=4, ge=2, le=16)  # transfers from other nodes at once

    @property
    def unix_path(self) -> Path:
        return self.runtime_dir / f"{self.node}.sock"

    @property
    def keeper_path(self) -> Path:
        """The keeper's socket; no `.sock`, by which clients find nodes."""
        return self.runtime_dir / f"{self.node}.keeper"

    @property
    def lend_bytes(self) -> int:
        """What other nodes may borrow in all."""
        return self.memory // 2 if self.lend is None else self.lend

    @property
    def segment_bytes(self) -> int:
        """The largest shard that the node can hold."""
        return self.segment or min(
            MAX_SEGMENT_BYTES, self.memory // SEGMENTS // PAGE_BYTES * PAGE_BYTES
        )

    @model_validator(mode="after")
    def _whole_segments(self) -> NodeSettings:
        size = self.segment_bytes
        if size % PAGE_BYTES or not MIN_SEGMENT_BYTES <= size <= self.memory:
            raise ValueError(
                f"segments of {size} bytes in a memory of {self.memory}: a segment must be a "
                f"multiple of {PAGE_BYTES} from {MIN_SEGMENT_BYTES} up to the memory"
            )
        return self
