"""In which order the replicas of a key are named to somebody who asks for it."""

from __future__ import annotations

from collections.abc import Iterable

from kvfabric.directory import Place, Replica
from kvfabric.lending.placement import LinkClass, Site, link_class
from kvfabric.manager import sites
from kvfabric.manager.parts import Cluster
from kvfabric.moves.targets import site
from kvfabric.types import NodeId


def best_first(cluster: Cluster, asker: NodeId | None, places: Iterable[Place]) -> list[Place]:
    """Each place with its replicas nearest first, then by tier, then the least busy node.

    Without an asker all nodes are equally far.
    """
    near: dict[NodeId, tuple[LinkClass, float]] = {}
    here = cluster.site(asker) if asker is not None else None

    def rank(replica: Replica) -> tuple[LinkClass, int, float, NodeId]:
        node = replica.node
        if node not in near:
            near[node] = _nearness(cluster, here, node)
        distance, load = near[node]
        return distance, replica.tier, load, node

    return [tuple(sorted(place, key=rank)) if len(place) > 1 else place for place in places]


def _nearness(cluster: Cluster, here: Site | None, node: NodeId) -> tuple[LinkClass, float]:
    if not cluster.members.known_incarnation(node):
        return LinkClass.FAR, 0.0
    member = cluster.members[node]
    distance = link_class(here, site(member)) if here is not None else LinkClass.FAR
    return distance, sites.load(member)
