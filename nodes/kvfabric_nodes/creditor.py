"""Memory that a node lends to others: reserved before a byte moves, kept while it is renewed.

The creditor's rule is the rule. What a loan is, is decided when it is first asked for;
keys only leave it later. A loan ends when its debtor returns it, does not renew it in
time, is started anew, or does not answer a recall; what was lent is ordinary cache then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvfabric.errors import Conflict, Refused
from kvfabric.loans import COUNTED, Loan, LoanId, LoanState, move
from kvfabric.rpc.v1 import control_pb2, node_pb2, types_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, Status
from kvfabric_nodes.core import NodeCore
from kvfabric_nodes.extents import Pool, slot_bytes
from kvfabric_nodes.post import Post
from kvfabric_nodes.pulls import PullOrder
from kvfabric_nodes.room import Rooms
from kvfabric_nodes.shards import Shard
from kvfabric_nodes.terms import Identity, Terms
from kvfabric_nodes.transit import Cargo, Transit

LOAN_KEYS = 64  # of one loan
LOANS = 4096  # lent at a time
ENDED_LOANS = 8192  # remembered, so that a late message does not raise them again
DEBTORS = 4096  # whose incarnation is remembered
RETRY_S = 1.0  # between calls that nobody answers
REMIND_S = 2.0  # between those that were answered, until the memory is back
QUIET_S = 30.0  # nothing is lent for so long after memory was wanted back


@dataclass(slots=True, eq=False)
class Credit:
    """A loan as its creditor sees it."""

    id: LoanId
    namespace: NamespaceId
    tenant: str
    endpoints: types_pb2.Endpoints  # the debtor's
    expires_s: float
    state: LoanState = LoanState.REQUESTED
    reason: str = ""  # why some keys are not lent
    keys: dict[Key, int] = field(default_factory=dict)  # with their slots' bytes
    coming: set[Key] = field(default_factory=set)  # those whose bytes are not here yet
    size_bytes: int = 0
    order_id: int = 0  # of the fetch under way
    keep_bytes: int | None = None  # while recalled: what may stay
    recall_s: float = 0.0  # when the rest is given up
    call_s: float = float("inf")  # when to say so again

    @property
    def debtor(self) -> str:
        return self.id[0]

    @property
    def recalled_bytes(self) -> int:
        return 0 if self.keep_bytes is None else max(0, self.size_bytes - self.keep_bytes)

    @property
    def due_s(self) -> float:
        if self.keep_bytes is None:
            return self.expires_s
        return min(self.expires_s, self.recall_s, self.call_s)


class Creditor:
    """See the module. One per node."""

    def __init__(
        self,
        core: NodeCore,
        me: Identity,
        terms: Terms,
        post: Post,
        transit: Transit,
        rooms: Rooms,
    ) -> None:
        self.owes: Callable[[], bool] = lambda: False  # whether this node has borrowed itself
        self.lent_bytes = 0
        self._core = core
        self._me = me
        self._terms = terms
        self._post = post
        self._transit = transit
        self._rooms = rooms
        self._credits: dict[LoanId, Credit] = {}
        self._by_key: dict[tuple[NamespaceId, Key], list[Credit]] = {}
        self._ended: dict[LoanId, None] = {}
        self._debtors: dict[str, int] = {}  # their newest incarnation
        self._quiet_until_s = float("-inf")
        self._next_s = float("inf")
        core.on_sealed.append(self._sealed)
        core.on_dropped.append(self._dropped)

    # Calls of debtors ---------------------------------------------------------------

    def lend(self, request: node_pb2.LendRequest, now_s: float) -> node_pb2.LendResponse:
        """Reserves what is asked for, and fetches it; repeated, says how far that is."""
        sizes = _sizes(request)
        self._meet(request.debtor, request.debtor_incarnation, now_s)
        loan_id = (request.debtor, request.debtor_incarnation, request.loan)
        response = node_pb2.LendResponse(incarnation=self._me.incarnation)
        granted_s = self._granted_s(request.deadline_ms)
        credit = self._credits.get(loan_id)
        if credit is None:
            why, response.owes = self._why_not(request, now_s)
            if loan_id in self._ended:
                why = f"{self._me.node} has refused this loan, or it has ended"
            if why:
                response.reason = why
                response.statuses.extend([Status.RETRY] * len(request.keys))
                self._bury(loan_id)
                return response
            credit = self._grant(request, loan_id, sizes, now_s)
        credit.expires_s = max(credit.expires_s, now_s + granted_s)
        response.statuses.extend(self._status(credit, Key(key)) for key in request.keys)
        response.reason = credit.reason
        response.deadline_ms = int(granted_s * 1000)
        self._settle(credit, LoanState.VOID, credit.reason or "nothing of it could be lent", now_s)
        return response

    def renew(
        self, request: node_pb2.RenewLoansRequest, now_s: float
    ) -> node_pb2.RenewLoansResponse:
        self._meet(request.debtor, request.debtor_incarnation, now_s)
        granted_s = self._granted_s(request.deadline_ms)
        response = node_pb2.RenewLoansResponse(
            incarnation=self._me.incarnation, deadline_ms=int(granted_s * 1000)
        )
        for number in request.loans:
            credit = self._credits.get((request.debtor, request.debtor_incarnation, number))
            response.known.append(credit is not None)
            response.size_bytes.append(credit.size_bytes if credit else 0)
            if credit is not None:
                credit.expires_s = max(credit.expires_s, now_s + granted_s)
        return response

    def take_back(
        self, request: node_pb2.ReturnLoanRequest, now_s: float
    ) -> node_pb2.ReturnLoanResponse:
        """The debtor needs these keys, or all, no more; unknown ones are back already."""
        self._meet(request.debtor, request.debtor_incarnation, now_s)
        loan_id = (request.debtor, request.debtor_incarnation, request.loan)
        credit = self._credits.get(loan_id)
        if credit is None:
            if not request.keys:
                self._bury(loan_id)  # whatever of it is still on its way comes too late
            return node_pb2.ReturnLoanResponse()
        keys = [Key(key) for key in request.keys] or list(credit.keys)
        for key in keys:
            if key in credit.keys:
                self._let_go(credit, key, "returned", f"by {credit.debtor}", now_s)
                shard = self._core.shards.get(credit.namespace, key)
                if request.drop and shard is not None and self._unneeded(shard):
                    self._core.drop(shard, "returned", f"by {credit.debtor}", now_s)
        self._settle(credit, LoanState.RETURNED, "", now_s)
        return node_pb2.ReturnLoanResponse(size_bytes=credit.size_bytes)

    # Wanting memory back --------------------------------------------------------------

    @property
    def recalled_bytes(self) -> int:
        """What recalls will bring, by their deadlines at the latest."""
        return sum(credit.recalled_bytes for credit in self._credits.values())

    def recall_for(self, pool: Pool, wanted_bytes: int, now_s: float) -> None:
        """Wants so much back for this node's own clients: slots of the pool first, the
        youngest loans first."""
        if wanted_bytes <= 0:
            return
        choice = [credit for credit in self._credits.values() if credit.keep_bytes is None]
        choice.reverse()
        choice.sort(key=lambda c: (c.tenant, next(iter(c.keys.values()))) != pool)
        for credit in choice:
            if wanted_bytes <= 0:
                return
            part = min(wanted_bytes, credit.size_bytes)
            wanted_bytes -= part
            self._recall(credit, part, self._terms.recall_s, "its own clients need room", now_s)

    def recall(self, recall: control_pb2.Command.Recall, why: str, now_s: float) -> None:
        """The manager's wish; while a recall is under way, it is that recall."""
        left = recall.size_bytes or self.lent_bytes
        for credit in list(self._credits.values()):
            if credit.debtor != recall.debtor or recall.loan not in (0, credit.id[2]):
                continue
            if recall.HasField("endpoints"):
                credit.endpoints = recall.endpoints
            part = min(left, credit.size_bytes)
            left -= max(part, credit.recalled_bytes)
            if part > 0 and credit.keep_bytes is None:
                deadline_s = recall.deadline_ms / 1000 or self._terms.recall_s
                self._recall(credit, part, deadline_s, why or "the manager asks", now_s)
            if left <= 0:
                return

    # Events -----------------------------------------------------------------------------

    def peer_lost(self, node: str, incarnation: int, now_s: float) -> None:
        """A debtor that is gone ends by its deadlines; one that came back has no loans."""
        if incarnation > self._debtors.get(node, incarnation):
            self._meet(node, incarnation, now_s)

    def tick(self, now_s: float) -> None:
        if now_s < self._next_s:
            return
        for credit in list(self._credits.values()):
            if credit.expires_s <= now_s:
                self._end(credit, LoanState.VOID, f"{credit.debtor} did not renew it", now_s)
            elif credit.keep_bytes is not None and credit.recall_s <= now_s:
                self._give_up(credit, now_s)
            elif credit.call_s <= now_s:
                self._call_back(credit, now_s)
        self._next_s = min((c.due_s for c in self._credits.values()), default=float("inf"))

    def due_s(self) -> float:
        return self._next_s

    # Questions ----------------------------------------------------------------------------

    def holds(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether this key is here for a debtor: it must not be lent on."""
        return (namespace, key) in self._by_key

    def loans(self) -> Iterator[Loan]:
        for credit in self._credits.values():
            debtor, incarnation, number = credit.id
            me = self._me
            yield Loan(
                number,
                debtor,
                incarnation,
                me.node,
                me.incarnation,
                credit.state,
                credit.size_bytes,
            )

    def check(self) -> None:
        """Asserts all invariants."""
        assert self.lent_bytes == sum(credit.size_bytes for credit in self._credits.values())
        assert self.lent_bytes <= self._terms.cap_bytes
        assert len(self._credits) <= LOANS
        assert len(self._ended) <= ENDED_LOANS
        assert not self._credits.keys() & self._ended.keys()
        index: dict[tuple[NamespaceId, Key], int] = {}
        for loan_id, credit in self._credits.items():
            assert credit.id == loan_id
            assert credit.keys, f"loan {loan_id} is empty"
            assert credit.state in COUNTED
            assert credit.size_bytes == sum(credit.keys.values())
            assert (credit.state is LoanState.RECALLED) == (credit.keep_bytes is not None)
            assert credit.state is not LoanState.HELD or not credit.coming
            assert not credit.coming or credit.order_id in self._transit
            assert credit.due_s >= self._next_s
            assert self._debtors[credit.debtor] == credit.id[1]
            for key in credit.keys:
                index[credit.namespace, key] = index.get((credit.namespace, key), 0) + 1
                here = self._core.shards.get(credit.namespace, key) is not None
                assert here != (key in credit.coming)
        assert {place: len(held) for place, held in self._by_key.items()} == index
        for (namespace, key), count in index.items():
            assert self._core.shards.claims(namespace, key) >= count

    # Inside -----------------------------------------------------------------------------

    def _why_not(self, request: node_pb2.LendRequest, now_s: float) -> tuple[str, bool]:
        """Why nothing is lent now, if so; and whether only because this node owes."""
        me = self._me.node
        here_already = request.source == me
        if self._core.draining:
            return f"{me} is being drained", False
        if self._rooms or now_s < self._quiet_until_s:
            return f"{me} needs its memory itself", False
        if len(self._credits) >= LOANS:
            return f"{me} has lent {LOANS} loans, its most", False
        if (
            self.owes()
            and not here_already
            and not (request.last_resort or self._terms.lend_while_owing)
        ):
            return f"{me} has borrowed itself", True
        return "", False

    def _grant(
        self,
        request: node_pb2.LendRequest,
        loan_id: LoanId,
        sizes: Sequence[int],
        now_s: float,
    ) -> Credit:
        """A new loan of those keys that there is room for; it may be empty."""
        namespace = NamespaceId(request.namespace_id)
        self._core.learn(namespace, request.tenant)
        asker = request.debtor_endpoints if request.HasField("debtor_endpoints") else None
        credit = Credit(loan_id, namespace, request.tenant, asker or request.endpoints, now_s)
        self._credits[loan_id] = credit
        absent: dict[Key, int] = {}
        for key, size_bytes in zip(map(Key, request.keys), sizes, strict=True):
            slot = slot_bytes(size_bytes)
            asked = sum(map(slot_bytes, absent.values()))
            if self.lent_bytes + asked + slot > self._terms.cap_bytes:
                cap = self._terms.cap_bytes
                credit.reason = f"{self._me.node} lends {cap} bytes at most"
            elif (shard := self._core.shards.get(namespace, key)) is not None:
                self._take(credit, key, shard.extent.size_bytes, now_s)
            elif request.source == self._me.node:
                credit.reason = f"{self._me.node} has them no more"
            else:
                absent[key] = size_bytes
        if absent:
            self._fetch(credit, request, absent, now_s)
        return credit

    def _fetch(
        self,
        credit: Credit,
        request: node_pb2.LendRequest,
        sizes: dict[Key, int],
        now_s: float,
    ) -> None:
        """Room for keys that are not here, and the order to fetch them."""
        cargo = Cargo(
            credit.namespace,
            credit.tenant,
            sizes,
            request.layers or 1,
            request.source,
            request.endpoints,
            request.loan,
            f"loan {request.loan} of {request.debtor}",
        )

        def ended(order: PullOrder, why: str, now_s: float) -> None:
            self._fetched(credit, order, why, now_s)

        credit.order_id, grants = self._transit.fetch(cargo, ended, now_s)
        for key, grant in grants.items():
            if grant.extent is None:
                credit.reason = grant.reason or "is being written there"
                continue
            credit.coming.add(key)
            self._take(credit, key, grant.extent.size_bytes, now_s)

    def _fetched(self, credit: Credit, order: PullOrder, why: str, now_s: float) -> None:
        """What did not come is not lent."""
        credit.order_id = 0
        for key in order.keys:
            if key in credit.coming:
                self._let_go(credit, key, "not fetched", why or "see the source", now_s)
        self._settle(credit, LoanState.VOID, f"nothing came: {why}", now_s)

    def _take(self, credit: Credit, key: Key, slot: int, now_s: float) -> None:
        """The key is lent from now on."""
        credit.keys[key] = slot
        credit.size_bytes += slot
        self.lent_bytes += slot
        self._by_key.setdefault((credit.namespace, key), []).append(credit)
        self._core.shards.claim(credit.namespace, key)
        why = f"for {credit.debtor}, its loan {credit.id[2]}"
        self._core.story.note(now_s, credit.namespace, key, "kept", why)

    def _let_go(self, credit: Credit, key: Key, what: str, why: str, now_s: float) -> None:
        """The key is not lent any more; `_settle` has to follow."""
        slot = credit.keys.pop(key)
        credit.size_bytes -= slot
        self.lent_bytes -= slot
        credit.coming.discard(key)
        place = (credit.namespace, key)
        holders = self._by_key[place]
        holders.remove(credit)
        if not holders:
            del self._by_key[place]
        self._core.story.note(now_s, credit.namespace, key, what, why)
        self._core.end_of_claim(credit.namespace, key, now_s)
        if not self._core.shards.claims(credit.namespace, key):
            self._rooms.gain(slot)

    def _settle(self, credit: Credit, end: LoanState, why: str, now_s: float) -> None:
        """Brings the state in line with what is lent; an empty loan has ended."""
        if credit.id not in self._credits:
            return
        if not credit.keys:
            self._end(credit, end, why, now_s)
            return
        if credit.keep_bytes is not None and not credit.recalled_bytes:
            credit.keep_bytes = None
        if credit.keep_bytes is not None:
            credit.state = move(credit.state, LoanState.RECALLED)
        elif credit.coming:
            credit.state = move(credit.state, LoanState.GRANTED)
        else:
            credit.state = move(credit.state, LoanState.HELD)
        self._next_s = min(self._next_s, credit.due_s)

    def _end(self, credit: Credit, end: LoanState, why: str, now_s: float) -> None:
        for key in list(credit.keys):
            self._let_go(credit, key, end.name.lower(), why, now_s)
        credit.state = move(credit.state, end)
        del self._credits[credit.id]
        self._bury(credit.id)
        self._transit.cancel(credit.order_id)

    def _recall(
        self, credit: Credit, part_bytes: int, deadline_s: float, why: str, now_s: float
    ) -> None:
        credit.keep_bytes = credit.size_bytes - part_bytes
        credit.recall_s = now_s + self._core.bounded(deadline_s)
        self._quiet_until_s = max(self._quiet_until_s, now_s + QUIET_S)
        for key in credit.keys:
            self._core.story.note(now_s, credit.namespace, key, "recalled", why)
        self._call_back(credit, now_s)
        self._settle(credit, LoanState.VOID, why, now_s)

    def _call_back(self, credit: Credit, now_s: float) -> None:
        """Tells the debtor, again and again: it may not know the loan yet."""
        credit.call_s = float("inf")
        request = node_pb2.RecallLoanRequest(
            creditor=self._me.node,
            creditor_incarnation=self._me.incarnation,
            loan=credit.id[2],
            size_bytes=credit.recalled_bytes,
            deadline_ms=max(1, int((credit.recall_s - now_s) * 1000)),
        )

        def then(answer: node_pb2.RecallLoanResponse | None, why: str, at_s: float) -> None:
            if credit.id in self._credits:
                credit.call_s = at_s + (RETRY_S if answer is None else REMIND_S)
                self._next_s = min(self._next_s, credit.due_s)

        self._post.call(credit.debtor, credit.endpoints, "RecallLoan", request, then, now_s)

    def _give_up(self, credit: Credit, now_s: float) -> None:
        """The recall's deadline: takes what was wanted back."""
        why = f"{credit.debtor} did not move it in time"
        for key in list(credit.keys):
            if credit.recalled_bytes:
                self._let_go(credit, key, "taken back", why, now_s)
        self._settle(credit, LoanState.VOID, why, now_s)

    def _meet(self, debtor: str, incarnation: int, now_s: float) -> None:
        """Ends what a debtor borrowed before it was started anew; refuses who it was before."""
        known = self._debtors.get(debtor, 0)
        if incarnation < known:
            raise Conflict(
                f"{debtor} is incarnation {known} by now, and {incarnation} has no loans here"
            )
        if incarnation == known:
            return
        for credit in [c for c in self._credits.values() if c.debtor == debtor]:
            self._end(credit, LoanState.VOID, f"{debtor} was started anew", now_s)
        self._debtors.pop(debtor, None)
        self._debtors[debtor] = incarnation
        if len(self._debtors) > DEBTORS:
            with_loans = {credit.debtor for credit in self._credits.values()}
            idle = (name for name in self._debtors if name not in with_loans and name != debtor)
            self._debtors.pop(next(idle, ""), None)

    def _bury(self, loan_id: LoanId) -> None:
        self._ended[loan_id] = None
        if len(self._ended) > ENDED_LOANS:
            del self._ended[next(iter(self._ended))]

    def _status(self, credit: Credit, key: Key) -> Status:
        if key in credit.coming:
            return Status.OK
        return Status.EXISTS if key in credit.keys else Status.RETRY

    def _unneeded(self, shard: Shard) -> bool:
        return not shard.pinned and not self._core.shards.claimed(shard)

    def _granted_s(self, deadline_ms: int) -> float:
        return self._core.bounded(deadline_ms / 1000 or self._terms.loan_s)

    def _sealed(self, shard: Shard, now_s: float) -> None:
        for credit in list(self._by_key.get((shard.namespace, shard.key), ())):
            credit.coming.discard(shard.key)
            self._settle(credit, LoanState.VOID, "", now_s)

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        for credit in list(self._by_key.get((shard.namespace, shard.key), ())):
            if shard.key not in credit.coming:
                self._let_go(credit, shard.key, what, "here, though it was lent", now_s)
                self._settle(credit, LoanState.VOID, what, now_s)


def _sizes(request: node_pb2.LendRequest) -> list[int]:
    """One size per key, of a request that makes sense."""
    count = len(request.keys)
    if not 0 < count <= LOAN_KEYS or len(set(request.keys)) != count:
        raise Refused(f"a loan of {count} keys; lend 1 to {LOAN_KEYS}, each once")
    if any(len(key) != DIGEST_BYTES for key in (request.namespace_id, *request.keys)):
        raise Refused(f"namespaces and keys have {DIGEST_BYTES} bytes")
    sizes = list(request.size_bytes)
    if len(sizes) == 1:
        sizes *= count
    if len(sizes) != count or not all(sizes):
        raise Refused(f"{len(request.size_bytes)} sizes for {count} keys; give one, or one each")
    return sizes
