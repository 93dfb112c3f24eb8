"""What a node lends out, and to whom: for room of its own, or as the manager plans."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.lending.borrowing import Borrower
from kvfabric_nodes.lending.debt_book import DEBTS, DebtBook
from kvfabric_nodes.lending.debts import Batch
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.room import Rooms
from kvfabric_nodes.lending.rounds import Offer, Round
from kvfabric_nodes.lending.terms import Identity
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Pool
from kvfabric_nodes.store.shards import Shard

NOTHING_TO_LEND = "all that is here is leased, pinned, kept for others, or not a sequence's"
LOAN_KEYS = 64  # of one loan
LENDS_IN_FLIGHT = 4  # loans that wait for their bytes
AHEAD_PART = 8  # a node that borrows takes this part of its memory at least, at most one loan,
#                 so that a sequence that grows does not borrow block by block
STUCK_S = 2.0  # what is leased now may be free by then; else there is no room
STUCK_POLL_S = 0.1
DRY_S = 1.0  # nobody is asked again for so long when nobody had room
COMMANDS = 1024  # of the manager, remembered so that a repeated one is known
PLANS = 64  # of the manager, under way at a time


class Victims(Protocol):
    """The node's own sealed blocks at home that may be lent, the best first: together about
    so many bytes, of one sequence or of all; a pool's own before others'."""

    def __call__(
        self,
        pool: Pool | None,
        size_bytes: int,
        skip: Callable[[Shard], bool] = ...,
        sequence_id: int = ...,
    ) -> Sequence[Shard]: ...


@dataclass(slots=True, eq=False)
class Plan:
    """A part of a sequence that the manager wants at a creditor."""

    sequence: int
    left_bytes: int
    why: str
    search: Round


Pick = Callable[[int], Batch | None]  # what to lend for so many bytes


class Seeker:
    """See the module. `go_on` is called after every event, and does what has become possible."""

    def __init__(
        self,
        core: NodeCore,
        me: Identity,
        post: Post,
        rooms: Rooms,
        book: DebtBook,
        borrower: Borrower,
        victims: Victims,
        lent_out: Callable[[NamespaceId, Key], bool],
    ) -> None:
        self.why_none = "no creditor has answered yet"  # of the last search
        self._core = core
        self._me = me
        self._post = post
        self._rooms = rooms
        self._book = book
        self._borrower = borrower
        self._victims = victims
        self._lent_out = lent_out
        self._search: Round | None = None  # for room
        self._dry_until_s = float("-inf")
        self._stuck_s: float | None = None  # since when there is nothing to lend
        self._look_s = 0.0  # when to look again
        self._plans: dict[tuple[int, str], Plan] = {}
        self._commands: dict[tuple[int, int], None] = {}

    def go_on(self, coming_bytes: int, now_s: float) -> None:
        """`coming_bytes`: of the room that is wanted, so much comes free by itself."""
        self._look_s = now_s + STUCK_POLL_S
        if self._rooms:
            self._make_room(coming_bytes, now_s)
        else:
            self._search = self._stuck_s = None
        for name, plan in list(self._plans.items()):
            why = self._carry_out(plan, now_s)
            if why or plan.left_bytes <= 0:
                del self._plans[name]

    def lend_out(self, command: control_pb2.Command, epoch: int, now_s: float) -> None:
        """The manager's plan. One that is known, or under way for this pair, counts once."""
        what = command.lend_out
        name = (what.sequence, what.creditor)
        known = (epoch, command.id) in self._commands or name in self._plans
        if known or len(self._plans) >= PLANS or what.creditor == self._me.node:
            return
        self._commands[epoch, command.id] = None
        if len(self._commands) > COMMANDS:
            del self._commands[next(iter(self._commands))]
        offer = Offer(what.creditor, what.endpoints, what.size_bytes)
        search = Round(self._post, (), now_s, named=offer)
        self._plans[name] = Plan(what.sequence, what.size_bytes, command.why, search)

    def search(self, barred: Collection[str], now_s: float) -> Round:
        """Anybody but these."""
        return Round(self._post, {self._me.node, *barred}, now_s, self._borrower.shy(now_s))

    def spread(
        self, search: Round, size_bytes: int, pick: Pick, why: str, now_s: float
    ) -> tuple[int, str]:
        """Borrows for so many bytes of whom the search names, one loan after the other: for
        how many it has asked, and why not for more (empty: wait)."""
        left_bytes = size_bytes
        while left_bytes > 0 and self._book.in_flight < LENDS_IN_FLIGHT:
            offer = search.offer(left_bytes, now_s)
            if offer is None:
                reason = search.reason if search.exhausted else ""
                return size_bytes - left_bytes, reason
            batch = pick(min(left_bytes, offer.free_bytes))
            if batch is None:
                return size_bytes - left_bytes, NOTHING_TO_LEND
            if len(self._book.debts) >= DEBTS:
                return size_bytes - left_bytes, f"{DEBTS} loans are open already"
            self._borrower.borrow(
                batch, offer.node, offer.endpoints, why, now_s, search, offer.last_resort
            )
            part = len(batch.keys) * batch.slot_bytes
            search.used(offer.node, part)
            left_bytes -= part
        return size_bytes - left_bytes, ""

    def due_s(self) -> float:
        """When leases may have ended; infinite: nobody waits for that."""
        return self._look_s if self._stuck_s is not None else float("inf")

    def check(self) -> None:
        """Asserts all invariants."""
        assert len(self._plans) <= PLANS
        assert len(self._commands) <= COMMANDS

    def _make_room(self, coming_bytes: int, now_s: float) -> None:
        short = self._rooms.missing_bytes - coming_bytes - self._book.freeing_bytes
        if short <= 0:
            return
        if now_s < self._dry_until_s:
            self._fail(self.why_none, coming_bytes)
            return
        if self._search is None or self._search.old(now_s):
            self._search = self.search((), now_s)
        pool = self._rooms.waiting[0].pool
        blocks = -(-self._rooms.missing_bytes // pool[1])
        ahead = min(self._core.extents.capacity_bytes // AHEAD_PART, LOAN_KEYS * pool[1])
        why_lent = f"no room for {blocks} block{'s' * (blocks > 1)}"
        asked_bytes, why = self.spread(
            self._search,
            max(short, ahead),
            lambda size: self._pick(pool, size),
            why_lent,
            now_s,
        )
        if asked_bytes:
            self._stuck_s = None
        if why:
            self.why_none = why
        if why == NOTHING_TO_LEND and not self._stuck(now_s):
            return
        if why and self._fail(why, coming_bytes):
            self._dry_until_s = now_s + DRY_S

    def _stuck(self, now_s: float) -> bool:
        """Whether nothing could be lent for so long that it is not worth the wait."""
        if self._stuck_s is None:
            self._stuck_s = now_s
        return now_s >= self._stuck_s + STUCK_S

    def _fail(self, why: str, coming_bytes: int) -> bool:
        """No room is to be had, unless some is on its way."""
        if coming_bytes > 0 or self._book.promised_bytes > 0:
            return False
        self._search = self._stuck_s = None
        self._rooms.fail(why)
        return True

    def _carry_out(self, plan: Plan, now_s: float) -> str:
        def pick(size_bytes: int) -> Batch | None:
            return self._pick(None, size_bytes, plan.sequence)

        asked_bytes, why = self.spread(plan.search, plan.left_bytes, pick, plan.why, now_s)
        plan.left_bytes -= asked_bytes
        return why

    def _pick(self, pool: Pool | None, size_bytes: int, sequence: int = 0) -> Batch | None:
        """Like shards, for one loan."""
        found = self._victims(pool, size_bytes, self._not_lendable, sequence)
        if not found:
            return None
        first = found[0]
        most = min(LOAN_KEYS, max(1, size_bytes // first.pool[1]))
        alike = [shard.key for shard in found if _kind(shard) == _kind(first)]
        return Batch(
            first.namespace,
            first.pool[0],
            first.layers or 1,
            first.size_bytes,
            first.pool[1],
            alike[:most],
            self._me.node,
            self._me.endpoints,
        )

    def _not_lendable(self, shard: Shard) -> bool:
        place = (shard.namespace, shard.key)
        taken = place in self._book.going or self._lent_out(*place)
        return taken or shard.pinned or shard.extent.holders > 0


def _kind(shard: Shard) -> tuple[object, ...]:
    return (shard.namespace, shard.pool, shard.layers, shard.size_bytes)
