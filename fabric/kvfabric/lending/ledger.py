"""The cluster's books of who owes whom what, as both sides of each loan report it.

Where the sides differ the creditor's word counts: it has set the memory aside, or has not.
The books act on nothing; they find what should be repaid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvfabric.errors import Broken
from kvfabric.lending.loans import COUNTED, TRANSITIONS, Loan, LoanState, from_columns
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

__all__ = [
    "COUNTED",
    "RESTING",
    "TRANSITIONS",
    "Debt",
    "Difference",
    "Entry",
    "Ledger",
    "LoanState",
]

MAX_CYCLES = 64  # circular debts told at once


# Nobody is about to end it.
RESTING = frozenset({LoanState.GRANTED, LoanState.HELD})


class Entry(NamedTuple):
    """Names one loan in the books: one that moves to another creditor is another entry there."""

    debtor: str
    debtor_incarnation: int
    loan: int
    creditor: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A loan of which its two sides, both alive, say different things."""

    entry: Entry
    lent_bytes: int  # as the creditor says, which counts
    borrowed_bytes: int  # as the debtor says


@dataclass(frozen=True, slots=True)
class Debt:
    """What one node owes another, and could repay: loans that nobody is ending yet."""

    debtor: NodeId
    creditor: NodeId
    size_bytes: int


class Ledger:
    """See the module. Knows what each node said last of its loans, as debtor and as creditor."""

    def __init__(self) -> None:
        self._lent: dict[NodeId, dict[Entry, Loan]] = {}  # by creditor, as it says
        self._borrowed: dict[NodeId, dict[Entry, Loan]] = {}  # by debtor, as it says
        self._lent_bytes: dict[NodeId, int] = {}
        self._borrowed_bytes: dict[NodeId, int] = {}
        self._incarnations: dict[NodeId, int] = {}
        self.changes = 0  # grows with every report and loss

    def report(self, node: NodeId, incarnation: int, loans: control_pb2.Loans) -> None:
        """These are all of the node's loans now. Rows that do not name it are ignored.

        Likewise rows of another incarnation than its own. Safe to repeat.
        """
        lent: dict[Entry, Loan] = {}
        borrowed: dict[Entry, Loan] = {}
        for loan in from_columns(loans):
            entry = Entry(loan.debtor, loan.debtor_incarnation, loan.loan, loan.creditor)
            if loan.creditor == node and loan.creditor_incarnation == incarnation:
                lent[entry] = loan
            if loan.debtor == node and loan.debtor_incarnation == incarnation:
                borrowed[entry] = loan
        self._incarnations[node] = incarnation
        self._lent[node], self._borrowed[node] = lent, borrowed
        self._lent_bytes[node] = sum(loan.owed_bytes for loan in lent.values())
        self._borrowed_bytes[node] = sum(loan.owed_bytes for loan in borrowed.values())
        self.changes += 1

    def drop(self, node: NodeId) -> None:
        """The node is gone, and what it said with it. May be repeated.

        What others say of loans with it stays until they say otherwise: as creditors they
        keep the memory aside until the loan's deadline.
        """
        for books in (self._lent, self._borrowed):
            books.pop(node, None)
        for totals in (self._lent_bytes, self._borrowed_bytes, self._incarnations):
            totals.pop(node, None)
        self.changes += 1

    # Questions

    def lent_bytes(self, node: NodeId | None = None) -> int:
        """What a node, or (None) all, lent, by the creditors' own word."""
        if node is None:
            return sum(self._lent_bytes.values())
        return self._lent_bytes.get(node, 0)

    def borrowed_bytes(self, node: NodeId | None = None) -> int:
        """What a node, or (None) all, borrowed, by the debtors' own word."""
        if node is None:
            return sum(self._borrowed_bytes.values())
        return self._borrowed_bytes.get(node, 0)

    def lent(self, node: NodeId | None = None) -> Iterator[Loan]:
        """Loans of one creditor, or of all, as creditors see them; in a settled order."""
        return _loans(self._lent, node)

    def borrowed(self, node: NodeId | None = None) -> Iterator[Loan]:
        """Loans of one debtor, or of all, as debtors see them; in a settled order."""
        return _loans(self._borrowed, node)

    def states(self) -> dict[LoanState, int]:
        """How many loans are in each state, as creditors see them."""
        counts = dict.fromkeys(LoanState, 0)
        for loans in self._lent.values():
            for loan in loans.values():
                counts[loan.state] += 1
        return counts

    def differences(self) -> list[Difference]:
        """Where two living sides disagree: passing while reports are on their way.

        A loan with a node that is gone, or has started anew since, is told with 0 bytes for
        that side.
        """
        found = []
        for entry in sorted(self._entries()):
            lent = self._lent.get(NodeId(entry.creditor), {}).get(entry)
            borrowed = self._borrowed.get(NodeId(entry.debtor), {}).get(entry)
            sides = (lent.owed_bytes if lent else 0, borrowed.owed_bytes if borrowed else 0)
            if sides[0] != sides[1]:
                found.append(Difference(entry, *sides))
        return found

    def debts(self) -> list[Debt]:
        """What each node owes each other by the creditors' word, loans that rest only.

        Debts of nodes that are gone, or have started anew, are left out: nobody repays them.
        So are shards that are only kept where they were: no memory of others was taken.
        """
        owed: dict[tuple[NodeId, NodeId], int] = {}
        for loan in self.lent():
            if (
                loan.state in RESTING
                and not loan.in_place
                and (self._incarnations.get(NodeId(loan.debtor)) == loan.debtor_incarnation)
            ):
                pair = NodeId(loan.debtor), NodeId(loan.creditor)
                owed[pair] = owed.get(pair, 0) + loan.size_bytes
        return [Debt(*pair, size) for pair, size in sorted(owed.items()) if size]

    def cycles(self) -> list[list[Debt]]:
        """Circular debts: in each, what every debtor can repay so that all are better off.

        A debtor's creditor is the next one's debtor; all debts of a cycle have its least
        size. Nobody's debt is told twice over. At most MAX_CYCLES.
        """
        return cycles(self.debts())

    def loans_between(self, debtor: NodeId, creditor: NodeId) -> list[Loan]:
        """The same two nodes' loans that `debts` counts, largest first."""
        loans = [
            loan
            for loan in self._lent.get(creditor, {}).values()
            if loan.debtor == debtor
            and loan.state in RESTING
            and not loan.in_place
            and loan.debtor_incarnation == self._incarnations.get(debtor)
        ]
        return sorted(loans, key=lambda loan: (-loan.size_bytes, loan.id))

    def check(self) -> None:
        """Broken unless totals are those of the loans and every loan is in its own book."""
        for name, books, totals in (
            ("creditor", self._lent, self._lent_bytes),
            ("debtor", self._borrowed, self._borrowed_bytes),
        ):
            if books.keys() != totals.keys():
                raise Broken(f"the ledger's {name}s and their totals are not the same: a bug")
            for node, loans in books.items():
                if totals[node] != sum(loan.owed_bytes for loan in loans.values()):
                    raise Broken(f"{node}'s total as {name} is not that of its loans: a bug")
                if any(getattr(entry, name) != node for entry in loans):
                    raise Broken(f"{node} has somebody else's loan as {name}: a bug")

    def _entries(self) -> set[Entry]:
        books = (*self._lent.values(), *self._borrowed.values())
        return {entry for loans in books for entry in loans}


def cycles(debts: Iterable[Debt], limit: int = MAX_CYCLES) -> list[list[Debt]]:
    """See Ledger.cycles."""
    owed: dict[NodeId, dict[NodeId, int]] = {}
    for debt in debts:
        owed.setdefault(debt.debtor, {})[debt.creditor] = debt.size_bytes
    found: list[list[Debt]] = []
    ended: set[NodeId] = set()  # no cycle goes through these any more
    for start in sorted(owed):
        while start not in ended and len(found) < limit:
            ring = _ring(owed, start, ended)
            if not ring:
                break
            pairs = list(zip(ring, [*ring[1:], ring[0]], strict=True))
            least = min(owed[debtor][creditor] for debtor, creditor in pairs)
            found.append([Debt(debtor, creditor, least) for debtor, creditor in pairs])
            for debtor, creditor in pairs:
                owed[debtor][creditor] -= least
                if not owed[debtor][creditor]:
                    del owed[debtor][creditor]
    return found


def _ring(owed: dict[NodeId, dict[NodeId, int]], start: NodeId, ended: set[NodeId]) -> list[NodeId]:
    """A ring of debtors that a walk from `start` meets, or nothing: then no ring is left there.

    Depth first, and without recursion: a chain of debts may be as long as the cluster.
    """
    path: list[NodeId] = [start]
    places = {start: 0}
    ways = [iter(sorted(owed.get(start, ())))]
    while path:
        creditor = next(ways[-1], None)
        if creditor is None:
            ways.pop()
            node = path.pop()
            del places[node]
            ended.add(node)
        elif creditor in places:
            return path[places[creditor] :]
        elif creditor not in ended:
            places[creditor] = len(path)
            path.append(creditor)
            ways.append(iter(sorted(owed.get(creditor, ()))))
    return []


def _loans(books: dict[NodeId, dict[Entry, Loan]], node: NodeId | None) -> Iterator[Loan]:
    for each in sorted(books) if node is None else (node,):
        loans = books.get(each, {})
        for entry in sorted(loans):
            yield loans[entry]
