"""The calls on groups and steps: checks what the messages say, and asks their cores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from kvfabric.errors import Denied, FabricError
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.sequences import groups
from kvfabric_nodes.sequences.groups import Elsewhere, Group, Groups
from kvfabric_nodes.sequences.steps import Steps
from kvfabric_nodes.serving.handler import Call, Handler, checked_keys
from kvfabric_nodes.store.promises import Session

log = structlog.get_logger(__name__)

DEFAULT_LIFE_S = 600.0  # of a group
FETCH_S = 2.0  # how long a group that begins waits for what lies elsewhere to come here
CLOSE_S = 2.0  # for the call that ends a group at another node
FETCH_KEYS = 256  # at a time: between two times it may have ended

Places = Callable[[NamespaceId, Sequence[Key]], Awaitable[Sequence[tuple[str, ...]] | None]]
"""The nodes that hold each of these keys; None: the manager does not answer."""

FetchHome = Callable[[NamespaceId, Sequence[Key]], Awaitable[Any]]
"""Brings shards from other nodes here, as far as it can."""

CallPeer = Callable[[str, types_pb2.Endpoints, str, Any, float], Awaitable[Any]]
"""Calls another node: its name, how it is reached, the call in lower case, the request, seconds."""


class GroupCalls:
    """See the module. `places` asks the manager; None: there is none, and no other node."""

    def __init__(self, handler: Handler, groups: Groups, steps: Steps) -> None:
        self.groups = groups
        self.steps = steps
        self.places: Places | None = None
        self.fetch_home: FetchHome | None = None
        self.call_peer: CallPeer | None = None
        self._fetching: set[asyncio.Task[None]] = set()  # one per group at most
        self._closing: set[asyncio.Task[None]] = set()
        self._handler = handler
        self._core = handler.core

    def calls(self) -> Mapping[str, Call]:
        """All of them, by their names in lower case."""
        return {
            "open_group": self.open_group,
            "close_group": self.close_group,
            "report_steps": self.report_steps,
        }

    def open_group(
        self,
        session: Session,
        request: node_pb2.OpenGroupRequest,
        response: node_pb2.OpenGroupResponse,
    ) -> Coroutine[Any, Any, None] | None:
        keys = checked_keys(request.keys)
        life_s = self.groups.bounded(request.life_ms / 1000 or DEFAULT_LIFE_S)
        if request.detached and not session.between_nodes:
            raise Denied("only other nodes' groups outlive their session")
        every = range(len(keys))
        indices = every if request.detached else groups.shared(keys, request.lengths)
        namespace = NamespaceId(request.namespace_id)
        self._core.admit(session, namespace, len(keys))
        common = [keys[index] for index in indices]
        group = self.groups.open(
            session, namespace, common, life_s, self._now(), detached=request.detached
        )
        response.group = group.id
        response.shared.extend(indices)
        response.life_ms = int(life_s * 1000)
        absent = [key for key in common if key not in group.found]
        if absent and self.places is not None and not request.detached:
            return self._find_elsewhere(self.places, group, absent, response)
        self._put_places(group, {}, response)
        return None

    async def _find_elsewhere(
        self,
        places: Places,
        group: Group,
        absent: list[Key],
        response: node_pb2.OpenGroupResponse,
    ) -> None:
        found = await places(group.namespace, absent) or ()
        own = self._handler.identity.node  # the manager's word may be a little old
        elsewhere = {
            key: next((node for node in nodes if node != own), "")
            for key, nodes in zip(absent, found, strict=False)
        }
        wanted = [key for key, node in elsewhere.items() if node]
        if wanted and self.fetch_home is not None:
            fetching = asyncio.create_task(self._fetch(self.fetch_home, group, wanted))
            self._fetching.add(fetching)
            fetching.add_done_callback(self._fetched)
            await asyncio.wait([fetching], timeout=FETCH_S)  # then it goes on by itself
        self._put_places(group, elsewhere, response)

    async def _fetch(self, fetch_home: FetchHome, group: Group, keys: list[Key]) -> None:
        """As long as the group lives, which keeps what comes."""
        for start in range(0, len(keys), FETCH_KEYS):
            if group.id not in self.groups.all:
                return
            await fetch_home(group.namespace, keys[start : start + FETCH_KEYS])

    def _fetched(self, fetching: asyncio.Task[None]) -> None:
        self._fetching.discard(fetching)
        if not fetching.cancelled() and (error := fetching.exception()) is not None:
            log.error("group_not_fetched", exc_info=error)

    def _put_places(
        self, group: Group, elsewhere: Mapping[Key, str], response: node_pb2.OpenGroupResponse
    ) -> None:
        room, own = self._core.shards.room(group.namespace), self._handler.identity.node
        for key in group.keys:
            node = own if key in room else elsewhere.get(key, "")
            here = Status.OK if key in room else Status.EXISTS
            response.statuses.append(here if node else Status.MISS)
            response.nodes.append(node)

    def close_group(
        self,
        session: Session,
        request: node_pb2.CloseGroupRequest,
        response: node_pb2.CloseGroupResponse,
    ) -> None:
        shards, size_bytes = self.groups.close(session, request.group, self._now())
        response.shards = shards
        response.size_bytes = size_bytes

    def tick(self, now_s: float) -> None:
        """Ends the groups whose life is over, and tells other nodes of those that ended."""
        self.groups.tick(now_s)
        ended, self.groups.to_close = self.groups.to_close, []
        for place in ended:
            closing = asyncio.get_running_loop().create_task(self._close_elsewhere(place))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _close_elsewhere(self, place: Elsewhere) -> None:
        """Told once: the group there ends by its life, too."""
        endpoints = types_pb2.Endpoints.FromString(place.endpoints)
        request = node_pb2.CloseGroupRequest(group=place.group)
        if self.call_peer is not None:
            with contextlib.suppress(FabricError):
                await self.call_peer(place.node, endpoints, "close_group", request, CLOSE_S)

    def report_steps(
        self,
        session: Session,
        request: node_pb2.ReportStepsRequest,
        response: node_pb2.ReportStepsResponse,
    ) -> None:
        self.steps.add(request)

    def _now(self) -> float:
        return self._handler.clock.now()
