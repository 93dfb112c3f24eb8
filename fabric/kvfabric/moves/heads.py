"""Which node has the head of each state, as the nodes' heartbeats say.

A state is one over the fabric: a node that does not have it asks here, and sends its client
there. What is being made is remembered for a while, so that two nodes do not make the same
one; a manager that was started a moment ago is unsure of what it has not heard of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvfabric.errors import Broken
from kvfabric.membership import NodeState
from kvfabric.moves import sight
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, NamespaceId, NodeId

MAKING_S = 10.0  # from the question of who makes a state to the heartbeat that tells of it
MAX_MAKING = 65_536

Name = tuple[NamespaceId, bytes]
HERE = NodeId("")


@dataclass(frozen=True, slots=True)
class _Making:
    node: NodeId
    until_s: float


class Heads:
    """See the module. Sure of what it does not know from `sure_s` on."""

    def __init__(self, cluster: sight.Cluster, sure_s: float) -> None:
        self.sure_s = sure_s
        self._cluster = cluster
        self._nodes: dict[NodeId, dict[Name, NodeId]] = {}  # HERE, or where it went
        self._names: dict[Name, dict[NodeId, NodeId]] = {}  # the same
        self._making: dict[Name, _Making] = {}

    def count(self, node: NodeId) -> int:
        """States that the node has."""
        return sum(place == HERE for place in self._nodes.get(node, {}).values())

    def heard(self, node: NodeId, told: Iterable[control_pb2.Heads], *, full: bool) -> None:
        """What changed at a node; `full`: all that it knows of."""
        if full:
            self.lost(node)
        for heads in told:
            namespace = NamespaceId(heads.namespace_id)
            for start in range(0, len(heads.names), DIGEST_BYTES):
                name = (namespace, heads.names[start : start + DIGEST_BYTES])
                self._forget(node, name)
                if heads.node or not heads.gone:
                    place = NodeId(heads.node)
                    self._nodes.setdefault(node, {})[name] = place
                    self._names.setdefault(name, {})[node] = place

    def lost(self, node: NodeId) -> None:
        """The node, and what it had, is gone."""
        for name in list(self._nodes.get(node, ())):
            self._forget(node, name)

    def find(self, name: Name, asker: NodeId, now_s: float, *, create: bool) -> NodeId | None:
        """The node that has the state, or is about to; HERE: none has it. None: that is not
        known. With `create` the asker is about to make one that none has."""
        told = self._names.get(name, {})
        here = [node for node, place in told.items() if place == HERE and self._reached(node)]
        if here:
            return asker if asker in here else min(here)
        went = [place for place in told.values() if place != HERE and self._reached(place)]
        if went:
            return min(went)
        making = self._making.get(name)
        if making is not None and making.until_s > now_s and self._reached(making.node):
            return making.node
        if now_s < self.sure_s:
            return None
        if create:
            self._making.pop(name, None)
            self._making[name] = _Making(asker, now_s + MAKING_S)
            if len(self._making) > MAX_MAKING:
                del self._making[next(iter(self._making))]
        return HERE

    def tick(self, now_s: float) -> None:
        """Forgets what was to be made long ago: the oldest come first."""
        for name, making in list(self._making.items()):
            if making.until_s > now_s:
                break
            del self._making[name]

    def check(self) -> None:
        """Broken unless both books say the same."""
        nodes = {(n, name, at) for n, names in self._nodes.items() for name, at in names.items()}
        names = {(n, name, at) for name, told in self._names.items() for n, at in told.items()}
        if nodes != names or len(self._making) > MAX_MAKING:
            raise Broken("what nodes have and who has it differ: a bug")

    def _reached(self, node: NodeId) -> bool:
        known = sight.member(self._cluster, node)
        return known is not None and known.state is not NodeState.LOST

    def _forget(self, node: NodeId, name: Name) -> None:
        names = self._nodes.get(node, {})
        if names.pop(name, None) is None:
            return
        if not names:
            del self._nodes[node]
        nodes = self._names[name]
        del nodes[node]
        if not nodes:
            del self._names[name]
