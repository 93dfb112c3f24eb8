"""What the scheduler's side of the connector tells the workers' side in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run of one request's blocks: the first's place in the request, hashes, block ids."""

    first: int
    links: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    parent: bytes = b""  # the hash before the first; empty at a request's start


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to fill before the request is computed further."""

    request_id: str
    blocks: Blocks
    at: str = ""  # the address of the node that is asked first; empty: as always


@dataclass
class StepJobs(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not typed for us
    """Loads to begin, and blocks that are full once this step has been computed."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Blocks] = field(default_factory=list)
    idle: bool = False  # nothing is computed in this step
    flush: bool = False  # a request is about to be handed off: what was saved must be stored
