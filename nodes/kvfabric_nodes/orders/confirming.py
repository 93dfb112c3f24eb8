"""Asks other nodes whether they have what is to be dropped here: see drops.py.

It acquires the keys there, so that they stay while the copies here go, and releases them.
Meanwhile it has pinned there what is pinned here, and opened groups for those here. A node
that does not answer has nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import structlog

from kvfabric import failpoints
from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Key, Status
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.orders.drops import FRESH_S, Question

log = structlog.get_logger(__name__)

CALL_S = 2.0
LEASE_S = CALL_S + FRESH_S  # then it ends by itself, if the asked node is not told

Told = Callable[[Question, Collection[Key], Mapping[int, int]], None]


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
        request = node_pb2.AcquireRequest(
            namespace_id=question.namespace,
            keys=question.keys,
            lease_ms=int(LEASE_S * 1000),
            without_checksums=True,
        )
        lease, held, groups = 0, frozenset[Key](), dict[int, int]()
        try:
            response: node_pb2.AcquireResponse = await self._call(question, "acquire", request)
            lease = response.lease
            held = _ok(question.keys, response.statuses)
            if question.pinned or question.groups:
                held -= await self._hand_over(question, held, groups)
                failpoints.reach("keep.handed")
        except FabricError as error:
            log.info("drop_not_confirmed", node=question.node, why=str(error))
            held = frozenset()
        told(question, held, groups)
        if lease:
            with contextlib.suppress(FabricError):  # it ends by itself, too
                await self._call(question, "release", node_pb2.ReleaseRequest(leases=[lease]))

    async def _hand_over(
        self, question: Question, held: frozenset[Key], groups: dict[int, int]
    ) -> set[Key]:
        """Has pinned and kept there what is here; the keys for which it was refused."""
        refused: set[Key] = set()
        if pinned := held.intersection(question.pinned):
            keys = sorted(pinned)
            pin = node_pb2.PinRequest(namespace_id=question.namespace, keys=keys)
            told: node_pb2.PinResponse = await self._call(question, "pin", pin)
            refused = set(pinned - _ok(keys, told.statuses))
        for keep in question.groups:
            if taken := held.intersection(keep.keys):
                wanted = node_pb2.OpenGroupRequest(
                    namespace_id=question.namespace,
                    keys=[key for key in keep.keys if key in taken],
                    life_ms=max(1, int(keep.life_s * 1000)),
                    detached=True,
                )
                opened = await self._call(question, "open_group", wanted)
                groups[keep.group] = opened.group
        return refused

    async def _call(self, question: Question, name: str, request: Any) -> Any:
        endpoints = types_pb2.Endpoints.FromString(question.endpoints)
        return await self._peers.call(question.node, endpoints, name, request, CALL_S)


def _ok(keys: Sequence[Key], statuses: Sequence[int]) -> frozenset[Key]:
    """An answer that is too short says nothing of the rest."""
    verdicts = zip(keys, statuses, strict=False)
    return frozenset(key for key, status in verdicts if status == Status.OK)
