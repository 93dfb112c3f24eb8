"""Debts that should end before their sequences do: circles, creditors in need, room at home.

Debtors are asked to bring home, which costs nothing but the copy. A creditor recalls only
where the debtor has somebody else to go to: a recall that finds no room loses what was lent.
"""

from __future__ import annotations

from collections.abc import Callable

from kvfabric.lending import placement
from kvfabric.lending.ledger import Debt
from kvfabric.lending.loans import Loan
from kvfabric.manager import sites
from kvfabric.manager.events import Heartbeat
from kvfabric.manager.parts import Cluster
from kvfabric.membership import Member
from kvfabric.moves.targets import site
from kvfabric.rpc.v1.control_pb2 import Command
from kvfabric.types import NodeId

LOOK_S = 2.0  # between two looks at the books
AGAIN_S = 15.0  # until the same debt is asked for again
CIRCLE_RECALL_S = 30.0  # a circle that bringing home did not end by then is recalled
RECALL_DEADLINE_MS = 30_000
REPAY_BYTES = 256 * 1024 * 1024  # of one debt at a time: the rest follows when this is done
NEED_SHARE = 0.05  # a creditor with less room than this, and a queue, wants its memory back
HOME_SHARE = 0.30  # room that a debtor keeps after what it brings home

Waiting = Callable[[NodeId], int]
"""How many requests wait at a node."""


class Repaying:
    """See the module. A part of the core."""

    def __init__(self, cluster: Cluster, waiting: Waiting) -> None:
        self._cluster = cluster
        self._waiting = waiting
        self._looked_s: float | None = None
        self._asked_s: dict[tuple[NodeId, NodeId], float] = {}  # (debtor, creditor)
        self._circles_s: dict[frozenset[NodeId], float] = {}  # since when each is known

    def heard(self, member: Member, event: Heartbeat, now_s: float) -> None:
        """Nothing: the ledger has it."""

    def lost(self, node: NodeId, now_s: float) -> None:
        for pair in [each for each in self._asked_s if node in each]:
            del self._asked_s[pair]

    def tick(self, now_s: float) -> None:
        if self._looked_s is not None and now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        self._asked_s = {
            pair: at_s for pair, at_s in self._asked_s.items() if now_s - at_s < AGAIN_S
        }
        debts = self._cluster.ledger.debts()
        if not debts:
            self._circles_s.clear()
            return
        self._end_circles(now_s)
        for debt in debts:
            self._help_creditor(debt, now_s)
            self._come_home(debt, now_s)

    def check(self) -> None:
        """Nothing is kept that could be wrong."""

    def _end_circles(self, now_s: float) -> None:
        circles = self._cluster.ledger.cycles()
        known = {frozenset(debt.debtor for debt in circle): circle for circle in circles}
        self._circles_s = {nodes: self._circles_s.get(nodes, now_s) for nodes in known}
        for nodes, circle in known.items():
            names = " owes ".join([*(debt.debtor for debt in circle), circle[0].debtor])
            why = f"a circle of debts: {names}"
            if now_s - self._circles_s[nodes] >= CIRCLE_RECALL_S:
                self._recall(circle[0], circle[0].size_bytes, why, now_s, without=nodes)
                continue
            for debt in circle:
                self._bring_home(debt, debt.size_bytes, why, now_s)

    def _help_creditor(self, debt: Debt, now_s: float) -> None:
        """A creditor with a queue and no room, whose debtor can go elsewhere."""
        waiting = self._waiting(debt.creditor)
        if not waiting or not self._cluster.alive(debt.creditor):
            return
        tier = sites.memory(self._cluster.members[debt.creditor])
        room = tier.free_bytes + sites.evictable_bytes(tier)
        if room >= NEED_SHARE * tier.capacity_bytes:
            return
        why = f"{waiting} requests wait at {debt.creditor}, which has {room:,} bytes of room"
        self._recall(debt, REPAY_BYTES, why, now_s, without=frozenset())

    def _come_home(self, debt: Debt, now_s: float) -> None:
        """A debtor that has room again, and nobody waiting."""
        if self._waiting(debt.debtor) or not self._cluster.alive(debt.debtor):
            return
        if debt.debtor in self._cluster.draining:
            return
        tier = sites.memory(self._cluster.members[debt.debtor])
        spare = int(tier.free_bytes - HOME_SHARE * tier.capacity_bytes)
        if spare > 0:
            why = f"{debt.debtor} has {tier.free_bytes:,} bytes free again"
            self._bring_home(debt, spare, why, now_s)

    def _bring_home(self, debt: Debt, size_bytes: int, why: str, now_s: float) -> None:
        loan = self._next_loan(debt, now_s)
        if loan is None:
            return
        size_bytes = min(size_bytes, loan.size_bytes, REPAY_BYTES)
        what = Command.BringHome(loan=loan.loan, size_bytes=size_bytes)
        if self._cluster.order(debt.debtor, Command(why=why, bring_home=what), now_s):
            self._asked_s[debt.debtor, debt.creditor] = now_s

    def _recall(
        self, debt: Debt, size_bytes: int, why: str, now_s: float, without: frozenset[NodeId]
    ) -> None:
        loan = self._next_loan(debt, now_s)
        if loan is None or not self._cluster.alive(debt.debtor):
            return
        size_bytes = min(size_bytes, loan.size_bytes, REPAY_BYTES)
        debtor = self._cluster.members[debt.debtor]
        others = placement.creditors(
            site(debtor),
            self._cluster.candidates(),
            size_bytes,
            {debt.creditor, *without},
        )
        if not others.nodes:
            return
        what = Command.Recall(
            debtor=debt.debtor,
            endpoints=debtor.endpoints,
            loan=loan.loan,
            size_bytes=size_bytes,
            deadline_ms=RECALL_DEADLINE_MS,
        )
        if self._cluster.order(debt.creditor, Command(why=why, recall=what), now_s):
            self._asked_s[debt.debtor, debt.creditor] = now_s

    def _next_loan(self, debt: Debt, now_s: float) -> Loan | None:
        """The largest loan of a debt that was not asked for lately."""
        if (debt.debtor, debt.creditor) in self._asked_s:
            return None
        loans = self._cluster.ledger.loans_between(debt.debtor, debt.creditor)
        return loans[0] if loans else None
