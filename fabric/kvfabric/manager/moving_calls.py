"""Migrate, Drain, policies and pins of ControlService.

A rule is durable before it takes effect. While the store is away, changes are answered with
UNAVAILABLE; what is only read, and moves, go on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kvfabric.errors import Refused, Retry
from kvfabric.manager import messages
from kvfabric.manager.calls import Calls, log, translated
from kvfabric.manager.rules_store import RulesStore
from kvfabric.moves import policies
from kvfabric.moves.migrating import Wish
from kvfabric.moves.migration import Kind
from kvfabric.moves.policies import Policy
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, NodeId, Status

_PRIORITIES = frozenset({0, *(value.number for value in control_pb2.Priority.DESCRIPTOR.values)})


class MovingCalls(Calls):
    """See the module."""

    def load_rules(self) -> None:
        """To be called once, before anything is served."""
        self._changes = threading.Lock()  # one change of the rules at a time; never within `_lock`
        self._rules_store = RulesStore(self._store)
        rules = self._core.moving.rules
        self._rules_store.load(rules)
        self._core.cluster.draining.update(rules.drains)

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
        value("kvfabric_manager_pins").value = moving.rules.pin_count

    # Policies

    def SetPolicy(  # noqa: N802
        self, request: control_pb2.SetPolicyRequest, context: Any
    ) -> control_pb2.SetPolicyResponse:
        with translated(context):
            raw = request.policy.namespace_id
            namespace = messages.namespace_id(raw) if raw else None
            policy = Policy(request.policy.replicas, request.policy.hot_replicas)
            policies.check_policy(policy)
            with self._changes:
                if request.remove:
                    self._rules_store.remove_policy(namespace)
                else:
                    self._check_policies(namespace)
                    self._rules_store.set_policy(namespace, policy)
                with self._lock:
                    moving = self._core.moving
                    if request.remove:
                        moving.rules.remove_policy(namespace)
                    else:
                        moving.rules.set_policy(namespace, policy)
                    moving.replicas.alarm(self._clock.now())
            return control_pb2.SetPolicyResponse()

    def _check_policies(self, namespace: NamespaceId | None) -> None:
        with self._lock:
            known = [each for each, _ in self._core.moving.rules.policies()]
        if namespace not in known and len(known) >= policies.MAX_POLICIES:
            raise Refused(f"{len(known)} policies are set already; remove one first")

    def ListPolicies(  # noqa: N802
        self, request: control_pb2.ListPoliciesRequest, context: Any
    ) -> control_pb2.ListPoliciesResponse:
        with translated(context), self._lock:
            return control_pb2.ListPoliciesResponse(
                policies=[
                    control_pb2.Policy(
                        namespace_id=namespace or b"",
                        replicas=policy.replicas,
                        hot_replicas=policy.hot_replicas,
                    )
                    for namespace, policy in self._core.moving.rules.policies()
                ]
            )

    # Pins

    def PinKeys(  # noqa: N802
        self, request: control_pb2.PinKeysRequest, context: Any
    ) -> control_pb2.PinKeysResponse:
        with translated(context):
            namespace = messages.namespace_id(request.namespace_id)
            asked = messages.keys(request.keys)
            keys = list(dict.fromkeys(asked))
            with self._changes:
                if request.unpin:
                    self._rules_store.unpin(namespace, keys)
                else:
                    self._check_pins(namespace, keys)
                    self._rules_store.pin(namespace, keys)
                with self._lock:
                    self._apply_pins(namespace, keys, unpin=request.unpin)
                    located = self._core.locate(namespace, asked, prefix=False)
            held = [
                Status.OK if at < len(located.places) else Status.MISS for at in located.indices
            ]
            statuses: list[types_pb2.Status.ValueType] = [status.value for status in held]
            return control_pb2.PinKeysResponse(statuses=statuses)

    def _check_pins(self, namespace: NamespaceId, keys: Sequence[Key]) -> None:
        with self._lock:
            rules = self._core.moving.rules
            new = sum(not rules.pinned(namespace, key) for key in keys)
            if rules.pin_count + new > policies.MAX_PINS:
                raise Refused(
                    f"{rules.pin_count} keys are pinned already, the limit is "
                    f"{policies.MAX_PINS}; unpin some first"
                )

    def _apply_pins(self, namespace: NamespaceId, keys: Sequence[Key], *, unpin: bool) -> None:
        moving, now_s = self._core.moving, self._clock.now()
        if unpin:
            moving.rules.unpin(namespace, keys)
            moving.pinning.release(namespace, keys, now_s)
        else:
            moving.rules.pin(namespace, keys)
            moving.pinning.pin(namespace, keys, now_s)
