"""The node's side of the control plane: registers, reports its inventory, asks where keys lie.

It runs on the core's loop. While the manager is away it keeps trying, and the node goes
on alone: what changed meanwhile is reported in full.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import structlog

from kvfabric.errors import FabricError, Unsupported
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc, node_pb2, types_pb2
from kvfabric.types import PROTOCOL_VERSION, Key, NamespaceId
from kvfabric_nodes.core import NodeCore
from kvfabric_nodes.metrics import NodeMetrics

log = structlog.get_logger(__name__)

REPORT_SHARDS = 16_384  # per message: the manager takes one in without a long pause
RETRY_S = 0.5
CALL_TIMEOUT_S = 5.0
LOCATE_TIMEOUT_S = 0.25  # a match waits for it: better a miss than a late answer
PULSE_TIMEOUT_S = 10.0

_AWAY = (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError)

Change = tuple[NamespaceId, Key, int]  # size in bytes; 0 for removed ones


class Heartbeat:
    """One per node. `identity` is told by `incarnation`, which the manager may raise."""

    def __init__(
        self,
        core: NodeCore,
        metrics: NodeMetrics,
        manager: str,
        register: control_pb2.RegisterRequest,
    ) -> None:
        self.epoch = 0
        self.connected = False
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
        self._heartbeat_s = RETRY_S

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
                self.connected = False
                await asyncio.sleep(RETRY_S)
        finally:
            await self._channel.close()

    async def locate(
        self, namespace: NamespaceId, keys: Sequence[Key]
    ) -> list[node_pb2.MatchResponse.Run]:
        """Where the first of these keys lie; nothing while the manager does not answer."""
        if not self.connected:
            return []
        request = control_pb2.LocateRequest(namespace_id=namespace, keys=keys, prefix=True)
        try:
            answer = await self._stub.Locate(request, timeout=LOCATE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.warning("locate_failed", why=_brief(error))
            self.connected = False  # not asked again before it answers a heartbeat
            return []
        runs: list[node_pb2.MatchResponse.Run] = []
        for index, places in itertools.groupby(answer.place):
            if index >= len(answer.places):
                break
            place = answer.places[index]
            runs.append(
                node_pb2.MatchResponse.Run(
                    count=sum(1 for _ in places), node=place.nodes[0], tier=place.tiers[0]
                )
            )
        return runs

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
        self.epoch = answer.epoch
        self._heartbeat_s = answer.heartbeat_ms / 1000
        log.info("registered", epoch=answer.epoch, incarnation=self._register.incarnation)

    async def _pulse(self) -> None:
        """Heartbeats on one stream until it breaks or the manager forgets us."""
        stream = self._stub.Heartbeat()
        sequence = 0
        full = True
        try:
            while True:
                want_full = False
                for message in self._messages(full):
                    sequence += 1
                    message.sequence = sequence
                    async with asyncio.timeout(PULSE_TIMEOUT_S):
                        await stream.write(message)
                        answer = await stream.read()
                    if not isinstance(answer, control_pb2.HeartbeatResponse):
                        return  # the stream has ended
                    self.epoch = max(self.epoch, answer.epoch)
                    if answer.want_register:
                        self._metrics.heartbeats["register"] += 1
                        return
                    want_full = answer.want_full
                was_full, full = full, want_full
                self._metrics.heartbeats["full" if full else "ok"] += 1
                self.connected = True
                if was_full or not full:  # a full report that does not please can wait, too
                    await asyncio.sleep(self._heartbeat_s)
        finally:
            stream.cancel()

    def _messages(self, full: bool) -> Iterable[control_pb2.HeartbeatRequest]:
        """What changed since the last heartbeat, or all that there is, in limited messages."""
        core = self._core
        full = full or core.changes_lost
        shards = core.shards if full else core.added.values()
        added = [(s.namespace, s.key, s.size_bytes) for s in shards]
        removed = [] if full else [(namespace, key, 0) for namespace, key in core.removed]
        core.added.clear()
        core.removed.clear()
        core.changes_lost = False
        count, checksum = core.shards.count, core.inventory_hash
        stats = self._metrics.stats()
        pieces = [
            added[start : start + REPORT_SHARDS] for start in range(0, len(added), REPORT_SHARDS)
        ] or [[]]
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            yield control_pb2.HeartbeatRequest(
                node=self._register.node,
                incarnation=self._register.incarnation,
                full=full,
                more=not last,
                added=_inventories(piece),
                removed=_inventories(removed),
                inventory_count=count if last else 0,
                inventory_hash=checksum if last else 0,
                stats=stats if last else None,
            )


def _inventories(changes: list[Change]) -> list[control_pb2.Inventory]:
    """Columns per namespace."""
    rooms: dict[NamespaceId, list[Change]] = {}
    for change in changes:
        rooms.setdefault(change[0], []).append(change)
    return [
        control_pb2.Inventory(
            namespace_id=namespace,
            tier=types_pb2.TIER_DRAM,
            keys=b"".join(key for _, key, _ in room),
            size_bytes=[size for _, _, size in room if size],
        )
        for namespace, room in rooms.items()
    ]


def _brief(error: Any) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.details())
    return str(error) or "no answer"
