"""What the core's parts share, and how the core tells them what happens.

The ledger, the planner, moves, replicas and policies are parts: each follows one concern,
reads what all know of the cluster, and acts by posting commands only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from kvfabric.directory import Directory
from kvfabric.lending.ledger import Ledger
from kvfabric.lending.placement import Candidate, Site
from kvfabric.manager import sites
from kvfabric.manager.events import Heartbeat
from kvfabric.manager.journal import Journal, JournalEvent
from kvfabric.manager.links import Links
from kvfabric.manager.orders import Orders
from kvfabric.membership import Member, Membership, NodeState
from kvfabric.moves.targets import site
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NamespaceId, NodeId


@dataclass(frozen=True, slots=True)
class Cluster:
    """What all parts may read. `orders`, `journal` and `draining` are theirs to write too."""

    members: Membership
    directory: Directory
    orders: Orders = field(default_factory=Orders)
    journal: Journal = field(default_factory=Journal)
    # Nodes that take nothing new in: written by who keeps policies, told to the nodes.
    draining: set[NodeId] = field(default_factory=set)
    ledger: Ledger = field(default_factory=Ledger)
    links: Links = field(default_factory=Links)

    def order(self, node: NodeId, command: control_pb2.Command, now_s: float) -> int:
        """Post a command and remember it with its reason. Returns its id, 0: no room."""
        number = self.orders.post(node, command)
        if number:
            kind = command.WhichOneof("what") or ""
            what = f"told to {kind.replace('_', ' ')}"
            meant: Any = getattr(command, kind)
            keys: bytes = getattr(meant, "keys", b"")
            namespace = NamespaceId(meant.namespace_id) if keys else None
            self.note(node, what, command.why, now_s, namespace, keys)
        return number

    def note(
        self,
        node: NodeId,
        what: str,
        why: str,
        now_s: float,
        namespace: NamespaceId | None = None,
        keys: bytes = b"",
    ) -> None:
        """Remember something for `explain`: of a node, or of keys (32 bytes each) on it."""
        self.journal.note(JournalEvent(now_s, node, what, why, namespace, keys))

    def alive(self, node: NodeId) -> bool:
        """Whether the node is known and was heard lately."""
        return self.members.known_incarnation(node) != 0 and (
            self.members[node].state is not NodeState.LOST
        )

    def candidates(self) -> list[Candidate]:
        """Every living node as placement sees it, in the order of their names."""
        return [
            self.candidate(member) for member in self.members if member.state is not NodeState.LOST
        ]

    def site(self, node: NodeId) -> Site:
        """Where a node stands; of an unknown one nothing but its name."""
        if self.members.known_incarnation(node):
            return site(self.members[node])
        return Site(node)

    def candidate(self, member: Member) -> Candidate:
        """One node as placement sees it, without promises and links."""
        tier = sites.memory(member)
        return Candidate(
            site(member),
            tier.capacity_bytes,
            tier.free_bytes,
            sites.evictable_bytes(tier),
            lent_bytes=self.ledger.lent_bytes(member.node),
            borrowed_bytes=self.ledger.borrowed_bytes(member.node),
            load=sites.load(member),
            draining=member.node in self.draining,
            lend_cap_bytes=sites.lend_cap_bytes(member),
        )


class Part(Protocol):
    """Something that the core tells what happens. Its methods must be quick and never raise."""

    def heard(self, member: Member, event: Heartbeat, now_s: float) -> None:
        """A heartbeat was taken in, and the directory has what it said.

        Not called for duplicates and strangers. The protos in `event` are the message's own:
        copy what is to be kept.
        """

    def lost(self, node: NodeId, now_s: float) -> None:
        """What this node was is gone: it fell silent, or it started anew, empty."""

    def tick(self, now_s: float) -> None:
        """Time has passed: several times a second, after losses were told."""

    def check(self) -> None:
        """Broken unless its invariants hold."""
