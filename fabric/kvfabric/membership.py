"""Which nodes there are, which start of each is the living one, and what was heard from it.

Incarnations fence: of two processes that call themselves by one name, the greater
incarnation is the node, and the other is told so. What the nodes hold is kept by the
directory; what to do about a change is the manager's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvfabric.errors import Broken, Retry
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import NodeId

MAX_NODES = 4096  # remembered, the lost ones included


class NodeState(enum.Enum):
    LIVE = "live"  # the directory follows its deltas
    RESYNC = "resync"  # something was missed: its deltas are void until a full report
    LOST = "lost"  # silent for too long: nothing is believed to be there


TRANSITIONS: Mapping[NodeState, frozenset[NodeState]] = {
    NodeState.LIVE: frozenset({NodeState.RESYNC, NodeState.LOST}),
    NodeState.RESYNC: frozenset({NodeState.LIVE, NodeState.LOST}),
    NodeState.LOST: frozenset({NodeState.RESYNC}),
}


class Hearing(enum.Enum):
    """How a heartbeat relates to those before it."""

    NEXT = "next"  # the one that was due
    GAP = "gap"  # some before it never came
    DUPLICATE = "duplicate"  # it, or a later one, was here before; or it is of an old stream
    STRANGER = "stranger"  # no such node, or another incarnation of it


@dataclass(slots=True)
class Member:
    """What is known of one node."""

    node: NodeId
    incarnation: int
    state: NodeState
    heard_s: float
    endpoints: types_pb2.Endpoints
    stats: types_pb2.NodeStats
    labels: Mapping[str, str] = field(default_factory=dict)
    stream: int = 0  # the newest that heartbeats came on
    sequence: int | None = None  # of the last heartbeat; None: any may come first


class Membership:
    """See the module. Members are changed by `move` and by their manager only."""

    def __init__(self, silence_s: float, max_nodes: int = MAX_NODES) -> None:
        self._silence_s = silence_s
        self._max_nodes = max_nodes
        self._members: dict[NodeId, Member] = {}

    def __getitem__(self, node: NodeId) -> Member:
        return self._members[node]

    def __iter__(self) -> Iterator[Member]:
        """Every member, in the order of their names."""
        return iter(sorted(self._members.values(), key=lambda member: member.node))

    def known_incarnation(self, node: NodeId) -> int:
        """The greatest that registered; 0: none did."""
        member = self._members.get(node)
        return member.incarnation if member else 0

    def admit(
        self,
        node: NodeId,
        incarnation: int,
        endpoints: types_pb2.Endpoints,
        stats: types_pb2.NodeStats,
        labels: Mapping[str, str],
        now_s: float,
    ) -> NodeId | None:
        """Take in a start of a node that is newer than any known: LIVE, and so far empty.

        Returns the lost node that was forgotten to make room, if one was. Retry where
        there are too many nodes and none of them is lost.
        """
        forgotten = None
        if node not in self._members and len(self._members) >= self._max_nodes:
            forgotten = self._longest_lost()
            del self._members[forgotten]
        self._members[node] = Member(
            node, incarnation, NodeState.LIVE, now_s, endpoints, stats, dict(labels)
        )
        return forgotten

    def hear(
        self, node: NodeId, incarnation: int, stream: int, sequence: int, now_s: float
    ) -> Hearing:
        """Note a heartbeat, and say how it relates to those before it.

        Streams are numbered in the order in which they were opened. A new one may
        number its heartbeats anew, and what still comes on an older one is stale.
        """
        member = self._members.get(node)
        if member is None or member.incarnation != incarnation:
            return Hearing.STRANGER
        member.heard_s = now_s
        last = member.sequence
        stale = last is not None and stream == member.stream and sequence <= last
        if stream < member.stream or stale:
            return Hearing.DUPLICATE
        member.stream, member.sequence = stream, sequence
        return Hearing.NEXT if last is None or sequence == last + 1 else Hearing.GAP

    def move(self, node: NodeId, state: NodeState) -> None:
        """Change a node's state along TRANSITIONS; Broken for any other change."""
        member = self._members[node]
        if state not in TRANSITIONS[member.state]:
            raise Broken(f"{node} cannot go from {member.state.value} to {state.value}: a bug")
        member.state = state

    def silent(self, now_s: float) -> list[NodeId]:
        """Nodes not yet LOST that were heard for the last time too long ago."""
        return [
            member.node
            for member in self
            if member.state is not NodeState.LOST and now_s - member.heard_s > self._silence_s
        ]

    def excuse(self, now_s: float) -> None:
        """Count everybody's silence from now: it was we who did not listen."""
        for member in self._members.values():
            member.heard_s = now_s

    def check(self) -> None:
        """Broken unless names, incarnations and the limit are as promised."""
        for node, member in self._members.items():
            if node != member.node or member.incarnation <= 0:
                raise Broken(f"the member {node!r} is wrong: {member}; report this")
        if len(self._members) > self._max_nodes:
            raise Broken(f"{len(self._members)} members are over {self._max_nodes}; report this")

    def _longest_lost(self) -> NodeId:
        lost = [member for member in self if member.state is NodeState.LOST]
        if not lost:
            raise Retry(
                f"{len(self._members)} nodes are registered and alive, which is the limit; "
                "stop one first"
            )
        return min(lost, key=lambda member: member.heard_s).node
