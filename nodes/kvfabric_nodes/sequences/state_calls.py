"""The calls on states: checks what the messages say, and asks their core.

A state is one over the fabric. A node that does not have it asks the manager who has, and
sends its client there; without a manager there is no other node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from kvfabric.errors import Refused, Retry
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.handovers import Handovers
from kvfabric_nodes.sequences.states import Head, Name
from kvfabric_nodes.serving.handler import Call, Handler, checked_keys
from kvfabric_nodes.store.promises import Session

TOLD_S = 10.0  # after a head has left, the manager surely knows

Find = Callable[[Name, bool], Awaitable[str | None]]
"""The node that has a state, empty for none; None: the manager does not say. With True the state
is about to be made here, where there is none."""


class StateCalls:
    """See the module. `find` None: there is no manager."""

    def __init__(self, handler: Handler, handovers: Handovers) -> None:
        self.states = handovers.states
        self._handovers = handovers
        self.find: Find | None = None
        self._handler = handler

    def calls(self) -> Mapping[str, Call]:
        """All of them, by their names in lower case."""
        return {"swap_state": self.swap_state, "read_state": self.read_state}

    def swap_state(
        self,
        session: Session,
        request: node_pb2.SwapStateRequest,
        response: node_pb2.SwapStateResponse,
    ) -> Coroutine[Any, Any, None] | None:
        name = checked_name(request)
        if request.key:
            checked_keys([request.key])
        if self.find is None or self.states.read(session, *name).version:
            self._swap(session, request, response)
            return None
        return self._swap_where_it_is(self.find, name, session, request, response)

    async def _swap_where_it_is(
        self,
        find: Find,
        name: Name,
        session: Session,
        request: node_pb2.SwapStateRequest,
        response: node_pb2.SwapStateResponse,
    ) -> None:
        make = bool(request.key and not request.expected_version)
        response.node = await self._elsewhere(find, name, make=make)
        if not response.node:
            self._swap(session, request, response)

    def _swap(
        self,
        session: Session,
        request: node_pb2.SwapStateRequest,
        response: node_pb2.SwapStateResponse,
    ) -> None:
        response.swapped, head = self.states.swap(
            session,
            NamespaceId(request.namespace_id),
            request.name,
            request.expected_version,
            Key(request.key),
            self._handler.clock.now(),
        )
        _put_head(response, head)

    def read_state(
        self,
        session: Session,
        request: node_pb2.ReadStateRequest,
        response: node_pb2.ReadStateResponse,
    ) -> Coroutine[Any, Any, None] | None:
        name = checked_name(request)
        if session.between_nodes:
            self._tell_where(name, response)
            return None
        head = self.states.read(session, *name)
        _put_head(response, head)
        if head.version or self.find is None:
            return None
        return self._read_where_it_is(self.find, name, session, response)

    def _tell_where(self, name: Name, response: node_pb2.ReadStateResponse) -> None:
        """What a node that has adopted it wants to know."""
        response.incarnation = self._handler.metrics.incarnation
        if offer := self._handovers.frozen.get(name):
            response.offer = offer.number
            left_s = offer.until_s - self._handler.clock.now()
            response.frozen_ms = max(1, int(left_s * 1000))
        elif left := self._handovers.left.get(name):
            response.offer, response.node = left.offer, left.node

    async def _read_where_it_is(
        self, find: Find, name: Name, session: Session, response: node_pb2.ReadStateResponse
    ) -> None:
        response.node = await self._elsewhere(find, name, make=False)
        if not response.node:  # it may have come meanwhile
            _put_head(response, self.states.read(session, *name))

    async def _elsewhere(self, find: Find, name: Name, *, make: bool) -> str:
        """The other node that has it; empty: none has. Retry where nobody knows."""
        node = await find(name, make)
        own = self._handler.identity.node
        left = self._handovers.left.get(name)
        if left is not None:
            fresh = self._handler.clock.now() < left.at_s + TOLD_S
            if node is None or (node in ("", own) and fresh):
                return left.node
        if node is None:
            raise Retry(
                f"state {name[1].hex()[:16]} is not on this node, and the manager does not "
                "say yet whether it is on another; come again in a moment"
            )
        return "" if node == own else node


def checked_name(
    request: node_pb2.SwapStateRequest | node_pb2.ReadStateRequest | node_pb2.AdoptStateRequest,
) -> Name:
    if len(request.name) != 32:
        raise Refused(
            f"a state's name of {len(request.name)} bytes; it has 32: hash what it is called"
        )
    return NamespaceId(request.namespace_id), request.name


def _put_head(
    response: node_pb2.SwapStateResponse | node_pb2.ReadStateResponse, head: Head
) -> None:
    response.version = head.version
    response.key = head.key
