"""A creditor that wants its memory back: it says so, waits, and takes it at the deadline."""

from __future__ import annotations

from kvfabric.lending.loans import LoanState
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric_nodes.lending.credit_book import Credit, CreditBook
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Pool

RETRY_S = 1.0  # between calls that nobody answers
REMIND_S = 2.0  # between those that were answered, until the memory is back
QUIET_S = 30.0  # nothing is lent for so long after memory was wanted back


class Recalls:
    """See the module."""

    def __init__(
        self, core: NodeCore, me: Identity, terms: Terms, post: Post, book: CreditBook
    ) -> None:
        self.quiet_until_s = float("-inf")
        self._core = core
        self._me = me
        self._terms = terms
        self._post = post
        self._book = book

    @property
    def coming_bytes(self) -> int:
        """What comes free, by the recalls' deadlines at the latest."""
        recalled = (credit for credit in self._book.all.values() if credit.recalled_bytes)
        return sum(min(c.recalled_bytes, self._book.freeing_bytes(c)) for c in recalled)

    def recall_for(self, pool: Pool, wanted_bytes: int, now_s: float) -> None:
        """Wants so much back for this node's own clients: slots of the pool first, the
        youngest loans first."""
        if wanted_bytes <= 0:
            return
        choice = [credit for credit in self._book.all.values() if credit.keep_bytes is None]
        choice.reverse()
        choice.sort(key=lambda c: (c.tenant, next(iter(c.keys.values()))) != pool)
        for credit in choice:
            if wanted_bytes <= 0:
                return
            freed = self._book.freeing_bytes(credit)
            if not freed:
                continue  # its keys stay for others
            part = min(wanted_bytes, freed) if freed == credit.size_bytes else credit.size_bytes
            wanted_bytes -= min(wanted_bytes, freed)
            why = f"{self._me.node}'s own clients need room"
            self._recall(credit, part, self._terms.recall_s, why, now_s)

    def command(self, recall: control_pb2.Command.Recall, why: str, now_s: float) -> None:
        """The manager's wish; a recall that is under way counts for it."""
        left = recall.size_bytes or self._book.lent_bytes
        for credit in list(self._book.all.values()):
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

    def tick(self, now_s: float) -> None:
        """To be called before the next deadline is looked for."""
        for credit in list(self._book.all.values()):
            if credit.recall_s <= now_s:
                self._take(credit, now_s)
            elif credit.call_s <= now_s:
                self._call(credit, now_s)

    def _recall(
        self, credit: Credit, part_bytes: int, deadline_s: float, why: str, now_s: float
    ) -> None:
        credit.keep_bytes = credit.size_bytes - part_bytes
        credit.recall_s = now_s + self._core.bounded(deadline_s)
        self.quiet_until_s = max(self.quiet_until_s, now_s + QUIET_S)
        for key in credit.keys:
            self._core.story.note(now_s, credit.namespace, key, "recalled", why)
        self._call(credit, now_s)
        self._book.settle(credit, LoanState.VOID, why, now_s)

    def _call(self, credit: Credit, now_s: float) -> None:
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
            if credit.id in self._book.all and credit.keep_bytes is not None:
                credit.call_s = at_s + (RETRY_S if answer is None else REMIND_S)
                self._book.wake(credit)

        self._post.call(credit.debtor, credit.endpoints, "RecallLoan", request, then, now_s)

    def _take(self, credit: Credit, now_s: float) -> None:
        """The deadline: what was wanted back is ordinary cache now."""
        why = f"{credit.debtor} did not move it in time"
        for key in list(credit.keys):
            if credit.recalled_bytes:
                self._book.let_go(credit, key, "taken back", why, now_s)
        self._book.settle(credit, LoanState.VOID, why, now_s)
