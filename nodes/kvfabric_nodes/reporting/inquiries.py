"""What a node asks its manager: where keys lie, who could lend, how another node is reached.

While the manager is away the answers are empty at once: nobody waits for a dead one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc, node_pb2, types_pb2
from kvfabric.types import Key, NamespaceId

log = structlog.get_logger(__name__)

LOCATE_TIMEOUT_S = 0.25  # a match waits for it: better a miss than a late answer
CALL_TIMEOUT_S = 5.0
MAX_ENDPOINTS = 4096  # of other nodes, remembered

Runs = list[node_pb2.MatchResponse.Run]


class Inquiries:
    """See the module. The heartbeat says by `connected` whether the manager answers."""

    def __init__(self, stub: control_pb2_grpc.ControlServiceStub, node: str) -> None:
        self.connected = False
        self._stub: Any = stub
        self._node = node
        self._endpoints: dict[str, types_pb2.Endpoints] = {}

    async def locate(self, namespace: NamespaceId, keys: Sequence[Key]) -> Runs:
        """Where the first of these keys lie, up to the first that no node holds."""
        answer = await self._locate(namespace, keys, LOCATE_TIMEOUT_S, prefix=True)
        runs: Runs = []
        if answer is None:
            return runs
        for index, places in itertools.groupby(answer.place):
            if index >= len(answer.places):
                break
            place = answer.places[index]
            count = sum(1 for _ in places)
            runs.append(
                node_pb2.MatchResponse.Run(count=count, node=place.nodes[0], tier=place.tiers[0])
            )
        return runs

    async def places(
        self, namespace: NamespaceId, keys: Sequence[Key]
    ) -> list[tuple[str, ...]] | None:
        """The nodes that hold each key, best first; None: the manager does not answer."""
        answer = await self._locate(namespace, keys, CALL_TIMEOUT_S, prefix=False)
        if answer is None:
            return None
        nodes = [tuple(place.nodes) for place in answer.places]
        return [nodes[index] if index < len(nodes) else () for index in answer.place]

    async def replicas(
        self, namespace: NamespaceId, keys: Sequence[Key]
    ) -> list[dict[str, types_pb2.Endpoints]] | None:
        """The same for other nodes, with how they are reached, as far as that is known."""
        places = await self.places(namespace, keys)
        if places is None:
            return None
        names = sorted({name for place in places for name in place if name != self._node})
        reached = {name: await self.endpoints(name) for name in names}
        known = {name: found for name, found in reached.items() if found is not None}
        return [{name: known[name] for name in place if name in known} for place in places]

    async def borrow(
        self, size_bytes: int, exclude: Sequence[str], incarnation: int
    ) -> control_pb2.BorrowResponse | None:
        """Who could lend so much; None: the manager does not answer."""
        request = control_pb2.BorrowRequest(
            node=self._node, incarnation=incarnation, size_bytes=size_bytes, exclude=exclude
        )
        answer: control_pb2.BorrowResponse | None = await self._ask("Borrow", request)
        return answer

    async def find_state(self, name: tuple[NamespaceId, bytes], make: bool) -> str | None:
        """The node that has a state, empty for none; None: the manager does not know, or does not
        answer. `make`: it is about to be made here, where there is none."""
        request = control_pb2.FindStateRequest(
            namespace_id=name[0], name=name[1], node=self._node, create=make
        )
        answer: control_pb2.FindStateResponse | None = await self._ask("FindState", request)
        return None if answer is None or answer.unsure else answer.node

    async def endpoints(self, node: str) -> types_pb2.Endpoints | None:
        """How a node is reached, as the manager said last; None: it knows no such node."""
        if node not in self._endpoints:
            request = control_pb2.ListNodesRequest(nodes=[node], without_stats=True)
            answer = await self._ask("ListNodes", request)
            if answer is not None:
                # An older manager tells of all nodes.
                found = {n.node: n.endpoints for n in answer.nodes if n.alive and n.node == node}
                self._endpoints |= found
            while len(self._endpoints) > MAX_ENDPOINTS:
                del self._endpoints[next(iter(self._endpoints))]
        return self._endpoints.get(node)

    def forget(self, node: str) -> None:
        """What is known of how to reach this node does not help any more."""
        self._endpoints.pop(node, None)

    async def _locate(
        self, namespace: NamespaceId, keys: Sequence[Key], timeout_s: float, *, prefix: bool
    ) -> control_pb2.LocateResponse | None:
        request = control_pb2.LocateRequest(
            namespace_id=namespace, keys=keys, prefix=prefix, node=self._node
        )
        answer: control_pb2.LocateResponse | None = await self._ask("Locate", request, timeout_s)
        return answer

    async def _ask(self, name: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if not self.connected:
            return None
        try:
            return await getattr(self._stub, name)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            log.warning("inquiry_failed", call=name, why=error.details())
            self.connected = False  # not asked again before it answers a heartbeat
            return None
