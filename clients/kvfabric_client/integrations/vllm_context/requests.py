"""The scheduler's side: what the fabric has of a request's prefix, and whose rows a step has."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfabric.errors import FabricError
from kvfabric.types import Format
from kvfabric_client.integrations.vllm_context.messages import NO_BLOCK, Losses, Rows, StepRows
from kvfabric_client.integrations.vllm_context.rooms import Rooms
from kvfabric_client.sequence import Sequence

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger("vllm.kvfabric")

LOSSES = 3  # of its KV after which a request is computed again; then it ends with an error


@dataclass(slots=True)
class _Tracked:
    request: Request
    salt: bytes
    prefix: Sequence | None = None  # keeps what was matched until the request is over
    stored: int = 0  # tokens of its prefix whose KV lay in the fabric when it was looked up
    begun: bool = False  # the worker has its sequence
    crowded: bool = False  # it waits for room, until another has ended or no other runs
    losses: int = 0
    lost: int | None = None  # the first token of which the worker could not read the KV
    blocks: list[int] = field(default_factory=list)


class Requests:
    """Called by the scheduler's thread only."""

    def __init__(self, rooms: Rooms, form: Format) -> None:
        self._rooms = rooms
        self._form = form
        self._tracked: dict[str, _Tracked] = {}
        self._weights = b""  # in each salt; changes with them

    def match(self, request: Request, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens`, in whole blocks, that need not be computed; leaves one.

        Of a request that was preempted: what there is of what it has had computed. None: it waits
        for room.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = _Tracked(request, self._weights + _salt_of(request))
            self._tracked[request.request_id] = tracked
            tracked.stored = self._open(tracked)
        elif tracked.crowded and self._others_run(tracked):
            return None
        elif tracked.begun:
            tracked.begun = tracked.crowded = False
            tracked.stored = self._open(tracked)
        block = self._form.block_tokens
        usable = min(tracked.stored, int(request.num_tokens) - 1) // block * block
        return max(0, usable - computed_tokens)

    def _open(self, tracked: _Tracked) -> int:
        """How much of its tokens the fabric holds; it stays while the request lives."""
        ids, before = list(tracked.request.all_token_ids), tracked.prefix
        try:
            tracked.prefix = self._rooms.room(tracked.salt).sequence(self._form, tokens=ids)
        except FabricError as error:
            log.warning("kvfabric: a prefix was not looked up: %s", error)
            self._rooms.close()  # and opened again for the next one
            return 0
        if before is not None:
            before.close()
        lost, tracked.lost = tracked.lost, None
        return tracked.prefix.length if lost is None else min(lost, tracked.prefix.length)

    def step(self, output: SchedulerOutput) -> StepRows:
        """The rows of the step that is about to be computed."""
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            self._tracked[new.req_id].blocks = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for request_id, blocks, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            starts[request_id] = start
            if request_id in cached.resumed_req_ids:
                self._tracked[request_id].blocks = list(blocks[0])
            elif blocks is not None:
                self._tracked[request_id].blocks += blocks[0]
        return StepRows(
            dict(
                self._rows(request_id, starts[request_id], tokens)
                for request_id, tokens in output.num_scheduled_tokens.items()
            )
        )

    def _rows(self, request_id: str, start: int, tokens: int) -> tuple[int, Rows]:
        tracked = self._tracked[request_id]
        ids, end = tracked.request.all_token_ids, start + tokens
        before = None if tracked.begun else list(ids[:start])
        tracked.begun = True
        block = self._form.block_tokens
        held = tracked.blocks[(start - 1) // block] if start else NO_BLOCK
        rows = Rows(request_id, tracked.salt, start, list(ids[start:end]), before, held)
        return tracked.blocks[(end - 1) // block], rows

    def may_begin_again(self, request_id: str) -> bool:
        """Whether a request that was given up may be computed again."""
        return self._tracked[request_id].losses < LOSSES

    def lose(self, losses: Losses) -> None:
        """Notes what the worker says after `may_begin_again`. The first token that is lost counts
        even where a node is still believed to have it: one that died is missed a little later."""
        for request_id in losses.first.keys() & self._tracked.keys():
            tracked = self._tracked[request_id]
            tracked.lost = losses.first[request_id]
            tracked.crowded = request_id in losses.crowded and self._others_run(tracked)
            tracked.losses += not tracked.crowded

    def _others_run(self, tracked: _Tracked) -> bool:
        others = (other for other in self._tracked.values() if other is not tracked)
        return any(other.begun and not other.crowded for other in others)

    def forget(self) -> None:
        """The weights have changed in place: what is computed from now on is not shared with what
        was computed before, nor with other engines."""
        self._weights = secrets.token_bytes(16)
        for tracked in self._tracked.values():
            tracked.salt, tracked.stored = self._weights + _salt_of(tracked.request), 0

    def finished(self, request: Request) -> None:
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and tracked.prefix is not None:
            tracked.prefix.close()
        for other in self._tracked.values():
            other.crowded = False

    def close(self) -> None:
        for tracked in self._tracked.values():
            if tracked.prefix is not None:
                tracked.prefix.close()
        self._tracked.clear()
        self._rooms.close()


def _salt_of(request: Request) -> bytes:
    """What beside token ids and model its KV depends on; where that cannot be said, a number that
    no other request has, so that its KV is not shared."""
    if request.lora_request or request.mm_features or request.prompt_embeds is not None:
        return secrets.token_bytes(16)
    return request.cache_salt.encode() if request.cache_salt else b""
