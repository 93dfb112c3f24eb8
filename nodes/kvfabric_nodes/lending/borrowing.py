"""The life of a loan at its debtor: asked for, held, returned.

A loan is one batch of like shards at one creditor. It goes on by itself: asked, polled
until the creditor holds the bytes, looked for in the manager's directory, and only then,
when no lease is on it any more, the node's own copy is dropped. One question per loan is
under way at a time; every question may be lost, or answered late, and asking again does
no harm. What is lent to whom, and why, is decided by `seeking` and `moving`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvfabric.lending.loans import LoanState
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.lending.debt_book import DebtBook
from kvfabric_nodes.lending.debts import INFINITY, PENDING, Batch, Debt, Named, Stage
from kvfabric_nodes.lending.post import CALL_S, Post
from kvfabric_nodes.lending.renewing import Renewals
from kvfabric_nodes.lending.room import Rooms
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.shards import Shard

PENDING_S = 120.0  # what is not held and seen by then is not lent
RECLAIM_S = 60.0  # shards that others have, under no loan or one that ended, are asked for so long
UNANSWERED = 3  # calls, where there is nobody else to ask
SHY_S = 30.0  # who did not answer is asked after all others for so long
RETRY_S = 1.0  # between calls that nobody answers

Lost = Callable[[Debt, Key, str, float], None]


class Borrower:
    """See the module. One per node."""

    def __init__(
        self,
        core: NodeCore,
        me: Identity,
        terms: Terms,
        post: Post,
        rooms: Rooms,
        book: DebtBook,
        lent_out: Callable[[NamespaceId, Key], bool],
    ) -> None:
        """`lent_out`: whether this node keeps a key for another one. `on_lost` is told of
        keys that are needed here and whose creditor may have them no more."""
        self.on_lost: Lost = lambda debt, key, why, now_s: None
        self._core = core
        self._me = me
        self._terms = terms
        self._post = post
        self._rooms = rooms
        self._book = book
        self._lent_out = lent_out
        self._shy_until_s: dict[str, float] = {}
        self._renewals = Renewals(me, terms, post, book, self.void)
        core.on_sealed.append(self._sealed)
        core.on_dropped.append(self._dropped)
        core.on_unclaimed.append(self._unclaimed)

    def borrow(
        self,
        batch: Batch,
        creditor: str,
        endpoints: types_pb2.Endpoints,
        why: str,
        now_s: float,
        search: Named | None = None,
        last_resort: bool = False,
    ) -> Debt:
        """Asks a creditor to take these."""
        debt = Debt(
            self._post.number(),
            creditor,
            endpoints,
            batch,
            why,
            begun_s=now_s,
            expires_s=now_s + self._terms.loan_s + CALL_S,
            search=search,
            last_resort=last_resort,
        )
        self._book.add(debt)
        self._ask(debt, now_s)
        return debt

    def shy(self, now_s: float) -> set[str]:
        """Nodes that did not answer lately."""
        for node, until_s in list(self._shy_until_s.items()):
            if until_s <= now_s:
                del self._shy_until_s[node]
        return set(self._shy_until_s)

    def peer_lost(self, node: str, incarnation: int, now_s: float) -> None:
        for debt in [d for d in self._book.debts.values() if d.creditor == node]:
            if not incarnation:
                self.void(debt, f"{node} is gone", now_s, reclaim=False)
            elif debt.incarnation not in (0, incarnation):
                self.void(debt, f"{node} was started anew", now_s)

    def void(self, debt: Debt, why: str, now_s: float, *, reclaim: bool = True) -> None:
        """The loan is no more. What lay there alone is claimed anew, or lost."""
        lost: list[Key] = []
        for key, stage in list(debt.stages.items()):
            place = (debt.batch.namespace, key)
            self._book.remove(debt, key)
            if stage is not Stage.AWAY or place in self._book.going or not reclaim:
                self._mourn(debt, key, stage, why, now_s)
            else:
                lost.append(key)
                self._core.story.note(now_s, *place, "loan ended", f"{debt.creditor}: {why}")
                self.on_lost(debt, key, why, now_s)
        debt.end = LoanState.VOID
        self._book.close_if_empty(debt)
        if debt.search is not None:
            debt.search.refused(debt.creditor, why, owes=False)
        if lost:
            again = replace(debt.batch, keys=lost, source=debt.creditor, endpoints=debt.endpoints)
            anew = self.borrow(again, debt.creditor, debt.endpoints, "claimed anew", now_s)
            anew.unanswered = int(debt.expires_s <= now_s)

    def run(self, now_s: float) -> None:
        """Does what is due."""
        if now_s >= self._book.next_s:
            for debt in list(self._book.debts.values()):
                if debt.expires_s <= now_s:
                    self.void(debt, "it was not renewed in time", now_s)
                elif not debt.calling and debt.next_s <= now_s:
                    self._go_on(debt, now_s)
            self._book.look_ahead()
        self._renewals.run(now_s)

    def due_s(self) -> float:
        return min(self._book.next_s, self._renewals.next_s)

    # One loan's steps -------------------------------------------------------------------

    def _go_on(self, debt: Debt, now_s: float) -> None:
        leaving = debt.having(Stage.LEAVING)
        doubtful = debt.doubtful and len(leaving) < len(debt.stages)  # of what is to stay there
        if doubtful or debt.having(Stage.ASKED):
            self._ask(debt, now_s)
        elif leaving:
            self._return(debt, leaving, now_s)
        elif debt.having(*PENDING):
            self._look(debt, now_s)
        else:
            debt.next_s = INFINITY

    def _ask(self, debt: Debt, now_s: float) -> None:
        """Lend: the first time a request, later the question how far it is."""
        keys = [key for key, stage in debt.stages.items() if stage is not Stage.LEAVING]
        batch = debt.batch
        at_home = batch.source == self._me.node
        request = node_pb2.LendRequest(
            loan=debt.id,
            debtor=self._me.node,
            debtor_incarnation=self._me.incarnation,
            source=batch.source,
            endpoints=self._me.endpoints if at_home else batch.endpoints,
            namespace_id=batch.namespace,
            tenant=batch.tenant,
            keys=keys,
            size_bytes=[batch.size_bytes],
            layers=batch.layers,
            deadline_ms=int(self._terms.loan_s * 1000),
            debtor_endpoints=self._me.endpoints,
            last_resort=debt.last_resort,
        )
        if debt.state is LoanState.REQUESTED:  # for so long the creditor may think it stands
            debt.expires_s = max(debt.expires_s, now_s + self._terms.loan_s + CALL_S)

        def then(answer: node_pb2.LendResponse | None, why: str, at_s: float) -> None:
            debt.calling = False
            if debt.id in self._book.debts:
                self._lent(debt, keys, now_s, answer, why, at_s)

        self._call(debt, "Lend", request, then, now_s)

    def _lent(
        self,
        debt: Debt,
        keys: list[Key],
        asked_s: float,
        answer: node_pb2.LendResponse | None,
        why: str,
        now_s: float,
    ) -> None:
        if answer is None or len(answer.statuses) != len(keys):
            self._no_answer(debt, why, now_s)
            return
        if debt.incarnation not in (0, answer.incarnation):
            self.void(debt, f"{debt.creditor} was started anew", now_s)
            return
        debt.unanswered = 0
        self._shy_until_s.pop(debt.creditor, None)
        debt.doubtful = False
        version = debt.version
        lent = {Status(s) for s in answer.statuses} & {Status.OK, Status.EXISTS}
        expires_s = asked_s + answer.deadline_ms / 1000
        if lent and not debt.incarnation:
            debt.incarnation = answer.incarnation
            debt.expires_s = expires_s
            self._renewals.watch(debt.creditor, now_s)
        elif lent:
            debt.expires_s = max(debt.expires_s, expires_s)
        refused = False
        for key, status in zip(keys, answer.statuses, strict=True):
            refused |= not self._told(debt, key, Status(status), answer.reason, now_s)
        if refused and debt.search is not None:
            debt.search.refused(debt.creditor, answer.reason, answer.owes)
        if debt.stages:
            debt.restate()
        debt.looked = False
        if debt.version != version:
            debt.next_s = now_s
        else:
            debt.rest(now_s)
        self._book.close_if_empty(debt)
        self._book.wake(debt)

    def _told(self, debt: Debt, key: Key, status: Status, why: str, now_s: float) -> bool:
        """What the creditor says of one key; whether it has it, or takes it."""
        stage = debt.stages.get(key)
        if stage is None:
            return True
        if status is Status.EXISTS:
            if stage in (Stage.ASKED, Stage.COMING):
                debt.step(key, Stage.THERE)
            return True
        if status is Status.OK and stage is not Stage.AWAY:
            if stage is Stage.ASKED:
                debt.step(key, Stage.COMING)
            return True
        self._book.remove(debt, key)
        self._mourn(debt, key, stage, f"gave it up: {why}", now_s)
        return False

    def _look(self, debt: Debt, now_s: float) -> None:
        """Whether what was lent is there by now, and seen."""
        if now_s >= debt.begun_s + PENDING_S:
            for key in debt.having(*PENDING):
                stage = debt.stages[key]
                self._book.leave(debt, key, now_s, drop=True)
                self._mourn(debt, key, stage, f"was not there after {PENDING_S:g} s", now_s)
            return
        for key in debt.having(Stage.THERE):
            place = (debt.batch.namespace, key)
            if self._core.shards.get(*place) is None and place not in self._book.away:
                self._arrive(debt, key, now_s)  # no other copy is known: nothing to see first
        ready = [key for key in debt.having(Stage.THERE) if self._droppable(debt, key)]
        if ready and not (debt.looked and debt.having(Stage.COMING)):
            self._seek_in_directory(debt, ready, now_s)
        elif debt.having(Stage.COMING):
            self._ask(debt, now_s)
        else:
            debt.rest(now_s)

    def _droppable(self, debt: Debt, key: Key) -> bool:
        shard = self._core.shards.get(debt.batch.namespace, key)
        return shard is None or not (shard.extent.holders or shard.pinned)

    def _seek_in_directory(self, debt: Debt, keys: list[Key], now_s: float) -> None:
        def then(nodes: Sequence[Sequence[str]] | None, why: str, at_s: float) -> None:
            debt.calling = False
            if debt.id not in self._book.debts:
                return
            debt.looked = True
            for key, having in zip(keys, nodes or (), strict=False):
                if debt.creditor in having and debt.stages.get(key) is Stage.THERE:
                    self._arrive(debt, key, at_s)
            debt.rest(at_s)
            self._book.wake(debt)

        debt.calling = True
        self._post.places(debt.batch.namespace, keys, then, now_s)

    def _arrive(self, debt: Debt, key: Key, now_s: float) -> None:
        """The creditor's copy is the one from now on; the others go."""
        place = (debt.batch.namespace, key)
        shard = self._core.shards.get(*place)
        if not self._droppable(debt, key):
            return
        if shard is not None and self._lent_out(*place):
            self._book.leave(debt, key, now_s, drop=True)  # somebody else needs ours here
            return
        self._book.arrived(debt, key, now_s)
        why = f"to {debt.creditor}: {debt.why}"
        if shard is None:
            self._core.story.note(now_s, *place, "lent", why)
            return
        self._core.drop(shard, "lent", why, now_s)
        self._rooms.gain(shard.extent.size_bytes)

    def _return(self, debt: Debt, leaving: list[Key], now_s: float) -> None:
        keys = [key for key in leaving if key in debt.dropping] or leaving
        whole = len(keys) == len(debt.stages)
        request = node_pb2.ReturnLoanRequest(
            debtor=self._me.node,
            debtor_incarnation=self._me.incarnation,
            loan=debt.id,
            keys=() if whole else keys,
            drop=keys[0] in debt.dropping,
        )

        def then(answer: node_pb2.ReturnLoanResponse | None, why: str, at_s: float) -> None:
            debt.calling = False
            if debt.id not in self._book.debts:
                return
            if answer is None:
                debt.next_s = at_s + RETRY_S
                self._book.wake(debt)
                return
            if debt.incarnation:
                debt.end = LoanState.RETURNED
            for key in keys:
                if debt.stages.get(key) is Stage.LEAVING:
                    self._core.story.note(
                        at_s, debt.batch.namespace, key, "returned", f"to {debt.creditor}"
                    )
                    self._book.remove(debt, key)
            debt.next_s = at_s
            self._book.close_if_empty(debt)
            self._book.wake(debt)

        self._call(debt, "ReturnLoan", request, then, now_s)

    def _no_answer(self, debt: Debt, why: str, now_s: float) -> None:
        debt.unanswered += 1
        debt.next_s = now_s + RETRY_S
        if debt.state is LoanState.REQUESTED:
            self._shy_until_s[debt.creditor] = now_s + SHY_S
            if debt.reclaims:  # nobody else can have them
                hopeless = now_s >= debt.begun_s + RECLAIM_S
            else:
                others = debt.search is not None and debt.search.has_others(debt.creditor)
                hopeless = others or debt.unanswered >= UNANSWERED
            if hopeless:
                self._abandon(debt, why, now_s)
        self._book.wake(debt)

    def _abandon(self, debt: Debt, why: str, now_s: float) -> None:
        """It may have lent all the same: it is told to forget it, for as long as it could."""
        if debt.search is not None:
            debt.search.refused(debt.creditor, f"{debt.creditor}: {why}", owes=False)
        for key in debt.having(Stage.ASKED):
            self._book.leave(debt, key, now_s, drop=True)
            self._mourn(debt, key, Stage.ASKED, why, now_s)

    def _mourn(self, debt: Debt, key: Key, was: Stage, why: str, now_s: float) -> None:
        """The key's last place was this loan, and somebody here needs it. What could not be
        claimed in place is looked for already."""
        place = (debt.batch.namespace, key)
        if (
            (was is Stage.AWAY or not debt.reclaims)
            and self._core.shards.claims(*place)
            and self._core.shards.get(*place) is None
            and place not in self._book.going
            and place not in self._book.away
        ):
            self._core.story.note(now_s, *place, "loan ended", f"{debt.creditor}: {why}")
            self.on_lost(debt, key, why, now_s)

    def _call(
        self,
        debt: Debt,
        name: str,
        request: node_pb2.LendRequest | node_pb2.ReturnLoanRequest,
        then: Callable[..., None],
        now_s: float,
    ) -> None:
        debt.calling = True
        self._post.call(debt.creditor, debt.endpoints, name, request, then, now_s)
        self._book.wake(debt)

    # What happens to shards here --------------------------------------------------------------

    def _sealed(self, shard: Shard, now_s: float) -> None:
        """What was lent is here again."""
        place = (shard.namespace, shard.key)
        debt = self._book.away.get(place)
        moving = self._book.going.get(place)
        if moving is not None and (debt is not None or moving.reclaims):
            self._book.leave(moving, shard.key, now_s, drop=True)
        if debt is not None:
            self._book.leave(debt, shard.key, now_s, drop=True)

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        debt = self._book.going.get((shard.namespace, shard.key))
        if debt is not None and what == "purged":
            self._book.leave(debt, shard.key, now_s, drop=True)

    def _unclaimed(self, namespace: NamespaceId, key: Key, now_s: float) -> None:
        """Nobody here needs it any more."""
        place = (namespace, key)
        drop = place in self._book.discarding
        for debt in (self._book.going.get(place), self._book.away.get(place)):
            if debt is not None:
                self._book.leave(debt, key, now_s, drop=drop)
