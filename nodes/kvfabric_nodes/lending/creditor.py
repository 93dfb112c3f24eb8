"""Memory that a node lends to others: reserved before a byte moves, kept while it is renewed.

The creditor's rule is the rule. What a loan is, is decided when it is first asked for;
keys only leave it later. A loan ends when its debtor returns it, does not renew it in
time, is started anew, or does not answer a recall; what was lent is ordinary cache then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvfabric.errors import Refused
from kvfabric.lending.loans import LoanId, LoanState
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, Status
from kvfabric_nodes.copying.pulls import PullOrder
from kvfabric_nodes.lending.credit_book import LOANS, Credit, CreditBook
from kvfabric_nodes.lending.recalls import Recalls
from kvfabric_nodes.lending.room import Rooms
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.lending.transit import Cargo, Transit
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import slot_bytes
from kvfabric_nodes.store.shards import Shard

LOAN_KEYS = 64  # of one loan


class Creditor:
    """See the module. One per node. `owes`: whether the node has borrowed itself."""

    def __init__(
        self,
        core: NodeCore,
        me: Identity,
        terms: Terms,
        transit: Transit,
        rooms: Rooms,
        book: CreditBook,
        recalls: Recalls,
        owes: Callable[[], bool],
    ) -> None:
        self._core = core
        self._me = me
        self._terms = terms
        self._transit = transit
        self._rooms = rooms
        self._book = book
        self._recalls = recalls
        self._owes = owes

    # Calls of debtors ---------------------------------------------------------------

    def lend(self, request: node_pb2.LendRequest, now_s: float) -> node_pb2.LendResponse:
        """Reserves what is asked for, and fetches it; repeated, says how far that is."""
        sizes = _sizes(request)
        self._book.meet(request.debtor, request.debtor_incarnation, now_s)
        loan_id = (request.debtor, request.debtor_incarnation, request.loan)
        response = node_pb2.LendResponse(incarnation=self._me.incarnation)
        granted_s = self._granted_s(request.deadline_ms)
        credit = self._book.all.get(loan_id)
        if credit is None:
            why, response.owes = self._why_not(request, now_s)
            if loan_id in self._book.ended:
                why = f"{self._me.node} has refused this loan, or it has ended"
            if why:
                response.reason = why
                response.statuses.extend([Status.RETRY] * len(request.keys))
                self._book.bury(loan_id)
                return response
            credit = self._grant(request, loan_id, sizes, now_s)
        credit.expires_s = max(credit.expires_s, now_s + granted_s)
        response.statuses.extend(self._status(credit, Key(key)) for key in request.keys)
        response.reason = credit.reason
        response.deadline_ms = int(granted_s * 1000)
        self._book.settle(
            credit, LoanState.VOID, credit.reason or "nothing of it could be lent", now_s
        )
        return response

    def renew(
        self, request: node_pb2.RenewLoansRequest, now_s: float
    ) -> node_pb2.RenewLoansResponse:
        self._book.meet(request.debtor, request.debtor_incarnation, now_s)
        granted_s = self._granted_s(request.deadline_ms)
        response = node_pb2.RenewLoansResponse(
            incarnation=self._me.incarnation, deadline_ms=int(granted_s * 1000)
        )
        for number in request.loans:
            credit = self._book.all.get((request.debtor, request.debtor_incarnation, number))
            response.known.append(credit is not None)
            response.size_bytes.append(credit.size_bytes if credit else 0)
            if credit is not None:
                credit.expires_s = max(credit.expires_s, now_s + granted_s)
        return response

    def take_back(
        self, request: node_pb2.ReturnLoanRequest, now_s: float
    ) -> node_pb2.ReturnLoanResponse:
        """The debtor needs these keys, or all, no more; unknown ones are back already."""
        self._book.meet(request.debtor, request.debtor_incarnation, now_s)
        loan_id = (request.debtor, request.debtor_incarnation, request.loan)
        credit = self._book.all.get(loan_id)
        if credit is None:
            if not request.keys:
                self._book.bury(loan_id)  # whatever of it is still on its way comes too late
            return node_pb2.ReturnLoanResponse()
        keys = [Key(key) for key in request.keys] or list(credit.keys)
        for key in keys:
            if key in credit.keys:
                if request.drop and key in credit.coming:
                    credit.unwanted.add(key)
                self._book.let_go(credit, key, "returned", f"by {credit.debtor}", now_s)
                shard = self._core.shards.get(credit.namespace, key)
                if request.drop and shard is not None and self._unneeded(shard):
                    self._core.drop(shard, "returned", f"by {credit.debtor}", now_s)
        self._book.settle(credit, LoanState.RETURNED, "", now_s)
        return node_pb2.ReturnLoanResponse(size_bytes=credit.size_bytes)

    # Events ---------------------------------------------------------------------------

    def peer_lost(self, node: str, incarnation: int, now_s: float) -> None:
        """A debtor that is gone ends by its deadlines; one that came back has no loans."""
        if self._book.newer(node, incarnation):
            self._book.meet(node, incarnation, now_s)

    def tick(self, now_s: float) -> None:
        """Ends what was not renewed, and goes on with recalls."""
        if now_s < self._book.next_s:
            return
        for credit in list(self._book.all.values()):
            if credit.expires_s <= now_s:
                why = f"{credit.debtor} did not renew it"
                self._book.end(credit, LoanState.VOID, why, now_s)
        self._recalls.tick(now_s)
        self._book.look_ahead()

    # Inside -----------------------------------------------------------------------------

    def _why_not(self, request: node_pb2.LendRequest, now_s: float) -> tuple[str, bool]:
        """Why nothing is lent now, if so; and whether only because this node owes."""
        me = self._me.node
        here_already = request.source == me
        if self._core.draining:
            return f"{me} is being drained", False
        if self._rooms or now_s < self._recalls.quiet_until_s:
            return f"{me} needs its memory itself", False
        if len(self._book.all) >= LOANS:
            return f"{me} has lent {LOANS} loans, its most", False
        if (
            self._owes()
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
        here_already = request.source == self._me.node
        credit = Credit(
            loan_id, namespace, request.tenant, asker or request.endpoints, now_s, here_already
        )
        self._book.all[loan_id] = credit
        absent: dict[Key, int] = {}
        for key, size_bytes in zip(map(Key, request.keys), sizes, strict=True):
            slot = slot_bytes(size_bytes)
            asked = sum(map(slot_bytes, absent.values()))
            if self._book.lent_bytes + asked + slot > self._terms.cap_bytes:
                cap = self._terms.cap_bytes
                credit.reason = f"{self._me.node} lends {cap} bytes at most"
            elif (shard := self._core.shards.get(namespace, key)) is not None:
                if shard.extent.size_bytes == slot:
                    self._book.take(credit, key, slot, now_s)
                else:
                    credit.reason = f"{self._me.node} has it with {shard.size_bytes} bytes"
            elif here_already:
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
            self._book.take(credit, key, grant.extent.size_bytes, now_s)

    def _fetched(self, credit: Credit, order: PullOrder, why: str, now_s: float) -> None:
        """What did not come is not lent."""
        credit.order_id = 0
        for key in order.keys:
            if key in credit.coming:
                self._book.let_go(credit, key, "not fetched", why or "see the source", now_s)
        for key in sorted(credit.unwanted):
            shard = self._core.shards.get(credit.namespace, key)
            if shard is not None and self._unneeded(shard):
                self._core.drop(shard, "returned", f"by {credit.debtor}", now_s)
        credit.unwanted.clear()
        self._book.settle(credit, LoanState.VOID, f"nothing came: {why}", now_s)

    def _status(self, credit: Credit, key: Key) -> Status:
        if key in credit.coming:
            return Status.OK
        return Status.EXISTS if key in credit.keys else Status.RETRY

    def _unneeded(self, shard: Shard) -> bool:
        return not shard.pinned and not self._core.shards.claimed(shard)

    def _granted_s(self, deadline_ms: int) -> float:
        return self._core.bounded(deadline_ms / 1000 or self._terms.loan_s)


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
