"""What the scheduler's side and the worker's tell each other in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one request that a step computes."""

    request_id: str
    salt: bytes  # of its namespace
    start: int  # position of the first
    token_ids: list[int]
    before: list[int] | None  # ids of the tokens before, where it begins or begins again
    held: int  # the engine's block of the token before, or NO_BLOCK


@dataclass
class StepRows(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not typed for us
    """By the engine's block that holds a request's last token of the step: nobody else has it."""

    by_block: dict[int, Rows] = field(default_factory=dict)


@dataclass
class Losses(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Requests that were given up in this step, each with the first token whose KV is nowhere, as
    far as that is known; and those of them for which nodes had no room."""

    first: dict[str, int | None] = field(default_factory=dict)
    crowded: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return Losses(self.first | other.first, self.crowded | other.crowded)
