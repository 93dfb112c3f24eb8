"""All loans that a node has taken, and where their keys are: its books, and no calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvfabric.lending.loans import COUNTED, Loan
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.lending.debts import INFINITY, PENDING, Debt, Place, Stage
from kvfabric_nodes.lending.terms import Identity
from kvfabric_nodes.store.core import NodeCore

DEBTS = 4096  # loans at a time


class DebtBook:
    """See the module. A key is on its way to one creditor at most, and lent to one at most."""

    def __init__(self, core: NodeCore, me: Identity) -> None:
        self.debts: dict[int, Debt] = {}
        self.going: dict[Place, Debt] = {}  # keys that are ASKED, COMING or THERE
        self.away: dict[Place, Debt] = {}  # keys that are AWAY
        self.discarding: set[Place] = set()  # to be dropped, not kept as cache, when they leave
        self.next_s = INFINITY  # when a loan goes on
        self._core = core
        self._me = me

    # Questions ------------------------------------------------------------------------

    def whereabouts(self, namespace: NamespaceId, key: Key) -> str | None:
        place = (namespace, key)
        debt = self.away.get(place)
        if debt is not None:
            return debt.creditor
        debt = self.going.get(place)
        return debt.creditor if debt is not None and debt.reclaims else None

    def loans(self) -> Iterator[Loan]:
        for debt in self.debts.values():
            yield Loan(
                debt.id,
                self._me.node,
                self._me.incarnation,
                debt.creditor,
                debt.incarnation,
                debt.state,
                len(debt.stages) * debt.batch.slot_bytes,
                in_place=debt.reclaims,
            )

    @property
    def borrowed_bytes(self) -> int:
        return sum(debt.owed_bytes for debt in self.debts.values())

    @property
    def owes(self) -> bool:
        """Whether memory of others is used, not only their cache kept."""
        return any(debt.owed_bytes and not debt.reclaims for debt in self.debts.values())

    @property
    def in_flight(self) -> int:
        """Loans that wait for their bytes; what is claimed in place waits for none."""
        waiting = (Stage.ASKED, Stage.COMING)
        going = [(key, debt) for (_, key), debt in self.going.items() if not debt.reclaims]
        return len({debt.id for key, debt in going if debt.stages[key] in waiting})

    @property
    def promised_bytes(self) -> int:
        """What loans under way will free here, sooner or later."""
        me = self._me.node
        return sum(d.batch.slot_bytes for d in self.going.values() if d.batch.source == me)

    @property
    def freeing_bytes(self) -> int:
        """What they will free soon: without what is under a lease."""
        leased = 0
        for place, debt in self.going.items():
            shard = self._core.shards.get(*place)
            if shard is not None and shard.extent.holders and debt.batch.source == self._me.node:
                leased += debt.batch.slot_bytes
        return self.promised_bytes - leased

    # Changes --------------------------------------------------------------------------

    def add(self, debt: Debt) -> None:
        """A loan that is asked for. A key of it that is away moves from where it is."""
        self.debts[debt.id] = debt
        for key in debt.batch.keys:
            place = (debt.batch.namespace, key)
            debt.stages[key] = Stage.ASKED
            self.going[place] = debt
            lender = self.away.get(place)
            if lender is not None:
                lender.moving.add(key)
                lender.restate()

    def arrived(self, debt: Debt, key: Key, now_s: float) -> None:
        """The creditor's copy is the one; another creditor that has it needs it no more."""
        place = (debt.batch.namespace, key)
        before = self.away.get(place)
        if before is not None:
            self.leave(before, key, now_s, drop=True)
        del self.going[place]
        self.away[place] = debt
        debt.step(key, Stage.AWAY)
        debt.restate()

    def leave(self, debt: Debt, key: Key, now_s: float, *, drop: bool) -> None:
        """The key is needed there no more; without `drop` it may stay as cache, and so does
        what was there before it was lent, unless it is to be discarded."""
        if debt.reclaims and (debt.batch.namespace, key) not in self.discarding:
            drop = False
        if debt.stages[key] is not Stage.LEAVING:
            self._unlist(debt, key)
            debt.step(key, Stage.LEAVING)
            debt.restate()
        if drop:
            debt.dropping.add(key)
        self.touch(debt, now_s)

    def remove(self, debt: Debt, key: Key) -> None:
        """The key is not part of the loan any more."""
        self._unlist(debt, key)
        debt.remove(key)

    def close_if_empty(self, debt: Debt) -> None:
        if not debt.stages:
            debt.to(debt.end)
            del self.debts[debt.id]

    def discard(self, namespace: NamespaceId, keys: Sequence[Key]) -> None:
        places = [(namespace, key) for key in keys]
        self.discarding.update(p for p in places if p in self.away or p in self.going)

    def touch(self, debt: Debt, at_s: float) -> None:
        """It goes on then at the latest."""
        debt.next_s = min(debt.next_s, at_s)
        self.wake(debt)

    def wake(self, debt: Debt) -> None:
        """To be called when its next time may have come nearer."""
        if debt.id in self.debts:
            self.next_s = min(self.next_s, debt.due_s)

    def look_ahead(self) -> None:
        """Finds the next time anew."""
        self.next_s = min((debt.due_s for debt in self.debts.values()), default=INFINITY)

    def _unlist(self, debt: Debt, key: Key) -> None:
        """Out of the indexes, of the moves too."""
        place = (debt.batch.namespace, key)
        if self.going.get(place) is debt:
            del self.going[place]
            lender = self.away.get(place)
            if lender is not None:
                lender.moving.discard(key)
                lender.restate()
        if self.away.get(place) is debt:
            del self.away[place]
        debt.homing.discard(key)
        debt.moving.discard(key)
        if place not in self.going and place not in self.away:
            self.discarding.discard(place)

    def check(self) -> None:
        """Asserts all invariants."""
        assert len(self.debts) <= DEBTS
        going: dict[Place, Debt] = {}
        away: dict[Place, Debt] = {}
        for debt in self.debts.values():
            debt.check()
            assert debt.due_s >= self.next_s
            assert debt.calling or debt.next_s < INFINITY or debt.state in COUNTED
            for key, stage in debt.stages.items():
                place = (debt.batch.namespace, key)
                if stage in PENDING:
                    assert place not in going, "one key is on its way to two creditors"
                    going[place] = debt
                elif stage is Stage.AWAY:
                    assert place not in away, "one key is lent twice"
                    assert self._core.shards.get(*place) is None
                    assert self._core.shards.claims(*place)
                    away[place] = debt
        assert going == self.going
        assert away == self.away
        for place, debt in self.away.items():
            moves = place in going
            assert moves == (place[1] in debt.moving)
            assert not moves or going[place].batch.source == debt.creditor
        assert self.discarding <= going.keys() | away.keys()
