"""One batch of a pull: asked, reserved, received straight into the arena, verified, sealed.

It runs in a thread of its own, which does only work that releases the GIL between two
questions to the core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from kvfabric import failpoints
from kvfabric.errors import FabricError, Refused, Retry, from_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Key, Status
from kvfabric.wire import frames, sockets
from kvfabric_nodes.copying.landing import DAMAGED, Arrival, Header, Landing, Result, transfer_s
from kvfabric_nodes.copying.peers import Bulk, Peers
from kvfabric_nodes.copying.pulls import Batch

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 2.0
FRAME_TIMEOUT_S = 10.0  # a source that sends nothing for longer is left
VERIFY_TIMEOUT_S = 10.0

OnCore = Callable[[Callable[[], Any]], Any]
"""Runs a call on the core's thread, and answers or raises what it does."""


class Transfer:
    """See the module. `run` never raises; it ends soon after `stopping` is set."""

    def __init__(
        self, landing: Landing, peers: Peers, on_core: OnCore, stopping: threading.Event
    ) -> None:
        self._landing = landing
        self._peers = peers
        self._on_core = on_core
        self._stopping = stopping

    def run(self, batch: Batch, keys: Sequence[Key]) -> Result:
        """Brings these keys of the batch, as far as it can."""
        result = Result()
        damaged: list[Key] = []
        try:
            try:
                self._bring(batch, keys, result)
            finally:
                damaged = self._on_core(lambda: self._landing.settle(batch, result))
                failpoints.reach("pull.sealed")
            if damaged:
                self._accuse(batch, damaged)
        except FabricError as error:
            result.why = str(error)
        except Exception as error:
            log.exception("pull_failed", source=batch.order.source)
            result.why = f"this node failed: {error!r}; see its log"
        if damaged:
            result.why = f"{len(damaged)} shards {DAMAGED}; the source was told"
        return result

    def _bring(self, batch: Batch, keys: Sequence[Key], result: Result) -> None:
        order = batch.order
        failpoints.reach("pull.started")
        until_s = time.monotonic() + CONNECT_TIMEOUT_S
        with self._peers.bulk(order.source, order.endpoints, until_s) as bulk:
            header = _ask(bulk, batch, keys)
            self._on_core(lambda: self._landing.reserve(batch, keys, header, result))
            failpoints.reach("pull.reserved")
            if result.arrivals:
                started_s = time.monotonic()
                try:
                    self._read(bulk, batch, result.arrivals)
                finally:
                    result.seconds = time.monotonic() - started_s

    def _read(self, bulk: Bulk, batch: Batch, arrivals: list[Arrival]) -> None:
        """Receives what room is there for, no faster than the order says."""
        size_bytes = sum(len(arrival.view) for arrival in arrivals)
        frame_id = bulk.next_id()
        request = node_pb2.ReadRequest(
            namespace_id=batch.order.namespace,
            keys=[arrival.key for arrival in arrivals],
            deadline_ms=int(transfer_s(batch, size_bytes) * 1000),
        )
        _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request))
        frame, payload_bytes = _receive(bulk, frame_id)
        if payload_bytes or not _agrees(frame.read_response.header, arrivals):
            raise Retry("the source's shards changed between the question and the answer")
        last = frame.read_response.last
        while not last:
            frame, payload_bytes = _receive(bulk, frame_id)
            step = frame.read_response
            if step.index >= len(arrivals):
                raise Refused(f"the source sent a key {step.index} of {len(arrivals)}")
            place = arrivals[step.index].place(step.offset, payload_bytes)
            wait_s = batch.throttle.take(payload_bytes, time.monotonic())
            if (wait_s and self._stopping.wait(wait_s)) or batch.cancelled:
                raise Retry("the pull was cancelled")
            sockets.receive_into(bulk.sock, place, time.monotonic() + FRAME_TIMEOUT_S)
            arrivals[step.index].took(payload_bytes)
            last = step.last

    def _accuse(self, batch: Batch, damaged: list[Key]) -> None:
        """Has the source look at its replicas: it drops those that are damaged."""
        order = batch.order
        log.warning("pull_damaged", source=order.source, shards=len(damaged))
        request = node_pb2.VerifyRequest(namespace_id=order.namespace, keys=damaged)
        until_s = time.monotonic() + VERIFY_TIMEOUT_S
        self._peers.call_now(order.source, order.endpoints, "verify", request, until_s)


def _agrees(header: Header, arrivals: Sequence[Arrival]) -> bool:
    """Whether the source is about to send what it described before."""
    return (
        all(status == Status.OK for status in header.statuses)
        and list(header.size_bytes) == [len(arrival.view) for arrival in arrivals]
        and list(header.layers) == [arrival.copied.layers for arrival in arrivals]
        and list(header.checksums) == [sum_ for each in arrivals for sum_ in each.expected]
    )


def _ask(bulk: Bulk, batch: Batch, keys: Sequence[Key]) -> Header:
    """What the source has of these keys, without their bytes."""
    frame_id = bulk.next_id()
    request = node_pb2.ReadRequest(namespace_id=batch.order.namespace, keys=keys, header_only=True)
    _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request))
    frame, payload_bytes = _receive(bulk, frame_id)
    if payload_bytes or not frame.read_response.last:
        raise Refused("the source sent payload that was not asked for; bring it up to date")
    return frame.read_response.header


def _send(bulk: Bulk, frame: wire_pb2.Frame) -> None:
    sockets.send(bulk.sock, frames.pack(frame), None, time.monotonic() + FRAME_TIMEOUT_S)


def _receive(bulk: Bulk, frame_id: int) -> tuple[wire_pb2.Frame, int]:
    frame, payload_bytes = sockets.receive_frame(
        bulk.sock, bulk.scratch, time.monotonic() + FRAME_TIMEOUT_S
    )
    if frame.WhichOneof("body") == "error":
        raise from_proto(frame.error)
    if frame.id != frame_id:
        raise Refused(f"the source answered {frame.id} where {frame_id} was asked")
    return frame, payload_bytes
