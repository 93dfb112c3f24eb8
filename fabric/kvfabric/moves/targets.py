"""Where shards should go to: placement asked with what the nodes said of themselves last."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from kvfabric.lending import placement
from kvfabric.lending.placement import Candidate, Site
from kvfabric.membership import Member
from kvfabric.moves import sight
from kvfabric.types import NodeId

FRESH_S = 0.25  # so long what was gathered of all nodes, and ranked, is used again
CHOICES = 8  # best nodes that are told; the asker may find some of them busy

_Shared = tuple[bool, bool, bool]  # a zone, a rack, a host
_Question = tuple[NodeId, frozenset[NodeId], int, frozenset[NodeId], bool]


class Targets:
    """See the module."""

    def __init__(self, cluster: sight.Cluster, coming_bytes: Callable[[NodeId], int]) -> None:
        """`coming_bytes`: what is on its way to a node, and not yet in what it says of itself."""
        self._cluster = cluster
        self._coming_bytes = coming_bytes
        self._fresh_s = float("-inf")
        # Emptiest first, by free memory, and with what colder cache gives.
        self._emptiest: list[list[Candidate]] = [[], []]
        self._ranked: dict[_Question, list[NodeId]] = {}

    def best(
        self,
        source: NodeId,
        holders: Collection[NodeId],
        size_bytes: int,
        now_s: float,
        *,
        exclude: Collection[NodeId] = (),
        evict: bool = False,
    ) -> list[NodeId]:
        """Up to CHOICES nodes that have room, best first; with `evict` that of colder cache too.

        Where `holders` keep replicas, best is farthest from them: another zone, else another
        rack, else another host; all that are told are equally far, for who finds the best busy
        should wait rather than put two replicas together. Else it is what placement finds best
        for `source`.
        """
        if now_s - self._fresh_s >= FRESH_S:
            self._gather(now_s)
        question = (source, frozenset(holders), size_bytes, frozenset(exclude), evict)
        ranked = self._ranked.get(question)
        if ranked is None:
            ranked = self._ranked[question] = self._rank(*question)
        return [node for node in ranked if sight.takes(self._cluster, node)]

    def _gather(self, now_s: float) -> None:
        self._fresh_s = now_s
        self._ranked.clear()
        nodes = sight.takers(self._cluster)
        found = [self._candidate(self._cluster.members[node]) for node in nodes]
        self._emptiest = [sorted(found, key=_free_share), sorted(found, key=_room_share)]

    def _rank(
        self,
        source: NodeId,
        holders: frozenset[NodeId],
        size_bytes: int,
        exclude: frozenset[NodeId],
        evict: bool,
    ) -> list[NodeId]:
        wrong = {*exclude, *holders, source}
        fit = (
            each
            for each in self._emptiest[evict]
            if each.site.node not in wrong
            and (each.room_bytes if evict else _free_bytes(each)) >= size_bytes
        )
        if holders:
            return self._apart(holders, fit)
        here = self._site(source)
        return placement.destinations(here, fit, size_bytes, limit=CHOICES).nodes

    def _apart(self, holders: frozenset[NodeId], fit: Iterable[Candidate]) -> list[NodeId]:
        """The first of those that share least with the holders."""
        sites = [self._site(node) for node in holders]
        zones = {each.zone for each in sites if each.zone}
        racks = {(each.zone, each.rack) for each in sites if each.rack}
        hosts = {each.host for each in sites if each.host}
        alike: dict[_Shared, list[NodeId]] = {}
        for each in fit:
            here = each.site
            shared = (here.zone in zones, (here.zone, here.rack) in racks, here.host in hosts)
            found = alike.setdefault(shared, [])
            if len(found) < CHOICES:
                found.append(here.node)
            elif not any(shared):
                break
        return alike[min(alike)] if alike else []

    def _candidate(self, known: Member) -> Candidate:
        tiers = known.stats.tiers
        return Candidate(
            site(known),
            sight.capacity_bytes(known),
            sight.free_bytes(known),
            sum(max(0, tier.held_bytes - tier.claimed_bytes) for tier in tiers),
            load=float(known.stats.leases + known.stats.reservations),
            promised_bytes=self._coming_bytes(known.node),
        )

    def _site(self, node: NodeId) -> Site:
        known = sight.member(self._cluster, node)
        return site(known) if known else Site(node)


def site(known: Member) -> Site:
    """Where a node stands, by what it said of itself."""
    labels = known.labels
    return Site(
        known.node,
        known.endpoints.host,
        labels.get(placement.RACK, ""),
        labels.get(placement.ZONE, ""),
    )


def _free_bytes(candidate: Candidate) -> int:
    return candidate.free_bytes - candidate.promised_bytes


def _free_share(candidate: Candidate) -> tuple[float, NodeId]:
    return -_free_bytes(candidate) / max(1, candidate.capacity_bytes), candidate.site.node


def _room_share(candidate: Candidate) -> tuple[float, NodeId]:
    return -candidate.room_bytes / max(1, candidate.capacity_bytes), candidate.site.node
