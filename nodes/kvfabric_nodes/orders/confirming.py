"""Asks other nodes whether they have what is to be dropped here: see drops.py.

It acquires the keys there, so that they stay while the copies here go, and releases them.
A node that does not answer has nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

import structlog

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Key, Status
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.orders.drops import FRESH_S, Question

log = structlog.get_logger(__name__)

CALL_S = 2.0
LEASE_S = CALL_S + FRESH_S  # then it ends by itself, if the asked node is not told

Told = Callable[[Question, Collection[Key]], None]


class Confirming:
    """See the module. It runs on the core's loop."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, question: Question, told: Told) -> None:
        """Asks; `told` is called later, once, with the keys that the node has."""
        task = asyncio.get_running_loop().create_task(self._ask(question, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Nothing more is asked or told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, question: Question, told: Told) -> None:
        endpoints = types_pb2.Endpoints.FromString(question.endpoints)
        request = node_pb2.AcquireRequest(
            namespace_id=question.namespace,
            keys=question.keys,
            lease_ms=int(LEASE_S * 1000),
            without_checksums=True,
        )
        lease, held = 0, frozenset[Key]()
        try:
            response: node_pb2.AcquireResponse = await self._peers.call(
                question.node, endpoints, "acquire", request, CALL_S
            )
        except FabricError as error:
            log.info("drop_not_confirmed", node=question.node, why=str(error))
        else:
            lease = response.lease
            # An answer that is too short says nothing of the rest.
            verdicts = zip(question.keys, response.statuses, strict=False)
            held = frozenset(key for key, status in verdicts if status == Status.OK)
        told(question, held)
        if lease:
            with contextlib.suppress(FabricError):  # it ends by itself, too
                release = node_pb2.ReleaseRequest(leases=[lease])
                await self._peers.call(question.node, endpoints, "release", release, CALL_S)
