"""Calls on sequences that wait: for room on other nodes, and for blocks to come home.

What lends here stands in for lending: it takes blocks out of the node, remembers their bytes,
and brings them back.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import kvfabric_client
from kvfabric import checksums
from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, Namespace, NamespaceId, Status
from kvfabric_nodes.node import Node
from kvfabric_nodes.serving import server

from .conftest import Start, address, core_of, key, payload
from .test_grpc import Guest
from .test_sequence_calls import BLOCK_BYTES, LAYERS, TOKENS, Wire, Writer, block

MEMORY_BYTES = 4 * BLOCK_BYTES


class Lender:
    """Another node's memory. `gate`: asked for room, it waits until this is set."""

    def __init__(self, node: Node) -> None:
        self.core = core_of(node)
        self.sequences = node.sequences
        self.arena = node.sequence_calls._handler.arena
        self.lent: dict[tuple[NamespaceId, Key], bytes] = {}
        self.asked: list[tuple[str, int, int]] = []
        self.has_room = True
        self.gate: asyncio.Event | None = None
        self.waits = threading.Event()
        room = node.sequence_calls.room
        room.make_room = node.sequence_calls._handler.make_room = self.make_room
        room.fetch_home = self.fetch_home
        room.whereabouts = lambda space, key: "n1" if (space, key) in self.lent else None

    async def make_room(self, tenant: str, size_bytes: int, count: int, within_s: float) -> bool:
        assert within_s > 0
        self.asked.append((tenant, size_bytes, count))
        self.waits.set()
        if self.gate is not None:
            await asyncio.wait_for(self.gate.wait(), 20)
        if not self.has_room:
            return False
        for shard in self.sequences.victims((tenant, size_bytes), size_bytes * count):
            view = self.arena.view(shard.extent.segment, shard.extent.offset, shard.size_bytes)
            self.lent[shard.namespace, shard.key] = bytes(view)
            self.core.drop(shard, "lent", "to make room", 0.0)
        return True

    async def fetch_home(self, namespace: NamespaceId, keys: Sequence[Key]) -> None:
        session = self.core.open_session("default", "lender")
        for wanted in keys:
            data = self.lent.pop((namespace, wanted))
            victims = self.sequences.victims(("default", len(data)), len(data))
            if self.core.books().free_bytes < len(data) and victims:
                (victim,) = victims[-1:]
                view = self.arena.view(victim.extent.segment, victim.extent.offset, len(data))
                self.lent[namespace, victim.key] = bytes(view)
                self.core.drop(victim, "lent", "to make room", 0.0)
            reservation, _ = self.core.reserve(
                session, namespace, [wanted], [None], [len(data)], LAYERS, 10.0, 0.0, 0.0
            )
            item = reservation.items[0]
            self.arena.view(item.extent.segment, item.extent.offset, len(data))[:] = data
            sums = checksums.checksums(memoryview(data), LAYERS)
            assert self.core.seal(reservation, 0, sums, 0.0).status is Status.OK
        self.core.close_session(session, 0.0)


@pytest.fixture
def node(start: Start) -> Node:
    """Room for four blocks."""
    return start(memory=MEMORY_BYTES, segment=BLOCK_BYTES, grpc="127.0.0.1:0")


@pytest.fixture
def lender(node: Node) -> Lender:
    return Lender(node)


@pytest.fixture
def wire(node: Node) -> Iterator[Wire]:
    with contextlib.closing(Wire(node)) as wire:
        yield wire


def describe(writer: Writer) -> Any:
    return writer.link.call("Describe", node_pb2.DescribeRequest(sequence=writer.id))


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """What it answers, or the error that it raised."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(call())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_a_sequence_outgrows_its_node(node: Node, lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(*range(1, 13))

    described = describe(writer)

    assert described.length == 12 * TOKENS
    assert sorted(described.nodes) == ["n0", "n1"]
    places = [described.nodes[place] for place in described.place]
    assert places == ["n1"] * places.count("n1") + ["n0"] * 4  # the oldest were lent first
    assert ("default", BLOCK_BYTES, 1) in lender.asked
    (column,) = node.sequences.columns().remote_bytes
    assert column == places.count("n1") * BLOCK_BYTES


def test_without_a_lender_there_are_as_many_blocks_as_there_is_room(wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3)

    answer = writer.call("Extend", blocks=3)

    assert len(answer.tails.segments) == 1
    assert "no room for" in answer.reason


def test_extend_seeks_room_no_longer_than_there_is_some(lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4)
    lender.has_room = False

    answer = writer.call("Extend", blocks=2, deadline_ms=5000)

    assert not answer.tails.segments
    assert "no room for" in answer.reason
    assert lender.asked == [("default", BLOCK_BYTES, 2)]


def test_a_plain_put_borrows_where_sequences_need_everything(lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4)
    request = node_pb2.ReserveRequest(
        namespace_id=wire.space, keys=[key(8), key(9)], size_bytes=[BLOCK_BYTES], layers=LAYERS
    )

    answer = wire.call("Reserve", request)

    assert list(answer.statuses) == [Status.OK, Status.OK]
    assert lender.asked == [("default", BLOCK_BYTES, 2)]
    wire.call("Abort", node_pb2.AbortRequest(reservation=answer.reservation))


def test_a_put_that_may_not_wait_leaves_nothing_reserved(
    lender: Lender, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    Writer(wire).put(1, 2, 3)
    monkeypatch.setattr(server, "MAX_WAITING_CALLS", 0)
    request = node_pb2.ReserveRequest(
        namespace_id=wire.space, keys=[key(11), key(12)], size_bytes=[BLOCK_BYTES]
    )
    with pytest.raises(Retry, match="wait on this connection"):
        wire.call("Reserve", request)
    stats = wire.call("Stats", node_pb2.StatsRequest()).stats
    assert stats.tiers[0].reserved_bytes == 0
    assert stats.reservations == 0


@pytest.mark.parametrize("kind", ["unix", "tcp", "grpc"])
def test_so_does_a_put_over_any_transport(
    node: Node, lender: Lender, wire: Wire, kind: str
) -> None:
    Writer(wire).put(1, 2, 3, 4)

    if kind == "grpc":
        guest = Guest(node)
        with contextlib.closing(guest.channel):
            shard = payload(8, BLOCK_BYTES)
            statuses = [list(answer.statuses) for answer in guest.write({8: shard})]
            assert statuses == [[Status.OK], [Status.OK]]
            assert guest.read(8)[1] == {0: shard.tobytes()}
    else:
        with kvfabric_client.connect(address(node, kind), timeout_s=20) as client:
            room = client.open(Namespace("default", b"f" * 32))
            assert room.put([key(8)], [payload(8, BLOCK_BYTES)]) == [Status.OK]

    assert lender.asked == [("default", BLOCK_BYTES, 1)]


def test_a_writer_that_is_fenced_while_it_waits_gets_a_conflict(
    node: Node, lender: Lender, wire: Wire
) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4)
    lender.gate = asyncio.Event()
    thread, got = in_thread(lambda: writer.call("Extend", blocks=1, deadline_ms=20_000))
    assert lender.waits.wait(20)

    with contextlib.closing(Wire(node)) as heir:
        Writer(heir, resume=writer.id)
        assert node._loop is not None
        node._loop.call_soon_threadsafe(lender.gate.set)
        thread.join(20)

    assert [type(error) for error in got] == [Conflict]


def test_a_session_that_dies_while_it_waits_leaves_nothing_open(node: Node, lender: Lender) -> None:
    dying = Wire(node)
    writer = Writer(dying)
    writer.put(1, 2, 3, 4)
    lender.gate = asyncio.Event()
    request = node_pb2.ExtendRequest(
        sequence=writer.id, epoch=writer.epoch, blocks=1, deadline_ms=20_000
    )
    dying.life.tell("extend", request, deadline_s=1e12)
    assert lender.waits.wait(20)
    dying.close()

    with contextlib.closing(Wire(node)) as heir:
        resumed = Writer(heir, resume=writer.id)
        lender.gate = None
        resumed.put(5)
        assert describe(resumed).length == 5 * TOKENS


def test_a_cut_block_comes_home_first(lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4, 5)
    assert (NamespaceId(wire.space), key(1)) in lender.lent

    answer = writer.call("Truncate", tokens=3)

    assert answer.length == 3
    writer.call("Append", start=3, tokens=TOKENS - 3)  # what was copied, as it is
    assert writer.seal(1) == [Status.EXISTS]
    writer.call("Truncate", tokens=0)
    writer.put(9)


def test_a_fork_waits_for_room_for_the_block_it_copies(lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4)

    fork = wire.call("Fork", node_pb2.ForkRequest(sequence=writer.id, tokens=4 * TOKENS - 1))

    assert len(fork.tails.segments) == 1
    assert fork.tails.first_token == 3 * TOKENS
    assert lender.lent


def test_what_is_lost_cannot_be_cut(node: Node, lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2)
    wire.call("Purge", node_pb2.PurgeRequest(namespace_id=wire.space, keys=[key(2)]))

    described = describe(writer)
    assert list(described.place) == [0, 1]  # 1: no node
    with pytest.raises(Refused, match="is lost"):
        writer.call("Truncate", tokens=TOKENS + 1)
    assert writer.call("Truncate", tokens=TOKENS).length == TOKENS


def test_what_lies_elsewhere_cannot_be_cut_without_a_way_home(
    node: Node, lender: Lender, wire: Wire
) -> None:
    writer = Writer(wire)
    writer.put(1, 2, 3, 4, 5)
    node.sequence_calls.room.fetch_home = None

    with pytest.raises(Retry, match="lies on node n1 and has to come home"):
        writer.call("Truncate", tokens=1)

    assert describe(writer).length == 5 * TOKENS


def test_an_accepted_attempt_may_end_within_a_sealed_block(lender: Lender, wire: Wire) -> None:
    writer = Writer(wire)
    writer.put(1, 2)
    request = node_pb2.ForkRequest(sequence=writer.id, tokens=2 * TOKENS, tentative=True)
    fork = wire.call("Fork", request)

    answer = writer.call("Accept", fork=fork.sequence, tokens=TOKENS + 2)

    assert (answer.length, answer.tails.first_token) == (TOKENS + 2, TOKENS)
    writer.call("Append", start=TOKENS + 2, tokens=TOKENS - 2)
    sums = checksums.checksums(block(2), LAYERS)
    assert list(writer.call("Seal", keys=[key(7)], checksums=sums).statuses) == [Status.OK]
