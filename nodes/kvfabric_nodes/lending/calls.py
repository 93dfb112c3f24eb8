"""Lending's shell: calls of other nodes in, its instructions carried out, results brought back.

It runs on the core's loop. Where nobody answers, lending is told so: it decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from kvfabric import failpoints
from kvfabric.clock import Clock
from kvfabric.errors import Denied, FabricError
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.copying.puller import Puller
from kvfabric_nodes.copying.pulls import Outcome, Pulled, PullOrder
from kvfabric_nodes.lending.core import Lending
from kvfabric_nodes.lending.instructions import (
    CALLS,
    AskCreditors,
    AskPlaces,
    AskReplicas,
    CallPeer,
    CancelFetch,
    Fetch,
    Instruction,
)
from kvfabric_nodes.lending.post import CALL_S
from kvfabric_nodes.lending.room import Room, RoomState
from kvfabric_nodes.reporting.inquiries import Inquiries
from kvfabric_nodes.serving.handler import Call
from kvfabric_nodes.store.promises import Session

NODE_TICK_S = 0.1  # the node ticks so often anyway
MIN_WAIT_S = 0.001  # a timer may be a little early
FAILPOINTS = {"ReturnLoan": "recall.returned", "RecallLoan": "recall.asked"}  # before it is sent


class LendingCalls:
    """See the module. `inquiries` None: there is no manager to ask."""

    def __init__(
        self,
        lending: Lending,
        peers: Peers,
        puller: Puller,
        clock: Clock,
        inquiries: Inquiries | None = None,
    ) -> None:
        self.inquiries = inquiries
        self._lending = lending
        self._peers = peers
        self._puller = puller
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        peers.met = self._met

    def calls(self) -> Mapping[str, Call]:
        """Between nodes only, by their names in lower case."""
        return {
            "lend": self._between_nodes(self._lend),
            "renew_loans": self._between_nodes(self._lending.renew_loans),
            "return_loan": self._between_nodes(self._lending.return_loan),
            "recall_loan": self._between_nodes(self._recall),
        }

    async def make_room(self, tenant: str, size_bytes: int, count: int, timeout_s: float) -> bool:
        """Seeks room by taking back and by borrowing: see handler.MakeRoom."""
        end: asyncio.Future[None] = self._loop.create_future()

        def told(_: Room) -> None:
            if not end.done():
                end.set_result(None)

        room = self._lending.make_room(
            tenant, size_bytes, count, timeout_s, self._clock.now(), told
        )
        self.carry_out()
        if not room.waiting:
            return room.state is RoomState.DONE
        try:
            await end
        finally:
            self._lending.cancel(room)
        return room.state is RoomState.DONE

    def claim(
        self,
        namespace: NamespaceId,
        tenant: str,
        layers: int,
        size_bytes: int,
        keys: Sequence[Key],
    ) -> None:
        """Keeps what lies at others: see Lending.claim. Whoever calls does not wait for it."""

        def claim() -> None:
            now_s = self._clock.now()
            self._lending.claim(namespace, tenant, layers, size_bytes, keys, now_s)
            self.carry_out()

        if self.inquiries is not None:
            self._loop.call_soon(claim)

    def command(self, command: control_pb2.Command, epoch: int, now_s: float) -> None:
        """One of the manager's that is lending's."""
        self._lending.command(command, epoch, now_s)
        self.carry_out()

    def tick(self, now_s: float) -> None:
        self._lending.tick(now_s)
        self.carry_out()

    def carry_out(self) -> None:
        """What lending wants now. To be called after each of its events."""
        for instruction in self._lending.take():
            self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
        wait_s = self._lending.due_s() - self._clock.now()
        soon = wait_s < NODE_TICK_S
        wait_s = max(MIN_WAIT_S, wait_s)
        self._timer = self._loop.call_later(wait_s, self._on_timer) if soon else None

    async def close(self) -> None:
        """Nothing more is asked or answered."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick(self._clock.now())

    def _met(self, node: str, incarnation: int) -> None:
        """A session with this node has begun. Told in one of the peers' threads."""

        def tell() -> None:
            self._lending.peer_lost(node, incarnation, self._clock.now())
            self.carry_out()

        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody to tell
            self._loop.call_soon_threadsafe(tell)

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, Fetch):
            self._fetch(instruction.order)
        elif isinstance(instruction, CancelFetch):
            self._puller.cancel("loan", instruction.order_id)
        elif isinstance(instruction, CallPeer):
            self._begin(self._call(instruction))
        elif isinstance(instruction, AskCreditors):
            self._begin(self._ask_creditors(instruction))
        elif isinstance(instruction, AskPlaces):
            self._begin(self._ask_places(instruction))
        elif isinstance(instruction, AskReplicas):
            self._begin(self._ask_replicas(instruction))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, wanted: CallPeer) -> None:
        name = CALLS[wanted.name]
        if wanted.name in FAILPOINTS:
            failpoints.reach(FAILPOINTS[wanted.name])
        why = ""
        try:
            response = await self._peers.call(
                wanted.node, wanted.endpoints, name, wanted.request, CALL_S
            )
        except FabricError as error:
            response, why = None, str(error)
            if self.inquiries is not None:  # it may have been started anew at another address
                self.inquiries.forget(wanted.node)
        if response is not None and name == "lend":
            failpoints.reach("borrow.reserved")
        self._lending.answered(wanted.ticket, response, self._clock.now(), why)
        self.carry_out()

    async def _ask_creditors(self, wanted: AskCreditors) -> None:
        answer = None
        if self.inquiries is not None:
            answer = await self.inquiries.borrow(
                wanted.size_bytes, wanted.exclude, self._lending.me.incarnation
            )
            failpoints.reach("borrow.asked")
        why = "" if answer is not None else "the manager does not answer"
        self._lending.creditors(wanted.ticket, answer, self._clock.now(), why)
        self.carry_out()

    async def _ask_places(self, wanted: AskPlaces) -> None:
        nodes = None
        if self.inquiries is not None:
            nodes = await self.inquiries.places(wanted.namespace, wanted.keys)
        if nodes is not None and any(nodes):
            failpoints.reach("borrow.seen")
        why = "" if nodes is not None else "the manager does not answer"
        self._lending.placed(wanted.ticket, nodes, self._clock.now(), why)
        self.carry_out()

    async def _ask_replicas(self, wanted: AskReplicas) -> None:
        found = None
        if self.inquiries is not None:
            found = await self.inquiries.replicas(wanted.namespace, wanted.keys)
        why = "" if found is not None else "the manager does not answer"
        self._lending.replicas(wanted.ticket, found, self._clock.now(), why)
        self.carry_out()

    def _fetch(self, order: PullOrder) -> None:
        try:
            self._puller.begin(order, self._fetched)
        except FabricError as error:
            self._loop.call_soon(self._fetched, Pulled.not_begun(order, str(error)))

    def _fetched(self, result: Pulled) -> None:
        if any(outcome is Outcome.COPIED for outcome in result.outcomes.values()):
            failpoints.reach("lend.sealed")
        self._lending.fetched(result, self._clock.now())
        self.carry_out()

    def _lend(self, request: node_pb2.LendRequest, now_s: float) -> node_pb2.LendResponse:
        response = self._lending.lend(request, now_s)
        failpoints.reach("lend.reserved")
        return response

    def _recall(
        self, request: node_pb2.RecallLoanRequest, now_s: float
    ) -> node_pb2.RecallLoanResponse:
        failpoints.reach("recall.heard")
        return self._lending.recall_loan(request, now_s)

    def _between_nodes(self, method: Callable[[Any, float], Any]) -> Call:
        def call(session: Session, request: Any, response: Any) -> None:
            if not session.between_nodes:
                raise Denied("loans are between nodes; this session shows no peer_token")
            response.CopyFrom(method(request, self._clock.now()))
            self.carry_out()

        return call
