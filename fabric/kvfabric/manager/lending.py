"""The manager's part in lending: keeps the ledger, and tells debtors whom to ask.

It lends nothing itself. What it answers is a suggestion: the creditor reserves the space
or says no, and a debtor goes on to the next.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kvfabric.errors import Conflict, Refused
from kvfabric.lending import placement
from kvfabric.lending.placement import Candidate
from kvfabric.manager.events import Heartbeat
from kvfabric.manager.parts import Cluster
from kvfabric.membership import Member, NodeState
from kvfabric.moves.targets import site
from kvfabric.types import NodeId

MAX_CREDITORS = 16  # named in one answer


@dataclass(frozen=True, slots=True)
class Borrowing:
    """Possible creditors, best first, and why there are none."""

    creditors: list[Member]
    free_bytes: list[int]  # of each, as last heard, with what eviction frees
    reason: str = ""


class Lending:
    """See the module. A part of the core."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        # Bytes for which a node was named first, until it tells anew what it has left: of
        # many who ask at one moment, not all are sent to the same node.
        self._promised: dict[NodeId, int] = {}
        self._known: dict[NodeId, Candidate] = {}  # until the node says something new

    def borrow(
        self,
        node: NodeId,
        incarnation: int,
        size_bytes: int,
        exclude: Collection[NodeId],
        now_s: float,
    ) -> Borrowing:
        """Who could lend `node` so much. Conflict where that start of it is not the known one."""
        if size_bytes <= 0:
            raise Refused(f"{size_bytes} bytes cannot be borrowed; say how many are wanted")
        if self._cluster.members.known_incarnation(node) != incarnation:
            raise Conflict(f"{node}/{incarnation} is not registered here; register, then ask again")
        member = self._cluster.members[node]
        found = self._candidates(node)
        ranking = placement.creditors(site(member), found, size_bytes, exclude, MAX_CREDITORS)
        by_name: dict[NodeId, Candidate] = {each.site.node: each for each in found}
        if ranking.nodes:
            best = ranking.nodes[0]
            self._promised[best] = self._promised.get(best, 0) + size_bytes
            why = f"{size_bytes:,} bytes: {', '.join(ranking.nodes[:3])} could lend"
        else:
            why = f"{size_bytes:,} bytes: {ranking.reason}"
        self._cluster.note(node, "asked to borrow", why, now_s)
        return Borrowing(
            [self._cluster.members[each] for each in ranking.nodes],
            [by_name[each].lendable_bytes for each in ranking.nodes],
            ranking.reason,
        )

    def _candidates(self, asker: NodeId) -> list[Candidate]:
        """All living nodes, with what was promised of them and measured to them."""
        links = self._cluster.links
        peers = links.peers(asker)
        found = []
        for member in self._cluster.members:
            if member.state is NodeState.LOST:
                continue
            node = member.node
            known = self._known.get(node)
            if known is None or known.draining != (node in self._cluster.draining):
                known = self._known[node] = self._cluster.candidate(member)
            if node in self._promised or node in peers:
                known = replace(
                    known,
                    promised_bytes=self._promised.get(node, 0),
                    bytes_per_s=int(links.rate(asker, node)),
                )
            found.append(known)
        return found

    def heard(self, member: Member, event: Heartbeat, now_s: float) -> None:
        if event.loans is not None:
            self._cluster.ledger.report(event.node, event.incarnation, event.loans)
        if event.links:
            self._cluster.links.measured(event.node, event.links)
        if event.stats is not None:
            self._promised.pop(event.node, None)
        if event.stats is not None or event.loans is not None:
            self._known.pop(event.node, None)

    def lost(self, node: NodeId, now_s: float) -> None:
        self._cluster.ledger.drop(node)
        self._cluster.links.forget(node)
        self._promised.pop(node, None)
        self._known.pop(node, None)

    def tick(self, now_s: float) -> None:
        """Nothing: the ledger changes by reports only."""

    def check(self) -> None:
        self._cluster.ledger.check()
        self._cluster.links.check()
