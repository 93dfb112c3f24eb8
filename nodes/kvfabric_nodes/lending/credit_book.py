"""All loans that a node has given, and the keys it keeps for them: its books, and no calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvfabric.errors import Conflict
from kvfabric.lending.loans import COUNTED, Loan, LoanId, LoanState, move
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.lending.transit import Transit
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.shards import Shard

LOANS = 4096  # lent at a time
ENDED_LOANS = 8192  # remembered, so that a late message does not raise them again
DEBTORS = 4096  # whose incarnation is remembered

INFINITY = float("inf")


@dataclass(slots=True, eq=False)
class Credit:
    """A loan as its creditor sees it."""

    id: LoanId
    namespace: NamespaceId
    tenant: str
    endpoints: types_pb2.Endpoints  # the debtor's
    expires_s: float
    in_place: bool = False  # its keys were here before
    state: LoanState = LoanState.REQUESTED
    reason: str = ""  # why some keys are not lent
    keys: dict[Key, int] = field(default_factory=dict)  # with their slots' bytes
    coming: set[Key] = field(default_factory=set)  # those whose bytes are not here yet
    unwanted: set[Key] = field(default_factory=set)  # returned on their way: not to stay as cache
    size_bytes: int = 0
    order_id: int = 0  # of the fetch under way
    keep_bytes: int | None = None  # while recalled: what may stay
    recall_s: float = INFINITY  # when the rest is given up
    call_s: float = INFINITY  # when to say so again

    @property
    def debtor(self) -> str:
        return self.id[0]

    @property
    def recalled_bytes(self) -> int:
        return 0 if self.keep_bytes is None else max(0, self.size_bytes - self.keep_bytes)

    @property
    def due_s(self) -> float:
        return min(self.expires_s, self.recall_s, self.call_s)

    @property
    def stands(self) -> LoanState:
        """The state that its keys make."""
        if self.keep_bytes is not None:
            return LoanState.RECALLED
        return LoanState.GRANTED if self.coming else LoanState.HELD


class CreditBook:
    """See the module."""

    def __init__(self, core: NodeCore, me: Identity, terms: Terms, transit: Transit) -> None:
        self.all: dict[LoanId, Credit] = {}
        self.ended: dict[LoanId, None] = {}
        self.lent_bytes = 0
        self.next_s = INFINITY  # when one has a deadline
        self._core = core
        self._me = me
        self._terms = terms
        self._transit = transit
        self._by_key: dict[tuple[NamespaceId, Key], list[Credit]] = {}
        self._debtors: dict[str, int] = {}  # their newest incarnation
        core.on_sealed.append(self._sealed)
        core.on_dropped.append(self._dropped)

    # Questions ------------------------------------------------------------------------

    def holds(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether this key is here for a debtor: it must not be lent on."""
        return (namespace, key) in self._by_key

    def freeing_bytes(self, credit: Credit) -> int:
        """What its end would free: nothing of what is needed here, too, and a part of what
        others have borrowed as well."""
        freed = 0
        for key, slot_bytes in credit.keys.items():
            place = (credit.namespace, key)
            debtors = len(self._by_key[place])
            if self._core.shards.claims(*place) == debtors:
                freed += slot_bytes // debtors
        return freed

    def loans(self) -> Iterator[Loan]:
        me = self._me
        for credit in self.all.values():
            debtor, incarnation, number = credit.id
            yield Loan(
                number,
                debtor,
                incarnation,
                me.node,
                me.incarnation,
                credit.state,
                credit.size_bytes,
                credit.in_place,
            )

    def due_s(self) -> float:
        return self.next_s

    # Changes --------------------------------------------------------------------------

    def meet(self, debtor: str, incarnation: int, now_s: float) -> None:
        """Ends what a debtor borrowed before it was started anew; refuses who it was before."""
        known = self._debtors.get(debtor, 0)
        if incarnation < known:
            raise Conflict(
                f"{debtor} is incarnation {known} by now, and {incarnation} has no loans here"
            )
        if incarnation == known:
            return
        for credit in [c for c in self.all.values() if c.debtor == debtor]:
            self.end(credit, LoanState.VOID, f"{debtor} was started anew", now_s)
        self._debtors.pop(debtor, None)
        self._debtors[debtor] = incarnation
        if len(self._debtors) > DEBTORS:
            owing = {credit.debtor for credit in self.all.values()} | {debtor}
            idle = (name for name in self._debtors if name not in owing)
            self._debtors.pop(next(idle, ""), None)

    def newer(self, debtor: str, incarnation: int) -> bool:
        """Whether this is a later life of a debtor that is known."""
        return incarnation > self._debtors.get(debtor, incarnation)

    def take(self, credit: Credit, key: Key, slot_bytes: int, now_s: float) -> None:
        """The key is lent from now on, whether its bytes are here or not."""
        credit.keys[key] = slot_bytes
        credit.size_bytes += slot_bytes
        self.lent_bytes += slot_bytes
        self._by_key.setdefault((credit.namespace, key), []).append(credit)
        self._core.shards.claim(credit.namespace, key)
        why = f"for {credit.debtor}, its loan {credit.id[2]}"
        self._core.story.note(now_s, credit.namespace, key, "kept", why)

    def let_go(self, credit: Credit, key: Key, what: str, why: str, now_s: float) -> None:
        """The key is not lent any more; `settle` has to follow."""
        slot_bytes = credit.keys.pop(key)
        credit.size_bytes -= slot_bytes
        self.lent_bytes -= slot_bytes
        credit.coming.discard(key)
        place = (credit.namespace, key)
        holders = self._by_key[place]
        holders.remove(credit)
        if not holders:
            del self._by_key[place]
        self._core.story.note(now_s, credit.namespace, key, what, why)
        self._core.end_of_claim(credit.namespace, key, now_s)

    def settle(self, credit: Credit, end: LoanState, why: str, now_s: float) -> None:
        """Brings the state in line with what is lent; an empty loan has ended."""
        if credit.id not in self.all:
            return
        if not credit.keys:
            self.end(credit, end, why, now_s)
            return
        if not credit.recalled_bytes:
            credit.keep_bytes = None
            credit.recall_s = credit.call_s = INFINITY
        credit.state = move(credit.state, credit.stands)
        self.wake(credit)

    def end(self, credit: Credit, end: LoanState, why: str, now_s: float) -> None:
        for key in list(credit.keys):
            self.let_go(credit, key, end.name.lower(), why, now_s)
        credit.state = move(credit.state, end)
        del self.all[credit.id]
        self.bury(credit.id)
        self._transit.cancel(credit.order_id)

    def bury(self, loan_id: LoanId) -> None:
        """Whatever of this loan is still on its way comes too late."""
        self.ended[loan_id] = None
        if len(self.ended) > ENDED_LOANS:
            del self.ended[next(iter(self.ended))]

    def wake(self, credit: Credit) -> None:
        """To be called when its next deadline may have come nearer."""
        self.next_s = min(self.next_s, credit.due_s)

    def look_ahead(self) -> None:
        """Finds the next deadline anew."""
        self.next_s = min((credit.due_s for credit in self.all.values()), default=INFINITY)

    def check(self) -> None:
        """Asserts all invariants."""
        assert self.lent_bytes == sum(credit.size_bytes for credit in self.all.values())
        assert self.lent_bytes <= self._terms.cap_bytes
        assert len(self.all) <= LOANS
        assert len(self.ended) <= ENDED_LOANS
        assert not self.all.keys() & self.ended.keys()
        index: dict[tuple[NamespaceId, Key], int] = {}
        for loan_id, credit in self.all.items():
            assert credit.id == loan_id
            assert credit.keys, f"loan {loan_id} is empty"
            assert credit.state in COUNTED
            assert credit.state is credit.stands
            assert credit.size_bytes == sum(credit.keys.values())
            assert (credit.recall_s < INFINITY) == (credit.keep_bytes is not None)
            assert not credit.coming or credit.order_id in self._transit
            assert credit.due_s >= self.next_s
            assert self._debtors[credit.debtor] == credit.id[1]
            for key in credit.keys:
                place = (credit.namespace, key)
                index[place] = index.get(place, 0) + 1
                assert (self._core.shards.get(*place) is None) == (key in credit.coming)
        assert {place: len(held) for place, held in self._by_key.items()} == index
        assert all(self._core.shards.claims(*place) >= n for place, n in index.items())

    # What happens to shards here --------------------------------------------------------

    def _sealed(self, shard: Shard, now_s: float) -> None:
        for credit in list(self._by_key.get((shard.namespace, shard.key), ())):
            credit.coming.discard(shard.key)
            self.settle(credit, LoanState.VOID, "", now_s)

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        for credit in list(self._by_key.get((shard.namespace, shard.key), ())):
            if shard.key not in credit.coming:
                self.let_go(credit, shard.key, what, "here, though it was lent", now_s)
                self.settle(credit, LoanState.VOID, what, now_s)
