"""Policies, counts of single shards, and pins of ControlService.

A rule is durable before it takes effect. While the store is away, changes are answered with
UNAVAILABLE; what is only read goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kvfabric.errors import Refused
from kvfabric.manager import messages
from kvfabric.manager.calls import Calls, translated
from kvfabric.manager.rules_store import RulesStore
from kvfabric.moves import policies
from kvfabric.moves.policies import Policy
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, Status

_Statuses = list[types_pb2.Status.ValueType]


class RulesCalls(Calls):
    """See the module."""

    def load_rules(self) -> None:
        """To be called once, before anything is served."""
        self._changes = threading.Lock()  # one change of the rules at a time; never within `_lock`
        self._rules_store = RulesStore(self._store)
        rules = self._core.moving.rules
        self._rules_store.load(rules)
        self._core.cluster.draining.update(rules.drains)

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

    # Single shards

    def SetReplicas(  # noqa: N802
        self, request: control_pb2.SetReplicasRequest, context: Any
    ) -> control_pb2.SetReplicasResponse:
        with translated(context):
            namespace = messages.namespace_id(request.namespace_id)
            asked = messages.keys(request.keys)
            keys = list(dict.fromkeys(asked))
            if request.replicas:
                policies.check_count(request.replicas)
            with self._changes:
                if request.replicas:
                    with self._lock:
                        self._core.moving.rules.counts.check_room(namespace, keys)
                self._rules_store.set_replicas(namespace, keys, request.replicas)
                with self._lock:
                    now_s = self._clock.now()
                    self._core.moving.set_replicas(namespace, keys, request.replicas, now_s)
                    return control_pb2.SetReplicasResponse(statuses=self._held(namespace, asked))

    def ListReplicas(  # noqa: N802
        self, request: control_pb2.ListReplicasRequest, context: Any
    ) -> control_pb2.ListReplicasResponse:
        with translated(context), self._lock:
            return messages.shard_replicas(self._core.moving.rules.counts)

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
                    with self._lock:
                        self._core.moving.rules.pins.check_room(namespace, keys)
                    self._rules_store.pin(namespace, keys)
                with self._lock:
                    self._apply_pins(namespace, keys, unpin=request.unpin)
                    return control_pb2.PinKeysResponse(statuses=self._held(namespace, asked))

    def _apply_pins(self, namespace: NamespaceId, keys: Sequence[Key], *, unpin: bool) -> None:
        moving, now_s = self._core.moving, self._clock.now()
        if unpin:
            moving.rules.pins.forget(namespace, keys)
            moving.pinning.release(namespace, keys, now_s)
        else:
            moving.rules.pins.say(namespace, keys, said=True)
            moving.pinning.pin(namespace, keys, now_s)

    def _held(self, namespace: NamespaceId, keys: Sequence[Key]) -> _Statuses:
        """OK per key that some node holds now, MISS for the others. Under the lock."""
        located = self._core.locate(namespace, keys, prefix=False)
        here = len(located.places)
        return [(Status.OK if at < here else Status.MISS).value for at in located.indices]
