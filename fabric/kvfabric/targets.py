"""Where shards should go to: placement asked with what the nodes said of themselves last."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvfabric import placement, sight
from kvfabric.membership import Member
from kvfabric.placement import Candidate, LinkClass, Site, link_class
from kvfabric.types import NodeId

FRESH_S = 0.25  # so long what was gathered of all nodes is used again
CHOICES = 8  # best nodes that are told; the asker may find some of them busy


class Targets:
    """See the module."""

    def __init__(self, cluster: sight.Cluster) -> None:
        self._cluster = cluster
        self._gathered: dict[bool, tuple[float, list[Candidate]]] = {}

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

        Where `holders` keep replicas already, best is farthest from them: another zone, else
        another rack, else another host. Else it is what placement finds best for `source`.
        """
        wrong = {*exclude, *holders, source}
        candidates = [
            each for each in self._candidates(now_s, evict) if each.site.node not in wrong
        ]
        if holders:
            sites = [self._site(node) for node in sorted(holders)]
            found = placement.spread(sites, candidates, size_bytes, CHOICES)
            # Whoever finds the best busy waits for it, rather than to put two replicas together.
            near = [self._near(node, sites) for node in found]
            return [node for node, each in zip(found, near, strict=True) if each == near[0]]
        ranking = placement.destinations(self._site(source), candidates, size_bytes, limit=CHOICES)
        return ranking.nodes

    def _candidates(self, now_s: float, evict: bool) -> list[Candidate]:
        at_s, found = self._gathered.get(evict, (float("-inf"), []))
        if now_s - at_s >= FRESH_S:
            nodes = sight.takers(self._cluster)
            found = [_candidate(self._cluster.members[node], evict) for node in nodes]
            self._gathered[evict] = (now_s, found)
            return found
        return [each for each in found if sight.takes(self._cluster, each.site.node)]

    def _near(self, node: NodeId, holders: Sequence[Site]) -> tuple[bool, bool]:
        """Whether a node shares a zone, and a rack or host, with one of the holders."""
        here = self._site(node)
        zones = {each.zone for each in holders if each.zone}
        return here.zone in zones, any(link_class(here, each) <= LinkClass.RACK for each in holders)

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


def _candidate(known: Member, evict: bool) -> Candidate:
    tiers = known.stats.tiers
    unclaimed_bytes = sum(max(0, tier.held_bytes - tier.claimed_bytes) for tier in tiers)
    return Candidate(
        site(known),
        sight.capacity_bytes(known),
        sight.free_bytes(known),
        unclaimed_bytes if evict else 0,
    )
