"""Lent shards that have to leave their creditor: brought home, or lent to another one.

The creditor says how much it wants back and until when; what has not moved by then it
takes, and that is its right. A key leaves the creditor only when the next copy is there
and seen.
"""

from __future__ import annotations

from dataclasses import replace

from kvfabric.lending.loans import LoanState
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric.types import Key
from kvfabric_nodes.copying.pulls import PullOrder
from kvfabric_nodes.lending.debt_book import DebtBook
from kvfabric_nodes.lending.debts import INFINITY, PENDING, Batch, Debt, Stage
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.room import Rooms
from kvfabric_nodes.lending.rounds import Round
from kvfabric_nodes.lending.seeking import LOAN_KEYS, Seeker
from kvfabric_nodes.lending.terms import Identity
from kvfabric_nodes.lending.transit import Cargo, Transit
from kvfabric_nodes.store.core import NodeCore

RECALL_S = 10.0  # a recall of which nothing more is heard for so long is over


class Mover:
    """See the module. `go_on` is called after every event."""

    def __init__(
        self,
        core: NodeCore,
        me: Identity,
        post: Post,
        transit: Transit,
        rooms: Rooms,
        book: DebtBook,
        seeker: Seeker,
    ) -> None:
        self._core = core
        self._me = me
        self._post = post
        self._transit = transit
        self._rooms = rooms
        self._book = book
        self._seeker = seeker
        self._recalls: dict[int, Round | None] = {}  # loans, and whom else to ask for them

    def recalled(self, request: node_pb2.RecallLoanRequest, now_s: float) -> None:
        """The creditor wants so much of a loan back; said again, the last word counts."""
        debt = self._book.debts.get(request.loan)
        if (
            debt is None
            or debt.creditor != request.creditor
            or debt.incarnation != request.creditor_incarnation
        ):
            return  # not ours, or no more: the creditor ends it by itself
        if debt.keep_bytes is None:
            debt.stays_out = False
            for key in debt.having(*PENDING, Stage.AWAY):
                place = (debt.batch.namespace, key)
                self._core.story.note(now_s, *place, "recalled", f"by {debt.creditor}")
        debt.keep_bytes = max(0, debt.owed_bytes - request.size_bytes)
        debt.recall_s = now_s + min(RECALL_S, request.deadline_ms / 1000)
        debt.restate()
        self._recalls.setdefault(debt.id, None)
        self._book.touch(debt, debt.next_s)

    def bring_home(self, command: control_pb2.Command.BringHome, why: str, now_s: float) -> None:
        """The manager's wish; as much as there is room for."""
        debt = self._book.debts.get(command.loan)
        if debt is None or debt.state is not LoanState.HELD:
            return
        keys = debt.having(Stage.AWAY)
        if command.size_bytes:
            keys = keys[: -(-command.size_bytes // debt.batch.slot_bytes)]
        self._fetch(debt, keys, why or "the manager asks", now_s)

    def go_on(self, now_s: float) -> None:
        for loan, search in list(self._recalls.items()):
            debt = self._book.debts.get(loan)
            if debt is None:
                del self._recalls[loan]
            elif now_s >= debt.recall_s or not self._move(debt, search, now_s):
                del self._recalls[loan]
                self._end(debt, now_s)

    def check(self) -> None:
        """Asserts all invariants."""
        for debt in self._book.debts.values():
            assert (debt.keep_bytes is not None) == (debt.id in self._recalls)

    def _move(self, debt: Debt, search: Round | None, now_s: float) -> bool:
        """Goes on with what is recalled; whether there is any left."""
        assert debt.keep_bytes is not None
        slot = debt.batch.slot_bytes
        for key in debt.having(*PENDING):
            if debt.staying_bytes > debt.keep_bytes and self._elsewhere(debt, key):
                self._book.leave(debt, key, now_s, drop=True)
        over = debt.staying_bytes - debt.keep_bytes
        if over <= 0:
            return False
        over -= (len(debt.homing) + len(debt.moving)) * slot
        if over > 0 and not debt.stays_out and not self._rooms:
            over -= slot * self._fetch(debt, _idle(debt)[: -(-over // slot)], "recalled", now_s)
            debt.stays_out = over > 0
        if over <= 0 or not (debt.stays_out or self._rooms):
            return True
        if search is None or search.old(now_s):
            search = self._seeker.search((debt.creditor,), now_s)
            self._recalls[debt.id] = search
        why = f"recalled by {debt.creditor}"
        self._seeker.spread(search, over, lambda size: self._pick(debt, size), why, now_s)
        return True

    def _elsewhere(self, debt: Debt, key: Key) -> bool:
        """Whether the bytes lie somewhere else still: here, or where they were lent before."""
        place = (debt.batch.namespace, key)
        return self._core.shards.get(*place) is not None or place in self._book.away

    def _end(self, debt: Debt, now_s: float) -> None:
        """All is on its way back, or its time is over: what the creditor took, it tells."""
        late = now_s >= debt.recall_s
        debt.keep_bytes = None
        debt.recall_s = INFINITY
        debt.doubtful = debt.doubtful or late
        debt.restate()
        self._book.touch(debt, now_s)

    def _pick(self, debt: Debt, size_bytes: int) -> Batch | None:
        """What is to be copied from one creditor to another."""
        most = min(LOAN_KEYS, max(1, size_bytes // debt.batch.slot_bytes))
        keys = _idle(debt)[:most]
        if not keys:
            return None
        return replace(debt.batch, keys=keys, source=debt.creditor, endpoints=debt.endpoints)

    def _fetch(self, debt: Debt, keys: list[Key], why: str, now_s: float) -> int:
        """Orders keys home; how many there is room for."""
        if not keys:
            return 0
        batch = debt.batch
        cargo = Cargo(
            batch.namespace,
            batch.tenant,
            dict.fromkeys(keys, batch.size_bytes),
            batch.layers,
            debt.creditor,
            debt.endpoints,
            debt.id,
            f"home from {debt.creditor}: {why}",
        )

        def ended(order: PullOrder, why: str, at_s: float) -> None:
            left = debt.homing & set(order.keys)  # those that did not come
            debt.homing -= left
            debt.stays_out = debt.stays_out or bool(left)
            if debt.id in self._book.debts:
                debt.restate()

        _, grants = self._transit.fetch(cargo, ended, now_s)
        granted = [key for key, grant in grants.items() if grant.extent is not None]
        debt.homing.update(granted)
        debt.restate()
        return len(granted)


def _idle(debt: Debt) -> list[Key]:
    """Lent keys that are not on their way elsewhere yet."""
    taken = debt.homing | debt.moving
    return [key for key in debt.having(Stage.AWAY) if key not in taken]
