"""What the scheduler's side tells the worker's in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one request that a step computes."""

    request_id: str
    salt: bytes  # of its namespace
    start: int  # position of the first
    token_ids: list[int]
    before: list[int]  # ids of the tokens before, where the request begins or comes back; else none


@dataclass
class StepRows(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not typed for us
    """By the engine's block that holds a request's last token of the step: nobody else has it."""

    by_block: dict[int, Rows] = field(default_factory=dict)
