"""The scheduler's side of the vLLM connector: what can be loaded, what is to be saved.

Decides only; bytes are moved by the workers' side.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfabric.errors import Refused
from kvfabric.keys import namespace_id
from kvfabric.types import Key
from kvfabric_client.handoff import HandOff
from kvfabric_client.integrations._vllm_layout import Shape
from kvfabric_client.integrations._vllm_link import Door, Link, log
from kvfabric_client.integrations._vllm_messages import Blocks, Load, StepJobs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvfabric_client import Room

MATCH_TIMEOUT_S = 0.25  # the engine stands still meanwhile
START_TIMEOUT_S = 2.0
PARAMETER = "kvfabric"  # in kv_transfer_params: what `Room.hand_off` answered
MATCH_FRESH_S = 0.5  # a request that waits for memory is asked about in every step


@dataclass(slots=True)
class _Tracked:
    """One living request."""

    request: Request
    keys: list[list[Key]]  # of each part, of its blocks so far
    held: int = 0  # blocks that the fabric held when asked last
    asked_s: float = float("-inf")
    local: int = 0  # blocks that the engine itself held when asked last
    next_save: int = 0
    loading: frozenset[int] = field(default_factory=frozenset)  # block ids
    load_failed: bool = False
    offered: int | None = None  # blocks that were handed off to this request; None: not looked
    at: str = ""  # the address of the node that has them


class SchedulerSide:
    """Answers vLLM's scheduler about one engine; called by its thread only."""

    def __init__(self, shape: Shape, door: Door, *, loads: bool, saves: bool) -> None:
        self._shape = shape
        self._room = namespace_id(door.namespace)
        self._link = Link(door, "vLLM's scheduler", MATCH_TIMEOUT_S)
        self._loads = loads
        self._saves = saves
        self._first_heads = shape.first_heads()
        self._tracked: dict[str, _Tracked] = {}
        self._jobs = StepJobs()
        # Before there are requests it may take longer; then the first finds it open.
        self._link.call(lambda room: room.id, START_TIMEOUT_S)

    def match(self, request: Request, computed_tokens: int) -> int:
        """Tokens beyond `computed_tokens` that every rank could load; leaves one to compute."""
        tracked = self._track(request)
        tokens = self._shape.block_tokens
        tracked.local = computed_tokens // tokens
        if tracked.load_failed or not _shares(request):
            return 0
        limit = (int(request.num_tokens) - 1) // tokens
        if self._look_at_offer(tracked) < limit:
            self._ask(tracked)
        usable = min(tracked.held, limit)
        if not self._loads or request.skip_reading_prefix_cache:
            return 0
        return max(0, usable - tracked.local) * tokens

    def allocated(self, request: Request, block_ids: list[int], external_tokens: int) -> None:
        """The request has its blocks: plan the load of what `match` promised."""
        tracked = self._track(request)
        if not external_tokens:
            return
        first = tracked.local
        last = first + external_tokens // self._shape.block_tokens
        blocks = self._blocks(tracked, first, last, block_ids)
        tracked.loading = frozenset(blocks.block_ids)
        at = tracked.at if first < (tracked.offered or 0) else ""
        self._jobs.loads.append(Load(request.request_id, blocks, at))

    def step(self, output: SchedulerOutput) -> StepJobs:
        """The jobs of the step that is about to be computed."""
        jobs, self._jobs = self._jobs, StepJobs()
        jobs.idle = not output.total_num_scheduled_tokens
        if self._saves and output.kv_connector_block_state is not None:
            for request_id, tokens in output.num_scheduled_tokens.items():
                tracked = self._tracked.get(request_id)
                block_ids = output.kv_connector_block_state.get_block_ids(request_id)
                if tracked and block_ids and _shares(tracked.request):
                    self._plan_save(jobs, tracked, tokens, block_ids[0])
        return jobs

    def loaded(self, finished: Iterable[str], failed_blocks: set[int]) -> None:
        """What the workers report: a request whose load failed is computed, not asked again."""
        if failed_blocks:
            for tracked in self._tracked.values():
                if not tracked.loading.isdisjoint(failed_blocks):
                    tracked.load_failed = True
                    tracked.next_save = 0  # what was lost is saved anew
        for request_id in finished:
            if request_id in self._tracked:
                self._tracked[request_id].loading = frozenset()

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Forget the request. The parameters with which another engine goes on, if it is wanted.

        They name only what this node has sealed; the step that computed the prompt's last block
        has waited for that.
        """
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None or not _is_handed_off(request) or not _ended_well(request):
            return None
        chains = [keys[: tracked.next_save] for keys in self._keys(tracked)]
        offers = self._link.call(lambda room: [room.hand_off(keys) for keys in chains])
        if not offers:
            return None
        blocks = min(len(offer["keys"]) for offer in offers)
        offer = offers[0] | {"keys": offers[0]["keys"][:blocks]}
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_num_tokens": blocks * self._shape.block_tokens,
            PARAMETER: offer,
        }

    def close(self) -> None:
        self._link.close()

    def _track(self, request: Request) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = _Tracked(request, [[] for _ in self._first_heads])
            self._tracked[request.request_id] = tracked
        return tracked

    def _ask(self, tracked: _Tracked) -> None:
        """Ask the fabric for the request's longest prefix, unless that was done just now."""
        now_s = time.monotonic()
        if now_s - tracked.asked_s < MATCH_FRESH_S or not tracked.request.block_hashes:
            return
        chains = self._keys(tracked)
        held = self._link.call(lambda room: _held_by_all(room, chains))
        tracked.asked_s = time.monotonic()
        tracked.held = max(held or 0, tracked.offered or 0)
        tracked.next_save = max(tracked.next_save, tracked.held)

    def _look_at_offer(self, tracked: _Tracked) -> int:
        """How many blocks of this request another engine has handed off; looks once.

        The node must be one that is known here: a request could name anything.
        """
        if tracked.offered is not None:
            return tracked.offered
        tracked.offered = 0
        given = (tracked.request.kv_transfer_params or {}).get(PARAMETER)
        if given is None:
            return 0
        try:
            offer = HandOff.of(given, self._room)
        except Refused as error:
            log.warning("kvfabric: a hand-off is ignored: %s", error)
            return 0
        tracked.at = self._link.call(lambda room: room.address_of(offer.node)) or ""
        if tracked.at:
            own = self._keys(tracked)[0]
            pairs = zip(own, offer.keys, strict=False)
            tracked.offered = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
            tracked.held = max(tracked.held, tracked.offered)
            tracked.next_save = max(tracked.next_save, tracked.held)
        return tracked.offered

    def _keys(self, tracked: _Tracked) -> list[list[Key]]:
        hashes = tracked.request.block_hashes
        for first_head, keys in zip(self._first_heads, tracked.keys, strict=True):
            links = [bytes(link) for link in hashes[len(keys) :]]
            keys += self._shape.keys(self._room, first_head, len(keys), links)
        return tracked.keys

    def _plan_save(
        self, jobs: StepJobs, tracked: _Tracked, tokens: int, block_ids: list[int]
    ) -> None:
        request = tracked.request
        computed = request.num_computed_tokens + tokens
        # A block whose last token is not known yet has no hash and waits for the next step.
        full = min(computed // self._shape.block_tokens, len(request.block_hashes))
        prompt = request.num_prompt_tokens
        if _is_handed_off(request) and computed >= prompt:
            jobs.flush |= request.num_computed_tokens < prompt or full > tracked.next_save
        if full > tracked.next_save:
            jobs.saves.append(self._blocks(tracked, tracked.next_save, full, block_ids))
            tracked.next_save = full

    @staticmethod
    def _blocks(tracked: _Tracked, first: int, last: int, block_ids: list[int]) -> Blocks:
        hashes = tracked.request.block_hashes
        return Blocks(
            first,
            tuple(bytes(link) for link in hashes[first:last]),
            tuple(block_ids[first:last]),
            bytes(hashes[first - 1]) if first else b"",
        )


def _held_by_all(room: Room, chains: list[list[Key]]) -> int:
    """Blocks of the prefix of which the fabric holds every rank's part."""
    held = len(chains[0])
    for keys in chains:
        if held:
            held = min(held, room.match(keys[:held], timeout_s=MATCH_TIMEOUT_S).matched)
    return held


def _is_handed_off(request: Request) -> bool:
    """Whether another engine is to go on where this one ends."""
    return bool((request.kv_transfer_params or {}).get("do_remote_decode"))


def _ended_well(request: Request) -> bool:
    from vllm.v1.request import RequestStatus

    return request.status in (
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_STOPPED,
    )


def _shares(request: Request) -> bool:
    """Whether a request's block hashes say all that its KV depends on, once and for all.

    An adapter's weights are not in them, only its name; a resumable request replaces tokens.
    """
    return request.lora_request is None and not request.resumable
