"""NodeService over gRPC: the same handler, for clients in any language.

gRPC has no connection to bind a session to, so Hello answers a session id that the
other calls carry as metadata `kvfabric-session`; a session that is silent for long ends.
No memory is shared here, so nothing of a session outlives it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf import message_factory
from google.protobuf.message import Message

from kvfabric.errors import (
    Denied,
    FabricError,
    Refused,
    Retry,
)
from kvfabric.grpc_codes import code_of, metadata_of
from kvfabric.rpc.v1 import node_pb2, node_pb2_grpc
from kvfabric.types import NamespaceId
from kvfabric.wire.frames import MAX_PAYLOAD_BYTES
from kvfabric_nodes.serving.handler import Handler, checked_keys, put_header, put_verdicts, seconds
from kvfabric_nodes.store.filling import Filling
from kvfabric_nodes.store.promises import Grant, Session

log = structlog.get_logger(__name__)

SESSION_METADATA = "kvfabric-session"
SESSION_SILENCE_S = 600.0
MAX_SESSIONS = 1024
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (1 << 20)
OFFERED = frozenset({"unchecked"})


T = TypeVar("T")


class _Guest:
    def __init__(self, session: Session, seen_s: float) -> None:
        self.session = session
        self.seen_s = seen_s
        self.calls = 0  # under way: such a session does not end


class NodeService:
    """See the module. Runs on the core's loop."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._guests: dict[str, _Guest] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        # Most of its methods are made from the protocol, which no type checker sees.
        node_pb2_grpc.add_NodeServiceServicer_to_server(cast(Any, self), server)

    async def _call(self, name: str, request: Any, response: T, context: Any) -> T:
        guest = await self._guest(context)
        guest.calls += 1
        try:
            later = self._handler.call(name, guest.session, request, response)
            if later is not None:
                await later
        except FabricError as error:
            await _abort(context, error)
        finally:
            guest.calls -= 1
        return response

    async def Hello(  # noqa: N802
        self, request: node_pb2.HelloRequest, context: Any
    ) -> node_pb2.HelloResponse:
        response = node_pb2.HelloResponse()
        name = request.session.decode("ascii", "replace") or _session_name(context)
        guest = self._guests.get(name)
        try:
            if guest is None and len(self._guests) >= MAX_SESSIONS:
                raise Retry(f"{MAX_SESSIONS} gRPC sessions are open; end some, or wait")
            session = self._handler.hello(
                guest.session if guest else None, request, response, OFFERED
            )
        except FabricError as error:
            await _abort(context, error)
            raise
        if guest is None:
            name = secrets.token_hex(16)
            guest = self._guests[name] = _Guest(session, self._handler.clock.now())
        response.session = name.encode()
        return response

    async def Read(  # noqa: N802
        self, request: node_pb2.ReadRequest, context: Any
    ) -> AsyncIterator[node_pb2.ReadResponse]:
        guest = await self._guest(context)
        core = self._handler.core
        deadline_s = core.bounded(seconds(request.deadline_ms))
        try:
            lease, found = core.acquire(
                guest.session,
                NamespaceId(request.namespace_id),
                checked_keys(request.keys),
                deadline_s,
                self._handler.clock.now(),
                streamed=True,
            )
        except FabricError as error:
            await _abort(context, error)
            raise
        guest.calls += 1
        started_s = self._handler.clock.now()
        # A reader that does not read blocks `yield`, so the call is cancelled from outside. Its
        # status waits behind the payload; such a reader learns of it by its own deadline.
        call = asyncio.current_task()
        assert call is not None
        deadline = asyncio.get_running_loop().call_later(deadline_s, call.cancel)
        try:
            first = node_pb2.ReadResponse(last=lease is None or request.header_only)
            now_s = self._handler.clock.now()
            put_header(first.header, found, lease, guest.session, now_s)
            yield first
            present = [(i, s) for i, s in enumerate(found) if s and not request.header_only]
            for index, shard in present:
                view = self._handler.arena.view(
                    shard.extent.segment, shard.extent.offset, shard.size_bytes
                )
                for start in range(0, len(view), MAX_PAYLOAD_BYTES):
                    payload = bytes(view[start : start + MAX_PAYLOAD_BYTES])
                    last = index == present[-1][0] and start + len(payload) == len(view)
                    yield node_pb2.ReadResponse(
                        index=index, offset=start, payload=payload, last=last
                    )
        finally:
            deadline.cancel()
            guest.calls -= 1
            if lease is not None:
                core.release(guest.session, [lease.id])
            if lease is not None and not request.header_only:
                elapsed_s = self._handler.clock.now() - started_s
                self._handler.metrics.read["grpc"].add(lease.size_bytes, elapsed_s)

    async def Write(  # noqa: N802
        self, requests: AsyncIterator[node_pb2.WriteRequest], context: Any
    ) -> AsyncIterator[node_pb2.WriteResponse]:
        guest = await self._guest(context)
        guest.calls += 1
        try:
            async for response in self._write(guest.session, requests):
                yield response
        except FabricError as error:
            await _abort(context, error)
        finally:
            guest.calls -= 1

    async def _write(
        self, session: Session, requests: AsyncIterator[node_pb2.WriteRequest]
    ) -> AsyncIterator[node_pb2.WriteResponse]:
        handler, core = self._handler, self._handler.core
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("header"):
            raise Refused("the first message of a Write must be its header")
        reservation, grants = handler.reserve_extents(session, first.header, streamed=True)
        if handler.may_borrow(grants):
            reservation, grants = await handler.reserve_again(
                session, first.header, reservation, grants, streamed=True
            )
        if reservation is None:
            yield _verdicts(grants, last=True)
            return
        started_s = handler.clock.now()
        deadline_s = core.bounded(seconds(first.header.deadline_ms))
        try:
            yield _verdicts(grants, last=False)
            filling = Filling(reservation, handler.arena, checked=session.checked)
            trailer = await _receive(requests, filling, deadline_s)
            fills, wrong = filling.verdicts(trailer)
            settled = handler.settle(reservation, fills, wrong)
        finally:
            core.abort(reservation)
        elapsed_s = handler.clock.now() - started_s
        handler.metrics.written["grpc"].add(filling.filled_bytes, elapsed_s)
        yield _verdicts([settled.get(i, grant) for i, grant in enumerate(grants)], last=True)

    async def _guest(self, context: Any) -> _Guest:
        guest = self._guests.get(_session_name(context))
        if guest is None:
            await _abort(
                context,
                Denied(f"no session: call Hello, then send its session as {SESSION_METADATA}"),
            )
            raise AssertionError  # abort raises
        guest.seen_s = self._handler.clock.now()
        return guest

    async def end_silent_sessions(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(SESSION_SILENCE_S / 10)
            silent_since_s = self._handler.clock.now() - SESSION_SILENCE_S
            for name, guest in list(self._guests.items()):
                if not guest.calls and guest.seen_s < silent_since_s:
                    del self._guests[name]
                    self._handler.close_session(guest.session)


def _served(name: str, answer: type[Message]) -> Any:
    """NodeService's method for one call of the handler."""

    async def serve(self: NodeService, request: Any, context: Any) -> Any:
        return await self._call(name, request, answer(), context)

    return serve


def _add_calls() -> None:
    """All calls of one request and one answer, but for Hello, are the handler's."""
    for method in node_pb2.DESCRIPTOR.services_by_name["NodeService"].methods:
        streams = method.client_streaming or method.server_streaming
        if not streams and method.name != "Hello":
            name = re.sub("(?<!^)(?=[A-Z])", "_", method.name).lower()
            answer = message_factory.GetMessageClass(method.output_type)
            setattr(NodeService, method.name, _served(name, answer))


_add_calls()


async def _receive(
    requests: AsyncIterator[node_pb2.WriteRequest], filling: Filling, deadline_s: float
) -> Sequence[int]:
    """Fills the granted extents; answers the trailer's checksums. Retry after the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            async for step in requests:
                if step.HasField("trailer"):
                    return step.trailer.checksums
                filling.place(step.index, step.offset, len(step.payload))[:] = step.payload
                filling.filled(step.index, len(step.payload))
    except TimeoutError as error:
        raise Retry(
            "the Write did not end by its deadline; nothing was stored: begin again, with a "
            "longer one"
        ) from error
    raise Refused("a Write must end with its trailer; nothing was stored")


def _verdicts(grants: list[Grant], *, last: bool) -> node_pb2.WriteResponse:
    response = node_pb2.WriteResponse()
    put_verdicts(response, grants, last=last)
    return response


def _session_name(context: Any) -> str:
    return str(dict(context.invocation_metadata() or ()).get(SESSION_METADATA, ""))


async def _abort(context: Any, error: FabricError) -> None:
    await context.abort(code_of(error), str(error), metadata_of(error))
