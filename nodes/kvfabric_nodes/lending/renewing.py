"""Loans are renewed in time, one call per creditor; what a creditor says of them is the rule."""

from __future__ import annotations

from typing import Protocol

from kvfabric.rpc.v1 import node_pb2
from kvfabric_nodes.lending.debt_book import DebtBook
from kvfabric_nodes.lending.debts import INFINITY, Debt
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.terms import Identity, Terms

RENEWALS = 3  # within a loan's time
RETRY_S = 1.0  # after a call that nobody answered


class Void(Protocol):
    """Ends a loan that its creditor does not know any more."""

    def __call__(self, debt: Debt, why: str, now_s: float) -> None: ...


class Renewals:
    """See the module."""

    def __init__(self, me: Identity, terms: Terms, post: Post, book: DebtBook, void: Void) -> None:
        self.next_s = INFINITY
        self._me = me
        self._terms = terms
        self._post = post
        self._book = book
        self._void = void
        self._renew_s: dict[str, float] = {}  # by creditor; infinite while a call is under way

    def watch(self, creditor: str, now_s: float) -> None:
        """This creditor has lent something now."""
        renew_s = self._renew_s.setdefault(creditor, now_s + self._terms.loan_s / RENEWALS)
        self.next_s = min(self.next_s, renew_s)

    def run(self, now_s: float) -> None:
        if now_s < self.next_s:
            return
        for creditor, renew_s in list(self._renew_s.items()):
            if renew_s <= now_s:
                self._renew(creditor, now_s)
        self.next_s = min(self._renew_s.values(), default=INFINITY)

    def _renew(self, creditor: str, now_s: float) -> None:
        held = [d for d in self._book.debts.values() if d.creditor == creditor and d.incarnation]
        if not held:
            del self._renew_s[creditor]
            return
        versions = [debt.version for debt in held]
        request = node_pb2.RenewLoansRequest(
            debtor=self._me.node,
            debtor_incarnation=self._me.incarnation,
            loans=[debt.id for debt in held],
            deadline_ms=int(self._terms.loan_s * 1000),
        )

        def then(answer: node_pb2.RenewLoansResponse | None, why: str, at_s: float) -> None:
            if answer is None or len(answer.known) != len(held):
                self._renew_s[creditor] = at_s + RETRY_S
            else:
                self._renew_s[creditor] = max(at_s, now_s + self._terms.loan_s / RENEWALS)
                for index, debt in enumerate(held):
                    if debt.id in self._book.debts:
                        self._renewed(debt, index, versions[index], now_s, answer, at_s)
            self.next_s = min(self.next_s, self._renew_s[creditor])

        self._renew_s[creditor] = INFINITY
        self._post.call(creditor, held[-1].endpoints, "RenewLoans", request, then, now_s)

    def _renewed(
        self,
        debt: Debt,
        index: int,
        version: int,
        asked_s: float,
        answer: node_pb2.RenewLoansResponse,
        now_s: float,
    ) -> None:
        if debt.incarnation != answer.incarnation:
            self._void(debt, f"{debt.creditor} was started anew", now_s)
        elif not answer.known[index]:
            self._void(debt, f"{debt.creditor} has ended the loan", now_s)
        else:
            debt.expires_s = max(debt.expires_s, asked_s + answer.deadline_ms / 1000)
            unchanged = debt.version == version and not debt.calling
            if unchanged and answer.size_bytes[index] != debt.owed_bytes:
                debt.doubtful = True
                self._book.touch(debt, now_s)
