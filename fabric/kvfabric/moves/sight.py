"""What those who move shards see of the cluster, and the little that they may do to it.

The manager's own `Cluster` is one; tests make small ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from kvfabric.directory import Directory, Place
from kvfabric.lending import placement
from kvfabric.membership import Member, Membership, NodeState
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

FULL = 0.85  # a node that is fuller than this evicts soon: nothing is sent there unasked
DEFAULT_SHARD_BYTES = 1024 * 1024  # where a node says nothing of its shards


class Subject(NamedTuple):
    """A key, and where it means something."""

    namespace: NamespaceId
    key: Key


class Withdrawing(Protocol):
    """The queue of commands, as far as it matters here."""

    def withdraw(self, ids: Iterable[int]) -> None:
        """These are no longer wanted; those already taken cannot be called back."""


class Cluster(Protocol):
    """See the module. Commands are repeatable; their effect is seen in the directory."""

    @property
    def members(self) -> Membership: ...
    @property
    def directory(self) -> Directory: ...
    @property
    def draining(self) -> set[NodeId]: ...
    @property
    def orders(self) -> Withdrawing: ...

    def order(self, node: NodeId, command: control_pb2.Command, now_s: float) -> int:
        """Post a command. Returns its id, 0: no room, try again later."""

    def note(
        self,
        node: NodeId,
        what: str,
        why: str,
        now_s: float,
        namespace: NamespaceId | None = None,
        keys: bytes = b"",
    ) -> None:
        """Remember something for `explain`."""


def member(cluster: Cluster, node: NodeId) -> Member | None:
    return cluster.members[node] if cluster.members.known_incarnation(node) else None


def live(cluster: Cluster, node: NodeId) -> bool:
    """Whether what the directory says of the node is to be believed."""
    known = member(cluster, node)
    return known is not None and known.state is NodeState.LIVE


def takes(cluster: Cluster, node: NodeId) -> bool:
    """Whether shards may be sent to the node."""
    return live(cluster, node) and node not in cluster.draining


def away(cluster: Cluster, node: NodeId) -> bool:
    """Whether nothing can be hoped of the node: it is lost, or being emptied."""
    known = member(cluster, node)
    return known is None or known.state is NodeState.LOST or node in cluster.draining


def takers(cluster: Cluster) -> list[NodeId]:
    return [
        each.node
        for each in cluster.members
        if each.state is NodeState.LIVE and each.node not in cluster.draining
    ]


def keepers(cluster: Cluster, place: Place, *, but: NodeId | None = None) -> set[NodeId]:
    """The nodes of a place on which a copy counts: alive, believed, and not being emptied."""
    nodes = {replica.node for replica in place}
    return {node for node in nodes if node != but and takes(cluster, node)}


def places(cluster: Cluster, namespace: NamespaceId, keys: list[Key]) -> dict[Place, list[Key]]:
    """The keys, by where they lie; those that are nowhere lie at ()."""
    located = cluster.directory.locate(namespace, keys, prefix=False)
    everywhere = [*located.places, ()]
    found: dict[Place, list[Key]] = {}
    for key, index in zip(keys, located.indices, strict=True):
        found.setdefault(everywhere[index], []).append(key)
    return found


def one_of(holders: Collection[NodeId], key: Key) -> NodeId:
    """One of the holders, another one for other keys."""
    return sorted(holders)[key[0] % len(holders)]


def zones(cluster: Cluster, nodes: Iterable[NodeId]) -> int:
    """Over how many zones these nodes stand; one that tells no zone is a zone of its own."""
    return len({cluster.members[node].labels.get(placement.ZONE) or node for node in nodes})


def capacity_bytes(known: Member) -> int:
    return sum(tier.capacity_bytes for tier in known.stats.tiers)


def free_bytes(known: Member) -> int:
    return sum(tier.free_bytes for tier in known.stats.tiers)


def used_bytes(known: Member) -> int:
    """Held, reserved and quarantined."""
    return sum(
        tier.held_bytes + tier.reserved_bytes + tier.quarantined_bytes for tier in known.stats.tiers
    )


def fill(known: Member) -> float:
    """The share of its memory that is in use, from 0 to 1; 1 for a node without any."""
    size_bytes = capacity_bytes(known)
    return 1 - free_bytes(known) / size_bytes if size_bytes else 1.0


def shard_bytes(cluster: Cluster, node: NodeId) -> int:
    """What a shard of this node takes on average, as it said last."""
    known = member(cluster, node)
    shards = sum(tier.shards for tier in known.stats.tiers) if known else 0
    if known is None or not shards:
        return DEFAULT_SHARD_BYTES
    return max(1, sum(tier.held_bytes for tier in known.stats.tiers) // shards)
