"""A node's loans, both ways: what it borrows, what it lends, and the room it seeks.

Pure: calls and events go in with the time, instructions come out of `take`. The shell
takes them after every event and tick, carries them out, and brings the results back
(`creditors`, `answered`, `placed`, `replicas`, `fetched`). A process that dies takes its
side along; the other side notices by deadlines and incarnations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvfabric.lending.loans import to_columns
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.pulls import Pulled
from kvfabric_nodes.lending.borrowing import Borrower
from kvfabric_nodes.lending.claiming import Claimer, Kind, Replicas
from kvfabric_nodes.lending.credit_book import CreditBook
from kvfabric_nodes.lending.creditor import Creditor
from kvfabric_nodes.lending.debt_book import DebtBook
from kvfabric_nodes.lending.instructions import Instruction, Response
from kvfabric_nodes.lending.moving import Mover
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.recalls import Recalls
from kvfabric_nodes.lending.room import Room, Rooms
from kvfabric_nodes.lending.seeking import Seeker, Victims
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.lending.transit import Transit
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import slot_bytes


class Lending:
    """See the module. `victims` names what of the node's own may be lent out, best first."""

    def __init__(self, core: NodeCore, me: Identity, terms: Terms, victims: Victims) -> None:
        self.me = me
        self.terms = terms
        self._rooms = Rooms()
        self._post = Post()
        self._transit = Transit(core, self._post)
        self._debts = DebtBook(core, me)
        self._credits = CreditBook(core, me, terms, self._transit)
        self._recalls = Recalls(core, me, terms, self._post, self._credits)
        self._creditor = Creditor(
            core, me, terms, self._transit, self._rooms, self._credits, self._recalls, self._owes
        )
        lent_out = self._credits.holds
        self._borrower = Borrower(core, me, terms, self._post, self._rooms, self._debts, lent_out)
        self._seeker = Seeker(
            core, me, self._post, self._rooms, self._debts, self._borrower, victims, lent_out
        )
        self._mover = Mover(
            core, me, self._post, self._transit, self._rooms, self._debts, self._seeker
        )
        self._claimer = Claimer(core, me, self._post, self._debts, self._borrower)
        self._core = core
        core.on_unclaimed.append(self._unclaimed)

    # Room -------------------------------------------------------------------------

    def make_room(
        self,
        tenant: str,
        size_bytes: int,
        count: int,
        timeout_s: float,
        now_s: float,
        told: Callable[[Room], None] | None = None,
    ) -> Room:
        """Seeks room for `count` shards of this size and tenant, where the node itself has
        none: first by taking back what it lends, then by borrowing.

        `told` is called once, within some later event, when it ends: it must not call back.
        """
        pool = (tenant, slot_bytes(size_bytes))
        room = Room(pool, count * pool[1], now_s + timeout_s, told)
        self._rooms.add(room)
        if room.waiting:
            wanted = self._rooms.missing_bytes - self._recalls.coming_bytes
            self._recalls.recall_for(pool, wanted, now_s)
            self._go_on(now_s)
        return room

    def cancel(self, room: Room) -> None:
        """Who asked for it does not wait any more."""
        self._rooms.cancel(room)

    def claim(
        self,
        namespace: NamespaceId,
        tenant: str,
        layers: int,
        size_bytes: int,
        keys: Iterable[Key],
        now_s: float,
    ) -> None:
        """These like shards are needed here. Those that lie at other nodes are claimed there,
        bit by bit, as far as these agree; the others stay as they are."""
        kind = Kind(namespace, tenant, layers, size_bytes)
        self._claimer.claim(kind, keys, "a sequence here has it", now_s)
        self._go_on(now_s)

    # Calls of other nodes -----------------------------------------------------------

    def lend(self, request: node_pb2.LendRequest, now_s: float) -> node_pb2.LendResponse:
        return self._creditor.lend(request, now_s)

    def renew_loans(
        self, request: node_pb2.RenewLoansRequest, now_s: float
    ) -> node_pb2.RenewLoansResponse:
        return self._creditor.renew(request, now_s)

    def return_loan(
        self, request: node_pb2.ReturnLoanRequest, now_s: float
    ) -> node_pb2.ReturnLoanResponse:
        response = self._creditor.take_back(request, now_s)
        self._go_on(now_s)
        return response

    def recall_loan(
        self, request: node_pb2.RecallLoanRequest, now_s: float
    ) -> node_pb2.RecallLoanResponse:
        self._mover.recalled(request, now_s)
        self._go_on(now_s)
        return node_pb2.RecallLoanResponse()

    # Events ---------------------------------------------------------------------------

    def command(self, command: control_pb2.Command, epoch: int, now_s: float) -> None:
        """LendOut, BringHome and Recall of the manager; safe to repeat."""
        what = command.WhichOneof("what")
        if what == "lend_out":
            self._seeker.lend_out(command, epoch, now_s)
        elif what == "bring_home":
            self._mover.bring_home(command.bring_home, command.why, now_s)
        elif what == "recall":
            self._recalls.command(command.recall, command.why, now_s)
        self._go_on(now_s)

    def creditors(
        self,
        ticket: int,
        answer: control_pb2.BorrowResponse | None,
        now_s: float,
        why: str = "",
    ) -> None:
        """The answer to AskCreditors; None, and why, where there is none."""
        self._post.answered(ticket, answer, why, now_s)
        self._go_on(now_s)

    def answered(self, ticket: int, answer: Response | None, now_s: float, why: str = "") -> None:
        """The answer to CallPeer; None, and why, where there is none."""
        self._post.answered(ticket, answer, why, now_s)
        self._go_on(now_s)

    def placed(
        self, ticket: int, nodes: Sequence[Sequence[str]] | None, now_s: float, why: str = ""
    ) -> None:
        """The answer to AskPlaces: the nodes of each of its keys, in order."""
        self._post.answered(ticket, nodes, why, now_s)
        self._go_on(now_s)

    def replicas(self, ticket: int, found: Replicas | None, now_s: float, why: str = "") -> None:
        """The answer to AskReplicas: the nodes of each of its keys, in order, best first."""
        self._post.answered(ticket, found, why, now_s)
        self._go_on(now_s)

    def fetched(self, result: Pulled, now_s: float) -> None:
        """A Fetch has ended: nobody touches its reservation any more."""
        self._transit.fetched(result, now_s)
        self._go_on(now_s)

    def peer_lost(self, node: str, incarnation: int, now_s: float) -> None:
        """`incarnation` 0: the node is gone. Else it is there as this one, and what it had
        before is gone."""
        self._creditor.peer_lost(node, incarnation, now_s)
        self._borrower.peer_lost(node, incarnation, now_s)
        self._go_on(now_s)

    def discard(self, namespace: NamespaceId, keys: Sequence[Key]) -> None:
        """Once nobody here claims these, their lent copies are dropped, not kept as cache."""
        self._debts.discard(namespace, keys)

    def tick(self, now_s: float) -> None:
        self._post.tick(now_s)
        self._creditor.tick(now_s)
        self._rooms.tick(now_s, self._seeker.why_none)
        self._go_on(now_s)

    def take(self) -> list[Instruction]:
        """What is to be carried out now, in this order."""
        return self._post.take()

    def due_s(self) -> float:
        """When `tick` has something to do; infinite: nothing."""
        parts = (self._post, self._credits, self._borrower, self._seeker, self._rooms)
        return min(self._claimer.next_s, *(part.due_s() for part in parts))

    # Questions ------------------------------------------------------------------------

    def whereabouts(self, namespace: NamespaceId, key: Key) -> str | None:
        """The creditor that has this key for us, and we not any more."""
        return self._debts.whereabouts(namespace, key)

    def loans(self) -> control_pb2.Loans:
        """Every loan that has not ended, lent and borrowed, as this side sees it."""
        return to_columns([*self._credits.loans(), *self._debts.loans()])

    @property
    def lent_bytes(self) -> int:
        return self._credits.lent_bytes

    @property
    def borrowed_bytes(self) -> int:
        return self._debts.borrowed_bytes

    def check(self) -> None:
        """Asserts all invariants."""
        self._rooms.check()
        self._transit.check()
        self._credits.check()
        self._debts.check()
        self._seeker.check()
        self._mover.check()
        self._claimer.check()

    def _unclaimed(self, namespace: NamespaceId, key: Key, now_s: float) -> None:
        """What nobody needs any more can be evicted: room for whoever waits."""
        shard = self._core.shards.get(namespace, key)
        if self._rooms and shard is not None and not shard.pinned:
            self._rooms.gain(shard.extent.size_bytes)

    def _owes(self) -> bool:
        return self._debts.owes

    def _go_on(self, now_s: float) -> None:
        """Does what has become possible, or is due."""
        self._borrower.run(now_s)
        self._claimer.run(now_s)
        self._mover.go_on(now_s)
        coming_bytes = self._recalls.coming_bytes if self._rooms else 0
        self._seeker.go_on(coming_bytes, now_s)
