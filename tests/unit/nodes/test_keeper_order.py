"""Whenever the node dies, what its keeper was told by then names no place that is somebody else's.

A core is driven by chance, its outbox writes to a keeper that takes as much as it likes and
loses nothing it took. After every step the keeper's table is held against the core: a record
may be missing, but where there is one, nobody has been granted its place since.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.nodes.conftest import Desk, key

from kvfabric_nodes.keeper import outbox, process, records
from kvfabric_nodes.keeper.client import KeeperLink
from kvfabric_nodes.keeper.outbox import Outbox
from kvfabric_nodes.keeper.process import Inbox, Op
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.shards import Shard

SEGMENTS, SEGMENT_BYTES = 4, 4096


class Loop:
    """Runs what was called, when it is told to."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        self.writers: dict[Any, Callable[[], None]] = {}

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.later.append(call)

    def add_reader(self, sock: Any, call: Callable[[], None]) -> None: ...
    def remove_reader(self, sock: Any) -> None: ...

    def add_writer(self, sock: Any, call: Callable[[], None]) -> None:
        self.writers[sock] = call

    def remove_writer(self, sock: Any) -> None:
        self.writers.pop(sock, None)

    def round(self) -> None:
        later, self.later = self.later, []
        for call in [*later, *self.writers.values()]:
            call()


class Link:
    """A keeper that takes what must be out, and of the rest as much as chance has it."""

    def __init__(self, chance: random.Random) -> None:
        self.sock = object()
        self.said = bytearray()
        self.urgent = False
        self._chance = chance

    def roomy(self) -> bool:
        return self._chance.random() < 0.7

    def send(self, data: bytes, descriptor: int | None = None) -> int:
        taken = len(data) if self.urgent else self._chance.randrange(len(data) + 1)
        self.said += data[:taken]
        return taken

    def table(self) -> dict[bytes, bytes]:
        """What a keeper has that heard this much."""
        table: dict[bytes, bytes] = {}
        left, right = socket.socketpair()
        inbox = Inbox()
        with left, right:
            for start in range(0, len(self.said), 8192):
                left.sendall(self.said[start : start + 8192])
                inbox.receive(right)
                for op, body in inbox.operations():
                    if op is Op.PUT:
                        table.update([process.unpack_put(body)])
                    else:
                        assert op is Op.DELETE
                        table.pop(body, None)
        return table


def kept(shard: Shard) -> bytes:
    """The operation that has a keeper keep the shard's key at its place."""
    return process.put(records.slot_key(shard.extent.segment, shard.extent.offset), shard.key)


class Machine:
    """A core, its outbox, and clients of two tenants."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES))
        self.desks = [Desk(self.core), Desk(self.core, "b")]
        self.link, self.loop = Link(chance), Loop()
        self.outbox = Outbox(cast(Any, self.loop), cast(KeeperLink, self.link), kept, pytest.fail)
        self.core.on_sealed.append(lambda shard, _: self.outbox.sealed(shard))
        self.core.on_pinned.append(self.outbox.sealed)
        self.core.on_dropped.append(lambda shard, *_: self.outbox.dropped(shard))
        self.core.on_granted.append(self.push)

    def push(self) -> None:
        self.link.urgent = True
        self.outbox.push()
        self.link.urgent = False

    def step(self) -> None:
        desk = self.chance.choice(self.desks)
        names = [key(self.chance.randrange(60)) for _ in range(self.chance.randrange(1, 6))]
        size_bytes = self.chance.choice([500, 1024, 2048])
        way = self.chance.randrange(8)
        if way <= 2:
            desk.put([*dict.fromkeys(names)], size_bytes)
        elif way == 3:
            desk.reserve([*dict.fromkeys(names)], size_bytes)
        elif way == 4:
            for reservation in list(desk.session.reservations.values()):
                self.core.abort(reservation)
        elif way == 5:
            self.core.purge(desk.session, desk.namespace, names, "", 0.0)
        elif way == 6:
            self.core.pin(desk.session, desk.namespace, names[:1])
            self.core.unpin(desk.session, desk.namespace, names[:1], 0.0)
        else:
            self.loop.round()

    def check(self) -> None:
        granted = {
            records.slot_key(item.extent.segment, item.extent.offset)
            for desk in self.desks
            for reservation in desk.session.reservations.values()
            for item in reservation.items.values()
        }
        sealed = {
            records.slot_key(shard.extent.segment, shard.extent.offset): shard.key
            for shard in self.core.shards
        }
        table = self.link.table()
        assert not table.keys() & granted, "a record of a place that is being written"
        for name in table.keys() & sealed.keys():
            assert table[name] == sealed[name], "a record of what lay there before"


@given(st.randoms(use_true_random=False))
def test_no_record_names_a_place_that_was_granted_since(chance: random.Random) -> None:
    machine = Machine(chance)
    for _ in range(chance.randrange(10, 60)):
        machine.step()
        machine.check()
    machine.link.urgent = True
    while not machine.outbox.empty:
        machine.loop.round()
    machine.check()
    assert machine.link.table().keys() == {
        records.slot_key(shard.extent.segment, shard.extent.offset) for shard in machine.core.shards
    }


def test_without_the_push_before_a_grant_this_would_be_found() -> None:
    found = 0
    for seed in range(50):
        machine = Machine(random.Random(seed))
        machine.core.on_granted.clear()
        try:
            for _ in range(60):
                machine.step()
                machine.check()
        except AssertionError:
            found += 1
    assert found >= 5


def test_no_more_waits_than_what_is_held_however_often_it_changes() -> None:
    machine = Machine(random.Random(0))
    machine.desks[0].put([key(n) for n in range(8)], 500)
    shards = list(machine.core.shards)
    for _ in range(1000):
        for shard in shards:
            machine.outbox.sealed(shard)
    assert len(machine.outbox._sealed) <= outbox.SWEEP_SHARDS + 2 * len(shards)
    machine.link.urgent = True
    while not machine.outbox.empty:
        machine.loop.round()

    told = [kept(shard)[process.HEADER.size :] for shard in shards]
    assert machine.link.table() == dict(map(process.unpack_put, told))
