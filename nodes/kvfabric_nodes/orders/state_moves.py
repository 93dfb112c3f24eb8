"""Heads of states on their way from this node to another, and from another one to this.

The source decides: until it has let go of a head, which it does when the destination has said
that it holds it, the head is the source's. The destination asks the source until it knows. See
handovers.py for why the death of either, at whatever moment, leaves one head at most.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from kvfabric import failpoints
from kvfabric.errors import DeadlineExceeded, Denied, FabricError, Retry, Unreachable
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric.types import Key
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.copying.puller import Puller
from kvfabric_nodes.copying.pulls import Outcome, PullOrder
from kvfabric_nodes.sequences.handovers import Adopted, Handovers, Offer, Said
from kvfabric_nodes.sequences.state_calls import checked_name
from kvfabric_nodes.sequences.states import Head, Name
from kvfabric_nodes.serving.handler import Handler
from kvfabric_nodes.store.promises import Session

log = structlog.get_logger(__name__)

AT_ONCE = 2  # heads that are handed over: more would be frozen while they wait
FROZEN_S = 5.0  # at least, where it is not known whether the other node has it
ADOPT_S = 4.0  # for one call: the other node may have to fetch the shard first
AGAIN_S = 0.1  # between two looks at whether a node that did not answer is dead
ASK_S = 2.0
FIRST_WAIT_S = 0.01  # between two questions to the source, twice as long after each
MOST_WAIT_S = 1.0
RESOLVE_S = 60.0  # a source that does not answer for so long has taken the head along


class StateMoves:
    """See the module. It runs on the core's loop. `moved` is told of each head that came or went,
    which the manager should hear of soon."""

    def __init__(
        self,
        handler: Handler,
        handovers: Handovers,
        peers: Peers,
        puller: Puller,
        me: control_pb2.RegisterRequest,
        moved: Callable[[], object],
    ) -> None:
        self._handler = handler
        self._handovers = handovers
        self._peers = peers
        self._puller = puller
        self._me = me
        self._moved = moved
        self._ids = itertools.count(1)
        self._handing: asyncio.Task[None] | None = None
        self._resolving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Nothing more is moved."""
        tasks = [*self._resolving, *([self._handing] if self._handing else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # From here

    def hand_over(self, wanted: control_pb2.Command.HandOver) -> None:
        """Begins to; while it is at work already nothing new begins."""
        if self._handing is None or self._handing.done():
            kept = control_pb2.Command.HandOver()
            kept.CopyFrom(wanted)
            self._handing = asyncio.get_running_loop().create_task(self._hand_all(kept))

    async def _hand_all(self, wanted: control_pb2.Command.HandOver) -> None:
        names = self._handovers.states.names()
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            await asyncio.gather(*(self._hand(name, wanted) for name in some))

    async def _hand(self, name: Name, wanted: control_pb2.Command.HandOver) -> None:
        offer = self._handovers.freeze(name, self._now() + FROZEN_S)
        if offer is None:
            return
        failpoints.reach("state.frozen")
        why = await self._offer(name, offer, wanted)
        if why:
            self._handovers.thaw(name)
            log.info("state_stays", to=wanted.destination, why=why)
            return
        failpoints.reach("state.agreed")
        self._handovers.leave(name, wanted.destination, self._now())
        failpoints.reach("state.left")
        self._moved()

    async def _offer(self, name: Name, offer: Offer, wanted: control_pb2.Command.HandOver) -> str:
        """Nothing, where the other node has adopted it; else why it has not, and never will."""
        request = node_pb2.AdoptStateRequest(
            namespace_id=name[0],
            name=name[1],
            version=offer.head.version,
            key=offer.head.key,
            source=self._me.node,
            endpoints=self._me.endpoints,
            incarnation=self._me.incarnation,
            offer=offer.number,
        )
        try:
            await self._call(wanted, "adopt_state", request, ADOPT_S)
            return ""
        except (Unreachable, DeadlineExceeded) as error:
            failure: FabricError = error
        except FabricError as error:  # its word
            return str(error)
        # Nobody knows: it stays frozen for as long as was promised, or until the other one is dead.
        question = node_pb2.ReadStateRequest(namespace_id=name[0], name=name[1])
        while not _nobody_there(failure) and self._now() < offer.until_s:
            await asyncio.sleep(AGAIN_S)
            try:
                await self._call(wanted, "read_state", question, ASK_S)
            except FabricError as error:
                failure = error
        return str(failure)

    async def _call(
        self, wanted: control_pb2.Command.HandOver, name: str, request: Any, timeout_s: float
    ) -> None:
        await self._peers.call(wanted.destination, wanted.endpoints, name, request, timeout_s)

    # To here

    def adopt_state(
        self,
        session: Session,
        request: node_pb2.AdoptStateRequest,
        response: node_pb2.AdoptStateResponse,
    ) -> Coroutine[Any, Any, None]:
        """Between nodes only."""
        if not session.between_nodes:
            raise Denied("states go from node to node; this session shows no peer_token")
        if self._handler.core.draining:
            raise Retry("this node is being drained, too; ask another one")
        name = checked_name(request)
        self._handovers.check_adoptable(name, request.source, request.offer)
        return self._adopt(name, request)

    async def _adopt(self, name: Name, request: node_pb2.AdoptStateRequest) -> None:
        await self._fetch(name, request)
        head = Head(request.version, Key(request.key))
        adopted = self._handovers.adopt(name, head, request.source, request.offer, self._now())
        failpoints.reach("state.adopted")
        offered = False
        try:
            offered = await self._ask(name, adopted, request) is False
        finally:  # also where the source goes meanwhile, and its call with it
            if not offered:
                self._handovers.give_up(name, adopted, self._now())
        if not offered:
            raise Retry("the source does not say that it still offers this state")
        task = asyncio.get_running_loop().create_task(self._resolve(name, adopted, request))
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    async def _fetch(self, name: Name, request: node_pb2.AdoptStateRequest) -> None:
        """Brings the shard here. Where the source has lost it, the head comes alone."""
        key = Key(request.key)
        order = PullOrder(
            id=next(self._ids),
            namespace=name[0],
            keys=(key,),
            source=request.source,
            endpoints=request.endpoints,
            priority=control_pb2.PRIORITY_REPAIR,  # clients wait for it
            origin="state",
            why="its state was handed over",
        )
        if self._handler.core.shards.get(name[0], key) is None:
            pulled = await self._puller.pull(order)
            if not (pulled.outcomes[key].here or pulled.outcomes[key] is Outcome.MISSING):
                raise Retry(f"the state's shard did not come: {pulled.why or 'no room'}")

    async def _resolve(
        self, name: Name, adopted: Adopted, request: node_pb2.AdoptStateRequest
    ) -> None:
        """Asks the source until it is known whose the head is."""
        wait_s, give_up_s = FIRST_WAIT_S, self._now() + RESOLVE_S
        known: bool | None = None
        while not known:
            await asyncio.sleep(wait_s)
            wait_s = min(MOST_WAIT_S, 2 * wait_s)
            known = await self._ask(name, adopted, request)
            if known is None and self._now() > give_up_s:
                known = self._handovers.hear(name, adopted, Said(), self._me.node, 0.0, self._now())
        self._moved()

    async def _ask(
        self, name: Name, adopted: Adopted, request: node_pb2.AdoptStateRequest
    ) -> bool | None:
        """Whether it is known now whose the head is. None: the source does not answer."""
        question = node_pb2.ReadStateRequest(namespace_id=name[0], name=name[1])
        asked_s = self._now()
        try:
            told: node_pb2.ReadStateResponse = await self._peers.call(
                request.source, request.endpoints, "read_state", question, ASK_S
            )
            said = Said(told.offer, told.node, told.frozen_ms / 1000)
            if not told.offer and told.incarnation != request.incarnation:
                said = Said(ended=True)  # a newer start, which knows nothing of it
        except FabricError as error:
            if not _nobody_there(error):
                return None
            said = Said(ended=True)
        return self._handovers.hear(name, adopted, said, self._me.node, asked_s, self._now())

    def _now(self) -> float:
        return self._handler.clock.now()


def _nobody_there(error: FabricError) -> bool:
    """Whether the process that had the address has ended: the machine says that nobody listens."""
    return isinstance(error, Unreachable) and isinstance(
        error.__cause__, ConnectionRefusedError | FileNotFoundError
    )
