"""The node's side of the control plane: registers, reports, and hears what the manager wants.

It runs on the core's loop. While the manager is away it keeps trying, and the node goes
on alone: what changed meanwhile is reported in full.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from kvfabric.errors import FabricError, Unsupported
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import PROTOCOL_VERSION
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.reporting.inquiries import Inquiries
from kvfabric_nodes.reporting.reports import Reports
from kvfabric_nodes.store.core import NodeCore

log = structlog.get_logger(__name__)

RETRY_S = 0.5
POKE_GAP_S = 0.01  # between two heartbeats, however often somebody pokes
CALL_TIMEOUT_S = 5.0
PULSE_TIMEOUT_S = 10.0

_AWAY = (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError)


class Heartbeat:
    """One per node, which is told by its incarnation, which the manager may raise.

    `registered` is told of every registration, `obey` of the manager's commands with the
    epoch that they come from. Those of an older epoch than was seen are not passed on.
    """

    def __init__(
        self,
        core: NodeCore,
        metrics: NodeMetrics,
        manager: str,
        register: control_pb2.RegisterRequest,
    ) -> None:
        self.epoch = 0  # the greatest that was seen
        self.registered: Callable[[control_pb2.RegisterResponse], None] | None = None
        self.obey: Callable[[Sequence[control_pb2.Command], int], None] | None = None
        self.reports = Reports(core, metrics, register.node)
        self._core = core
        self._metrics = metrics
        self._register = register
        self._channel = grpc.aio.insecure_channel(
            manager,
            options=[
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.enable_http_proxy", 0),  # a manager is never behind one
            ],
        )
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self.inquiries = Inquiries(self._stub, register.node)
        self._heartbeat_s = RETRY_S
        self._poked = asyncio.Event()
        self._regular_s = float("-inf")  # when the last one was sent that came to its time

    def poke(self) -> None:
        """There is something that the manager should hear of soon."""
        self._poked.set()

    async def run(self) -> None:
        """Until cancelled."""
        told = ""
        try:
            while True:
                try:
                    await self._register_node()
                    told = ""
                    await self._pulse()
                except (*_AWAY, FabricError) as error:
                    why = _brief(error)
                    if why != told:  # once, not at every attempt
                        log.warning("manager_away", why=why, effect="the node goes on alone")
                    told = why
                except Exception:  # a node without heartbeats would be lost to all others
                    log.exception("heartbeat_failed", effect="the node registers anew")
                self.inquiries.connected = False
                await asyncio.sleep(RETRY_S)
        finally:
            await self._channel.close()

    async def _register_node(self) -> None:
        self._register.epoch = self.epoch
        while True:
            answer = await self._stub.Register(self._register, timeout=CALL_TIMEOUT_S)
            if not answer.known_incarnation:
                break
            self._register.incarnation = answer.known_incarnation + 1
            self._metrics.incarnation = self._register.incarnation
        if answer.version != PROTOCOL_VERSION:
            raise Unsupported(f"the manager speaks protocol {answer.version}")
        self.epoch = max(self.epoch, answer.epoch)
        self._heartbeat_s = answer.heartbeat_ms / 1000
        if self.registered is not None:
            self.registered(answer)
        log.info("registered", epoch=answer.epoch, incarnation=self._register.incarnation)

    async def _pulse(self) -> None:
        """Heartbeats on one stream until it breaks or the manager forgets us."""
        stream = self._stub.Heartbeat()
        loop = asyncio.get_running_loop()
        sequence = 0
        full = True
        try:
            while True:
                want_full = False
                regular = full or loop.time() >= self._regular_s + self._heartbeat_s
                if regular:
                    self._regular_s = loop.time()
                self._poked.clear()
                for message in self.reports.messages(full=full, regular=regular):
                    sequence += 1
                    message.sequence = sequence
                    async with asyncio.timeout(PULSE_TIMEOUT_S):
                        await stream.write(message)
                        answer = await stream.read()
                    if not isinstance(answer, control_pb2.HeartbeatResponse):
                        return  # the stream has ended
                    if answer.want_register:
                        self._metrics.heartbeats["register"] += 1
                        return
                    want_full = answer.want_full
                    self._hear(answer)
                was_full, full = full, want_full
                self._metrics.heartbeats["full" if full else "ok"] += 1
                self.inquiries.connected = True
                if was_full or not full:  # a full report that does not please can wait, too
                    await self._pause(may_be_poked=not full)
        finally:
            stream.cancel()

    def _hear(self, answer: control_pb2.HeartbeatResponse) -> None:
        """What the manager wants, unless a newer one was heard before."""
        if answer.epoch < self.epoch:
            self._metrics.commands["stale"] += len(answer.commands)
            log.warning("manager_stale", epoch=answer.epoch, seen=self.epoch)
            return
        self.epoch = answer.epoch
        self._core.draining = answer.draining
        if answer.commands and self.obey is not None:
            self.obey(answer.commands, answer.epoch)

    async def _pause(self, *, may_be_poked: bool) -> None:
        """Until the next heartbeat is due, or somebody pokes."""
        await asyncio.sleep(min(POKE_GAP_S, self._heartbeat_s))
        left_s = self._regular_s + self._heartbeat_s - asyncio.get_running_loop().time()
        if not may_be_poked:
            await asyncio.sleep(max(0.0, left_s))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._poked.wait()


def _brief(error: Any) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.details())
    return str(error) or "no answer"
