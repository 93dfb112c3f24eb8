"""Migrate and Drain of ControlService: a drain is a rule, a move is not."""

from __future__ import annotations

from typing import Any

from kvfabric.errors import Refused, Retry
from kvfabric.manager import messages
from kvfabric.manager.calls import log, translated
from kvfabric.manager.rules_calls import RulesCalls
from kvfabric.moves import policies
from kvfabric.moves.migrating import Wish
from kvfabric.moves.migration import Kind
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

_PRIORITIES = frozenset({0, *(value.number for value in control_pb2.Priority.DESCRIPTOR.values)})


class MovingCalls(RulesCalls):
    """See the module."""

    # Moves

    def Migrate(  # noqa: N802
        self, request: control_pb2.MigrateRequest, context: Any
    ) -> control_pb2.MigrateResponse:
        with translated(context):
            if request.priority not in _PRIORITIES:
                raise Refused(f"{request.priority} is no priority; see Priority in control.proto")
            wish = Wish(
                messages.namespace_id(request.namespace_id) if request.namespace_id else None,
                messages.keys(request.keys),
                messages.node_id(request.source) if request.source else None,
                messages.node_id(request.destination) if request.destination else None,
                request.bytes_per_s,
                request.priority,
                request.copy,
            )
            with self._lock:
                now_s = self._clock.now()
                move = self._core.moving.migrating.begin(wish, now_s)
                self._core.moving.mover.tick(now_s)  # it begins now, not at the next tick
                told = move.told(now_s)
        log.info("move begun", move=told.move, keys=told.keys, to=told.destination)
        return control_pb2.MigrateResponse(move=told.move, keys=told.keys)

    def ListMoves(  # noqa: N802
        self, request: control_pb2.ListMovesRequest, context: Any
    ) -> control_pb2.ListMovesResponse:
        with translated(context), self._lock:
            now_s = self._clock.now()
            return control_pb2.ListMovesResponse(
                moves=[
                    move.told(now_s)
                    for move in self._core.moving.mover.moves()
                    if request.move in (0, move.number)
                ]
            )

    def CancelMove(  # noqa: N802
        self, request: control_pb2.CancelMoveRequest, context: Any
    ) -> control_pb2.CancelMoveResponse:
        with translated(context), self._lock:
            self._core.moving.mover.cancel(request.move, self._clock.now())
            return control_pb2.CancelMoveResponse()

    # Drains

    def Drain(  # noqa: N802
        self, request: control_pb2.DrainRequest, context: Any
    ) -> control_pb2.DrainResponse:
        with translated(context):
            node = messages.node_id(request.node)
            if request.cancel:
                return self._cancel_drain(node)
            with self._changes:
                drain = self._wanted_drain(node, request.bytes_per_s)
                if drain is not None:
                    self._rules_store.drain(node, drain)
                    log.info("drain begun", node=node)
                with self._lock:
                    now_s = self._clock.now()
                    moving = self._core.moving
                    if drain is not None:
                        moving.draining.begin(node, drain, now_s)
                        self._core.cluster.note(node, "drain", "asked for", now_s)
                    return moving.draining.told(node, now_s)

    def _wanted_drain(self, node: NodeId, bytes_per_s: int) -> policies.Drain | None:
        """The rule that is to be set; None where it is set already."""
        with self._lock:
            known = self._core.cluster.members.known_incarnation(node)
            old = self._core.moving.rules.drains.get(node)
        if old is None and not known:
            raise Refused(f"there is no node {node}; `kvfabric status` lists them")
        drain = policies.Drain(old.incarnation if old else known, bytes_per_s)
        return None if drain == old else drain

    def _cancel_drain(self, node: NodeId) -> control_pb2.DrainResponse:
        with self._changes:
            with self._lock:
                if node not in self._core.moving.rules.drains:
                    raise Refused(f"{node} is not being drained; `kvfabric status` shows who is")
            self._rules_store.end_drain(node)
            with self._lock:
                now_s = self._clock.now()
                self._core.moving.draining.cancel(node, now_s)
                self._core.cluster.note(node, "drain", "called off", now_s)
        return control_pb2.DrainResponse(waiting="called off: the node serves")

    def keep_drains(self) -> None:
        """Writes down what became of the drains of nodes that were started anew."""
        with self._lock:
            changed = list(self._core.moving.draining.changed)
        for node in changed:
            with self._changes:
                with self._lock:
                    drain = self._core.moving.rules.drains.get(node)
                try:
                    if drain is None:
                        self._rules_store.end_drain(node)
                    else:
                        self._rules_store.drain(node, drain)
                except Retry:
                    return  # the store is away: at a later tick
            with self._lock:
                self._core.moving.draining.changed.remove(node)

    def _set_moving_gauges(self) -> None:
        """To be called under the lock."""
        moving, value = self._core.moving, self._metrics.value
        under_way = [move.kind for move in moving.mover.moves() if not move.ended]
        for kind in Kind:
            value("kvfabric_manager_moves", kind).value = under_way.count(kind)
            value("kvfabric_manager_copied_shards_total", kind).value = moving.mover.copied[kind]
            value("kvfabric_manager_dropped_shards_total", kind).value = moving.mover.dropped[kind]
        value("kvfabric_manager_draining_nodes").value = len(moving.rules.drains)
        value("kvfabric_manager_pins").value = len(moving.rules.pins)
