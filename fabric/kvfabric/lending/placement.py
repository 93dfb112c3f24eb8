"""Where memory is best taken: pure ranking of nodes for loans, moves and replicas.

A node is judged by its room (free memory, then what colder cache gives), by how near it is,
by its load, and by what it owes. Ranking only suggests: space is reserved at the node itself,
which may say no.
"""

from __future__ import annotations

import enum
import heapq
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvfabric.types import NodeId

ZONE, RACK = "zone", "rack"  # labels of a node
LEND_SHARE = 0.5  # of its capacity a node lends at most, where it does not say
_ROOM_STEPS = 8  # nodes whose room differs by less than a step are taken for equal


class LinkClass(enum.IntEnum):
    """How near two nodes are; smaller is nearer."""

    SELF = 0
    HOST = 1  # memory can be shared
    RACK = 2
    ZONE = 3
    FAR = 4  # or nothing is known of where they stand


# Assumed until a rate was measured: a host's memory, 25 and 10 Gbit/s of Ethernet, and what
# is left of it between zones.
ASSUMED_BYTES_PER_S = {
    LinkClass.SELF: 5_000_000_000,
    LinkClass.HOST: 2_500_000_000,
    LinkClass.RACK: 2_500_000_000,
    LinkClass.ZONE: 1_000_000_000,
    LinkClass.FAR: 300_000_000,
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where a node stands. Empty: unknown, and equal to nothing."""

    node: NodeId
    host: str = ""
    rack: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What placement knows of a node that might take something in."""

    site: Site
    capacity_bytes: int
    free_bytes: int
    evictable_bytes: int = 0  # cache that nobody needs
    lent_bytes: int = 0
    borrowed_bytes: int = 0
    load: float = 0.0  # 0: idle; requests running or waiting, per node
    draining: bool = False
    bytes_per_s: int = 0  # measured between it and who asks; 0: never
    lend_cap_bytes: int | None = None  # None: LEND_SHARE of the capacity
    promised_bytes: int = 0  # what others were told of and has not been seen yet

    @property
    def room_bytes(self) -> int:
        """Free, and what eviction can free."""
        return max(0, self.free_bytes + self.evictable_bytes - self.promised_bytes)

    @property
    def lendable_bytes(self) -> int:
        """Room, as far as its cap lets it lend."""
        cap = self.lend_cap_bytes
        cap = int(self.capacity_bytes * LEND_SHARE) if cap is None else cap
        return max(0, min(self.room_bytes, cap - self.lent_bytes - self.promised_bytes))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Nodes, best first, and why there are none."""

    nodes: list[NodeId] = field(default_factory=list)
    reason: str = ""


def link_class(one: Site, other: Site) -> LinkClass:
    """How near two nodes are. Racks count within one zone only, where both have one."""
    if one.node == other.node:
        return LinkClass.SELF
    if one.host and one.host == other.host:
        return LinkClass.HOST
    if one.rack and one.rack == other.rack and one.zone == other.zone:
        return LinkClass.RACK
    if one.zone and one.zone == other.zone:
        return LinkClass.ZONE
    return LinkClass.FAR


def creditors(
    debtor: Site,
    candidates: Iterable[Candidate],
    size_bytes: int,
    exclude: Iterable[NodeId] = (),
    limit: int = 16,
) -> Ranking:
    """Who could lend `debtor` so much, best first.

    Those that owe come after those that do not: debts in a circle help nobody. One that
    cannot lend all of it comes after those that can, for a loan may be cut.
    """
    unwanted = {debtor.node, *exclude}
    known = [each for each in candidates if each.site.node not in unwanted]
    usable = [each for each in known if not each.draining and each.lendable_bytes > 0]
    ranked = heapq.nsmallest(
        limit,
        usable,
        key=lambda each: (
            each.lendable_bytes < size_bytes,
            each.borrowed_bytes > 0,
            *_merit(debtor, each, each.lendable_bytes, size_bytes),
        ),
    )
    nodes = [each.site.node for each in ranked]
    return Ranking(nodes, "" if nodes else _why_none(known, len(unwanted) - 1))


def destinations(
    source: Site,
    candidates: Iterable[Candidate],
    size_bytes: int,
    exclude: Iterable[NodeId] = (),
    limit: int = 16,
) -> Ranking:
    """Where bytes of `source` could move to, best first; only nodes with room for all of them."""
    unwanted = {source.node, *exclude}
    known = [each for each in candidates if each.site.node not in unwanted]
    usable = [each for each in known if not each.draining and each.room_bytes >= size_bytes]
    ranked = heapq.nsmallest(
        limit, usable, key=lambda each: _merit(source, each, each.room_bytes, size_bytes)
    )
    nodes = [each.site.node for each in ranked]
    if nodes:
        return Ranking(nodes)
    return Ranking(reason=_why_none(known, len(unwanted) - 1, f"{size_bytes:,} bytes"))


def spread(
    holders: Sequence[Site], candidates: Iterable[Candidate], size_bytes: int, count: int
) -> list[NodeId]:
    """Up to `count` further nodes for replicas, as far apart as there are: zones, racks, hosts.

    A node that holds one is not taken again. Where zones run out, racks and then hosts are
    kept apart; among equals the one with most room.
    """
    taken = list(holders)
    left = [
        each
        for each in candidates
        if not each.draining
        and each.room_bytes >= size_bytes
        and all(each.site.node != holder.node for holder in holders)
    ]
    chosen: list[NodeId] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda each: (_shared(each.site, taken), *_room_rank(each)))
        left.remove(best)
        taken.append(best.site)
        chosen.append(best.site.node)
    return chosen


def _merit(
    asker: Site, candidate: Candidate, room_bytes: int, size_bytes: int
) -> tuple[object, ...]:
    """Smaller is better: nothing evicted, near, much room, a fast link, idle; then by lot.

    The lot is another one for each asker, so that askers of one moment do not all go to
    the same node.
    """
    share = room_bytes / candidate.capacity_bytes if candidate.capacity_bytes else 0.0
    near = link_class(asker, candidate.site)
    rate = candidate.bytes_per_s or ASSUMED_BYTES_PER_S[near]
    lot = zlib.crc32(f"{asker.node}\0{candidate.site.node}".encode())
    return (
        candidate.free_bytes - candidate.promised_bytes < size_bytes,
        near,
        -int(share * _ROOM_STEPS),
        -rate.bit_length(),
        candidate.load,
        lot,
    )


def _shared(site: Site, taken: Sequence[Site]) -> tuple[int, int, int]:
    """How many replicas stand in the same zone, rack and host."""
    near = [link_class(site, each) for each in taken]
    return (
        sum(1 for each in taken if site.zone == each.zone and site.zone),
        sum(1 for each in near if each <= LinkClass.RACK),
        sum(1 for each in near if each <= LinkClass.HOST),
    )


def _room_rank(candidate: Candidate) -> tuple[float, NodeId]:
    share = candidate.room_bytes / candidate.capacity_bytes if candidate.capacity_bytes else 0.0
    return -share, candidate.site.node


def _why_none(known: Sequence[Candidate], excluded: int, wanted: str = "anything") -> str:
    others = f"; {excluded} refused or were left out" if excluded > 0 else ""
    if not known:
        return f"there is no other node to ask{others}"
    draining = sum(each.draining for each in known)
    return (
        f"none of {len(known)} nodes has room for {wanted}: {draining} are being drained, "
        f"the others are full or have lent what they may{others}"
    )
