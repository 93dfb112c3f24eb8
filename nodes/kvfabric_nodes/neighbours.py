"""All that a node has to do with its manager and with other nodes, put together.

It runs on the core's loop. A node without a manager has no neighbours: it is never told
what nodes show each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvfabric import failpoints
from kvfabric.rpc.v1 import control_pb2
from kvfabric_nodes.copying.homing import Homing
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.copying.puller import Puller
from kvfabric_nodes.copying.pulls import PullLimits
from kvfabric_nodes.copying.transfer import OnCore
from kvfabric_nodes.lending.calls import LendingCalls
from kvfabric_nodes.lending.core import Lending
from kvfabric_nodes.lending.seeking import Victims
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.orders.commands import Commands
from kvfabric_nodes.orders.confirming import Confirming
from kvfabric_nodes.orders.state_moves import StateMoves
from kvfabric_nodes.reporting.heartbeat import Heartbeat
from kvfabric_nodes.sequences.groups import Groups
from kvfabric_nodes.sequences.handovers import Handovers
from kvfabric_nodes.serving.handler import Handler
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.shards import Shard


class Neighbours:
    """See the module. `heartbeat` None: there is no manager."""

    def __init__(
        self,
        handler: Handler,
        settings: NodeSettings,
        register: control_pb2.RegisterRequest,
        on_core: OnCore,
        victims: Victims,
        groups: Groups,
        handovers: Handovers,
    ) -> None:
        self._handler = handler
        self.peers = Peers(settings.node, register.endpoints.host)
        parallel = settings.parallel_pulls
        limits = PullLimits(parallel=parallel, throttled=parallel - 1)
        self.puller = Puller(handler, self.peers, on_core, limits)
        self._confirming = Confirming(self.peers)
        self.commands = Commands(handler, self.puller, self._confirming.ask, groups)
        self.heartbeat: Heartbeat | None = None
        if settings.manager:
            self.heartbeat = self._hear_manager(settings.manager, register)
        inquiries = self.heartbeat.inquiries if self.heartbeat else None
        self.homing = Homing(handler.core, self.puller, inquiries)
        me = Identity(register.node, register.incarnation, register.endpoints)
        terms = Terms(settings.lend_bytes, settings.loan_s, settings.recall_s)
        handler.metrics.lend_cap_bytes = terms.cap_bytes
        self.lending = Lending(handler.core, me, terms, victims)
        self.lending_calls = LendingCalls(
            self.lending, self.peers, self.puller, handler.clock, inquiries
        )
        self._open_lending()
        poke = self.heartbeat.poke if self.heartbeat else _nobody
        self.state_moves = StateMoves(handler, handovers, self.peers, self.puller, register, poke)
        handler.offer({"adopt_state": self.state_moves.adopt_state})
        self.commands.hand_over = self.state_moves.hand_over

    def learn_peer_token(self, token: bytes) -> None:
        """What the nodes of this fabric show each other, as the manager says."""
        self._handler.peer_token = self.peers.peer_token = token

    def tick(self, now_s: float) -> None:
        self.commands.tick(now_s)
        self.lending_calls.tick(now_s)
        self.peers.sweep()

    def check(self) -> None:
        """Asserts the invariants of all parts."""
        self.puller.pulls.check()
        self.commands.drops.check()
        self.lending.check()

    async def close(self) -> None:
        """While the core still answers: transfers end with their sessions."""
        ended = asyncio.get_running_loop().run_in_executor(None, self.peers.close)
        await self.puller.close()
        await self._confirming.close()
        await self.state_moves.close()
        await self.lending_calls.close()
        await ended

    def _hear_manager(self, manager: str, register: control_pb2.RegisterRequest) -> Heartbeat:
        handler = self._handler
        heartbeat = Heartbeat(handler.core, handler.metrics, manager, register)
        heartbeat.registered = self._registered
        heartbeat.obey = self.commands.obey
        heartbeat.reports.rates = self.puller.take_rates
        handler.locate = heartbeat.inquiries.locate
        seen_soon: list[list[Callable[[], Any]]] = [
            self.puller.on_copied,
            self.commands.on_dropped,
        ]
        for told in seen_soon:
            told.append(heartbeat.poke)
        return heartbeat

    def _open_lending(self) -> None:
        lending, calls, metrics = self.lending, self.lending_calls, self._handler.metrics
        self._handler.offer(calls.calls())
        self._handler.core.on_dropped.append(_note_lent)
        self.commands.lend = calls.command
        self.homing.whereabouts = lending.whereabouts
        metrics.gauges["lent_bytes"] = lambda: lending.lent_bytes
        metrics.gauges["borrowed_bytes"] = lambda: lending.borrowed_bytes
        metrics.gauges["loans"] = lambda: len(lending.loans().loan)
        metrics.gauges["pulls"] = lambda: len(self.puller.pulls)
        if self.heartbeat is not None:
            self._handler.make_room = calls.make_room
            self.heartbeat.reports.loans = lending.loans

    def _registered(self, answer: control_pb2.RegisterResponse) -> None:
        self.commands.registered()
        self.learn_peer_token(answer.peer_token)
        self.lending.me.incarnation = self._handler.metrics.incarnation


def _nobody() -> None:
    """There is no manager to be told."""


def _note_lent(shard: Shard, what: str, now_s: float) -> None:
    if what == "lent":
        failpoints.reach("borrow.dropped")
