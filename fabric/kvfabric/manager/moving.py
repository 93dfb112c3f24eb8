"""The manager's part in moving shards: everything that moves, drains, replicates, fills and pins.

Each concern has a module of its own; they share the mover, the rules and the heat.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric.manager.events import Heartbeat
from kvfabric.manager.parts import Cluster
from kvfabric.membership import Member, NodeState
from kvfabric.moves.draining import Draining
from kvfabric.moves.filling import Filling
from kvfabric.moves.heads import Heads
from kvfabric.moves.heat import Heat
from kvfabric.moves.migrating import Migrating
from kvfabric.moves.mover import Mover
from kvfabric.moves.pinning import Pinning
from kvfabric.moves.policies import Rules
from kvfabric.moves.replicas import Replicas
from kvfabric.moves.spreading import Spreading
from kvfabric.types import Key, NamespaceId, NodeId

# How many silences after its start a manager has surely heard every node that lives.
SETTLE_SILENCES = 2.0


class Moving:
    """See the module. A part of the core."""

    def __init__(self, cluster: Cluster, silence_s: float, now_s: float) -> None:
        self._cluster = cluster
        self.rules = Rules()
        self.heat = Heat()
        self.mover = Mover(cluster)
        begin_s = now_s + SETTLE_SILENCES * silence_s
        self.heads = Heads(cluster, begin_s)
        self.draining = Draining(
            cluster, self.mover, self.rules, self.heat, cluster.ledger, self.heads
        )
        self.migrating = Migrating(cluster, self.mover)
        self.replicas = Replicas(cluster, self.mover, self.rules, begin_s)
        self._spreading = Spreading(cluster, self.mover, self.rules, self.heat, begin_s)
        self.pinning = Pinning(cluster, self.rules)
        self._filling = Filling(cluster, self.mover, self.rules, self.heat)
        self._now_s = now_s

    def set_replicas(
        self, namespace: NamespaceId, keys: Sequence[Key], replicas: int, now_s: float
    ) -> None:
        """Counts of their own for these keys; 0: none. Refused where there are too many."""
        before = {key: self.rules.replicas(namespace, key) for key in keys}
        if replicas:
            self.rules.counts.say(namespace, before, replicas)
        else:
            self.rules.counts.forget(namespace, before)
        after = {key: self.rules.replicas(namespace, key) for key in before}
        self.replicas.wanted(namespace, [key for key in after if after[key] > before[key]])
        self._spreading.lowered(
            namespace, {key: count for key, count in before.items() if count > after[key]}
        )
        why = f"{replicas} are wanted" if replicas else "as many as the namespace's policy wants"
        told = b"".join(before)
        self._cluster.note(NodeId(""), "replicas", why, now_s, namespace, told)

    def asked(self, namespace: NamespaceId, keys: Sequence[Key], node: NodeId) -> None:
        """Clients of `node` look for these. Counts where shards may be spread to their readers."""
        if self.rules.hot_replicas(namespace):
            self.heat.asked(namespace, keys, node, self._now_s)

    def heard(self, member: Member, event: Heartbeat, now_s: float) -> None:
        self._now_s = now_s
        if event.heat is not None:
            self.heat.report(event.heat, now_s)
        if member.state is NodeState.LIVE:
            for delta in event.added:
                self.replicas.added(delta.namespace, delta.keys)
                self.pinning.added(delta.namespace, delta.keys, now_s)
        if event.heads or (event.full and not event.more):
            self.heads.heard(event.node, event.heads, full=event.full)
        if event.added or event.removed or event.full:
            self.mover.heard(event.node, now_s)
            self.migrating.heard(event.node, now_s)
        self.draining.heard(event.node, event.sequences, now_s)

    def lost(self, node: NodeId, now_s: float) -> None:
        self._now_s = now_s
        self.draining.lost(node, now_s)
        self.heads.lost(node)
        self.mover.lost(node, now_s)
        self.replicas.alarm(now_s)

    def tick(self, now_s: float) -> None:
        self._now_s = now_s
        self.heads.tick(now_s)
        self.draining.tick(now_s)
        self.migrating.tick(now_s)
        self.replicas.tick(now_s)
        self._spreading.tick(now_s)
        self._filling.tick(now_s)
        self.pinning.tick(now_s)
        self.mover.tick(now_s)

    def check(self) -> None:
        for part in (
            self.mover,
            self.rules,
            self.draining,
            self.heads,
            self.replicas,
            self._spreading,
            self._filling,
            self.heat,
        ):
            part.check()
