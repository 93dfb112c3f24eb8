"""Shards copied between real nodes of this process; their books are proven at the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import DeadlineExceeded, Denied, Unreachable
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import control_pb2, node_pb2, types_pb2
from kvfabric.types import Key, Namespace, Status
from kvfabric.wire.connection import Connection
from kvfabric_client import Room
from kvfabric_nodes.copying import peers as peers_module
from kvfabric_nodes.copying.pulls import MIN_BYTES_PER_S, Outcome, Pulled, PullLimits, PullOrder
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.core import NodeCore

from .conftest import key

SPACE = Namespace("default", b"f" * 32)
SPACE_ID = namespace_id(SPACE)
SHARD_BYTES = 200_000
SEGMENT_BYTES = 1 << 20
DEADLINE_S = 30.0
TOKEN = b"p" * 32
KEYS = [key(number) for number in range(20)]
MANY = [key(number) for number in range(70)]  # more than the sockets' buffers take

Start = Callable[..., Node]
T = TypeVar("T")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    nodes: list[Node] = []

    def start_node(name: str, **options: Any) -> Node:
        given: dict[str, Any] = {"memory": 16 * SEGMENT_BYTES, "segment": SEGMENT_BYTES}
        given |= options
        node = Node(
            NodeSettings(node=name, runtime_dir=tmp_path / "run", grpc="", metrics="", **given)
        )
        node.start()
        node.neighbours.learn_peer_token(TOKEN)
        nodes.append(node)
        return node

    try:
        yield start_node
        for node in nodes:
            if not node.wait(0):
                node.check()
    finally:
        for node in nodes:
            node.stop()


@pytest.fixture
def source(start: Start) -> Node:
    return start("source")


@pytest.fixture
def target(start: Start) -> Node:
    return start("target")


@contextlib.contextmanager
def room_of(node: Node) -> Iterator[Room]:
    address = f"unix:{node.endpoints.unix_path}"
    with kvfabric_client.connect(address, timeout_s=DEADLINE_S) as client:
        yield client.open(SPACE)


def payload(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, SHARD_BYTES, dtype=np.uint8)


def put(node: Node, keys: list[Key], **options: Any) -> None:
    with room_of(node) as room:
        parents = [None, *keys[:-1]]
        shards = [payload(k[0]) for k in keys]
        statuses = room.put(keys, shards, parents=parents, layers=4, **options)
        assert statuses == [Status.OK] * len(keys)


def core_of(node: Node) -> NodeCore:
    assert node._core is not None
    return node._core


def endpoints_of(node: Node, kind: str) -> types_pb2.Endpoints:
    if kind == "unix":
        return node.endpoints
    return types_pb2.Endpoints(host="another", tcp_address=node.endpoints.tcp_address)


def on(node: Node, call: Callable[[], T]) -> T:
    """Runs `call` where the node's core lives."""
    assert node._loop is not None

    async def run() -> T:
        return call()

    return asyncio.run_coroutine_threadsafe(run(), node._loop).result(DEADLINE_S)


def begin_pull(
    target: Node,
    source: Node,
    keys: list[Key],
    kind: str = "unix",
    *,
    number: int = 1,
    **options: Any,
) -> Callable[[], Pulled]:
    """Orders a pull; what it answers waits for the end."""
    endpoints = endpoints_of(source, kind)
    name = source.settings.node
    order = PullOrder(number, SPACE_ID, tuple(keys), name, endpoints, origin="test", **options)
    assert target._loop is not None
    work = target.neighbours.puller.pull(order)
    end = asyncio.run_coroutine_threadsafe(work, target._loop)
    return lambda: end.result(DEADLINE_S)


def pull(target: Node, source: Node, keys: list[Key], kind: str = "unix", **options: Any) -> Pulled:
    return begin_pull(target, source, keys, kind, **options)()


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def assert_sent(node: Node, size_bytes: int) -> None:
    """The node counts a little after its last byte has arrived."""
    flows = node.neighbours._handler.metrics.read.values()
    wait_for(lambda: sum(flow.size_bytes for flow in flows) >= size_bytes)
    assert sum(flow.size_bytes for flow in flows) == size_bytes


def be_impatient(node: Node) -> None:
    node.neighbours.puller.pulls.limits = PullLimits(attempts=2, retry_s=0.01)


def outcomes(pulled: Pulled) -> list[Outcome]:
    return list(pulled.outcomes.values())


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_pull_copies_shards_with_all_that_belongs_to_them(
    source: Node, target: Node, kind: str
) -> None:
    put(source, KEYS, ttl_s=500.0)

    pulled = pull(target, source, KEYS, kind)

    assert outcomes(pulled) == [Outcome.COPIED] * len(KEYS)
    assert pulled.size_bytes == len(KEYS) * SHARD_BYTES
    with room_of(target) as room:
        for number, copy in enumerate(room.get(KEYS)):
            assert copy is not None
            assert np.array_equal(copy, payload(number))
    here, there = core_of(target).shards, core_of(source).shards
    for each in KEYS:
        copied, original = here.get(SPACE_ID, each), there.get(SPACE_ID, each)
        assert copied is not None
        assert original is not None
        for name in ("parent", "owner", "layers", "checksums", "pool"):
            assert getattr(copied, name) == getattr(original, name)
        assert copied.expires_s == pytest.approx(original.expires_s, abs=20)


def test_shards_without_checksums_stay_without(source: Node, target: Node) -> None:
    address = f"unix:{source.endpoints.unix_path}"
    with kvfabric_client.connect(address, checksums=False) as client:
        client.open(SPACE).put(KEYS[:2], [payload(0), payload(1)])
    assert outcomes(pull(target, source, KEYS[:2])) == [Outcome.COPIED] * 2
    copied = core_of(target).shards.get(SPACE_ID, KEYS[0])
    assert copied is not None
    assert (copied.layers, copied.checksums) == (0, ())


def test_what_the_source_lacks_is_missing_and_what_is_here_is_held(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:3])
    put(target, KEYS[2:3])
    pulled = pull(target, source, KEYS[:4])
    assert outcomes(pulled) == [Outcome.COPIED, Outcome.COPIED, Outcome.HELD, Outcome.MISSING]
    assert_sent(source, 2 * SHARD_BYTES)


def test_a_copy_to_another_node_is_no_use_of_a_shard(source: Node, target: Node) -> None:
    put(source, KEYS[:1])
    shard = core_of(source).shards.get(SPACE_ID, KEYS[0])
    assert shard is not None
    before = (shard.last_used, shard.reads)
    assert outcomes(pull(target, source, KEYS[:2])) == [Outcome.COPIED, Outcome.MISSING]
    assert (shard.last_used, shard.reads) == before
    assert (core_of(source).tally.hits, core_of(source).tally.misses) == (0, 0)


def test_a_large_pull_measures_the_link(source: Node, target: Node) -> None:
    put(source, MANY)
    pull(target, source, MANY[:1])
    assert target.neighbours.puller.take_rates() == {}  # too little to tell
    pull(target, source, MANY)
    rates = on(target, target.neighbours.puller.take_rates)
    assert list(rates) == ["source"]
    assert rates["source"] > 0
    assert on(target, target.neighbours.puller.take_rates) == {}


def test_two_pulls_of_the_same_keys_copy_them_once(source: Node, target: Node) -> None:
    put(source, KEYS)
    ends = [begin_pull(target, source, KEYS, number=number) for number in range(3)]
    ends.append(begin_pull(target, source, KEYS, number=2))  # the same order again
    for end in ends:
        assert all(outcome.here for outcome in end().outcomes.values())
    assert_sent(source, len(KEYS) * SHARD_BYTES)


def test_a_damaged_shard_is_not_taken_and_the_source_drops_it(source: Node, target: Node) -> None:
    put(source, KEYS[:4])
    damaged = core_of(source).shards.get(SPACE_ID, KEYS[2])
    assert damaged is not None
    arena = source.neighbours._handler.arena
    arena.view(damaged.extent.segment, damaged.extent.offset, 1)[0] ^= 1

    pulled = pull(target, source, KEYS[:4])

    expected = [Outcome.COPIED, Outcome.COPIED, Outcome.DAMAGED, Outcome.COPIED]
    assert outcomes(pulled) == expected
    assert "the source was told" in pulled.why
    assert core_of(target).shards.get(SPACE_ID, KEYS[2]) is None
    assert core_of(source).shards.get(SPACE_ID, KEYS[2]) is None
    assert target.neighbours._handler.metrics.mismatches["pull"] == 1


def test_a_full_node_takes_what_it_has_room_for_and_no_byte_more(
    source: Node, start: Start
) -> None:
    put(source, KEYS)
    small = start("small", memory=2 * SEGMENT_BYTES)
    pulled = pull(small, source, KEYS)
    assert outcomes(pulled) == [Outcome.COPIED] * 10 + [Outcome.FULL] * 10
    assert "no room" in pulled.why
    assert_sent(source, 10 * SHARD_BYTES)


@pytest.mark.parametrize("evict", [False, True])
def test_colder_cache_goes_for_a_pull_only_if_the_order_says_so(
    source: Node, start: Start, evict: bool
) -> None:
    put(source, KEYS[:2])
    small = start("small", memory=SEGMENT_BYTES)
    put(small, KEYS[10:15])
    pulled = pull(small, source, KEYS[:2], evict=evict)
    assert set(outcomes(pulled)) == {Outcome.COPIED if evict else Outcome.FULL}
    left = [key for key in KEYS[10:15] if core_of(small).shards.get(SPACE_ID, key)]
    assert len(left) == (3 if evict else 5)


def test_a_draining_node_takes_nothing_in(source: Node, target: Node) -> None:
    put(source, KEYS[:2])
    core_of(target).draining = True
    assert outcomes(pull(target, source, KEYS[:2])) == [Outcome.FULL] * 2


def test_room_that_was_reserved_before_is_filled_and_what_is_left_of_it_freed(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:3])
    core = core_of(target)

    def reserve() -> Any:
        session = core.open_session("", "loans", shares_memory=False)
        session.between_nodes = True
        keys, sizes = KEYS[:4], [SHARD_BYTES, SHARD_BYTES, 64, SHARD_BYTES]
        return core.reserve(
            session,
            SPACE_ID,
            keys,
            [None] * 4,
            sizes,
            4,
            60.0,
            0.0,
            0.0,
            streamed=True,
            tenant="default",
        )[0]

    reservation = on(target, reserve)
    assert reservation is not None
    pulled = pull(target, source, KEYS[:4], reservation=reservation)
    expected = [Outcome.COPIED, Outcome.COPIED, Outcome.FAILED, Outcome.MISSING]
    assert outcomes(pulled) == expected
    assert not reservation.items
    assert on(target, lambda: core.books().reserved_bytes) == 0
    second = core.shards.get(SPACE_ID, KEYS[1])
    assert second is not None
    assert second.parent == KEYS[0]  # which the reservation did not know


def test_a_connection_that_is_cut_costs_only_time(source: Node, target: Node) -> None:
    put(source, MANY)
    end = begin_pull(target, source, MANY, bytes_per_s=16 * MIN_BYTES_PER_S)
    wait_for(lambda: core_of(target).books().reserved_bytes)
    session = target.neighbours.peers._places["source"].session
    assert session is not None
    session.close()
    pulled = end()
    assert outcomes(pulled) == [Outcome.COPIED] * len(MANY)
    assert pulled.why


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_source_that_ends_in_the_middle_costs_what_had_not_come(
    source: Node, target: Node, kind: str
) -> None:
    put(source, MANY)
    be_impatient(target)
    end = begin_pull(target, source, MANY, kind, bytes_per_s=8 * MIN_BYTES_PER_S)
    wait_for(lambda: core_of(target).books().reserved_bytes)
    source.stop()
    pulled = end()
    came = outcomes(pulled).count(Outcome.COPIED)
    assert outcomes(pulled) == [Outcome.COPIED] * came + [Outcome.FAILED] * (len(MANY) - came)
    assert came < len(MANY)
    assert holds(target, MANY) == [True] * came + [False] * (len(MANY) - came)
    assert core_of(target).books().reserved_bytes == 0


def test_a_node_that_stops_ends_its_pulls(source: Node, target: Node) -> None:
    put(source, KEYS)
    begin_pull(target, source, KEYS, bytes_per_s=MIN_BYTES_PER_S)
    wait_for(lambda: core_of(target).books().reserved_bytes)
    target.stop()
    assert target.wait(DEADLINE_S)
    wait_for(lambda: not core_of(source).sessions)


def test_a_pull_that_is_cancelled_ends_soon(source: Node, target: Node) -> None:
    put(source, KEYS)
    end = begin_pull(target, source, KEYS, bytes_per_s=MIN_BYTES_PER_S)
    wait_for(lambda: core_of(target).books().reserved_bytes)
    on(target, lambda: target.neighbours.puller.cancel("test", 1))
    assert Outcome.CANCELLED in outcomes(end())
    assert core_of(target).books().reserved_bytes == 0


def pull_from(target: Node, name: str, endpoints: types_pb2.Endpoints) -> Pulled:
    order = PullOrder(1, SPACE_ID, tuple(KEYS[:2]), name, endpoints, origin="test")
    assert target._loop is not None
    work = target.neighbours.puller.pull(order)
    return asyncio.run_coroutine_threadsafe(work, target._loop).result(DEADLINE_S)


def test_another_node_at_the_sources_address_is_not_the_source(source: Node, target: Node) -> None:
    put(source, KEYS[:2])
    be_impatient(target)
    pulled = pull_from(target, "gone", source.endpoints)
    assert outcomes(pulled) == [Outcome.FAILED] * 2
    assert "is node source now" in pulled.why


def test_a_node_that_cannot_be_reached_over_its_socket_is_over_tcp(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:2])
    endpoints = types_pb2.Endpoints()
    endpoints.CopyFrom(source.endpoints)
    endpoints.unix_path += ".of-another-container"
    assert outcomes(pull_from(target, "source", endpoints)) == [Outcome.COPIED] * 2


# Who is a peer ------------------------------------------------------------------------


def hello(node: Node, **options: Any) -> node_pb2.HelloResponse:
    connection = Connection(f"unix:{node.endpoints.unix_path}", time.monotonic() + DEADLINE_S)
    try:
        request = node_pb2.HelloRequest(min_version=1, max_version=1, **options)
        frame = connection.call("hello", request, time.monotonic() + DEADLINE_S)
        return frame.hello_response
    finally:
        connection.close()


def test_only_who_shows_the_fabrics_token_is_a_peer(source: Node) -> None:
    with pytest.raises(Denied, match="wrong peer_token"):
        hello(source, peer_token=b"q" * 32)
    with pytest.raises(Denied, match="wrong peer_token"):
        hello(source, peer_token=TOKEN[:-1])
    assert hello(source, peer_token=TOKEN).node == "source"


def test_a_node_without_a_token_has_no_peers(source: Node) -> None:
    source.neighbours.learn_peer_token(b"")
    with pytest.raises(Denied, match="has none yet"):
        hello(source, peer_token=TOKEN)


def test_a_peer_needs_no_clients_token(start: Start, target: Node) -> None:
    guarded = start("source", KVFABRIC_TOKEN="of clients")
    with pytest.raises(Denied, match="missing token"):
        hello(guarded)
    assert outcomes(pull(target, guarded, KEYS[:1])) == [Outcome.MISSING]


def test_a_pull_without_a_token_fails_and_says_so(source: Node, target: Node) -> None:
    be_impatient(target)
    target.neighbours.learn_peer_token(b"")
    pulled = pull(target, source, KEYS[:1])
    assert outcomes(pulled) == [Outcome.FAILED]
    assert "no peer_token" in pulled.why


def test_nodes_that_are_gone_are_forgotten(
    source: Node, target: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = target.neighbours.peers
    assert pull(target, source, KEYS[:1]) is not None
    assert peers._places.keys() == {"source"}
    source.stop()
    monkeypatch.setattr(peers_module, "IDLE_S", 0.0)
    wait_for(lambda: not peers._places)


def test_a_node_that_does_not_answer_is_not_asked_again_at_once(target: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and says nothing
        endpoints = types_pb2.Endpoints(tcp_address=f"127.0.0.1:{mute.getsockname()[1]}")
        assert target._loop is not None

        def call(timeout_s: float) -> None:
            work = target.neighbours.peers.call(
                "mute", endpoints, "stats", node_pb2.StatsRequest(), timeout_s
            )
            asyncio.run_coroutine_threadsafe(work, target._loop).result(DEADLINE_S)  # type: ignore[arg-type]

        with pytest.raises(DeadlineExceeded):
            call(0.1)
        with pytest.raises(Unreachable, match="a moment ago"):
            call(DEADLINE_S)


# Commands -----------------------------------------------------------------------------


def obey(node: Node, epoch: int = 1, number: int = 7, **what: Any) -> None:
    command = control_pb2.Command(id=number, why="as the test says", **what)
    on(node, lambda: node.neighbours.commands.obey([command], epoch))


def pull_command(source: Node, keys: list[Key]) -> control_pb2.Command.Pull:
    return control_pb2.Command.Pull(
        namespace_id=SPACE_ID,
        keys=b"".join(keys),
        source=source.settings.node,
        endpoints=source.endpoints,
    )


def drop_command(keys: list[Key], *holders: Node) -> control_pb2.Command.Drop:
    named = [
        control_pb2.Command.Drop.Holder(node=node.settings.node, endpoints=node.endpoints)
        for node in holders
    ]
    return control_pb2.Command.Drop(namespace_id=SPACE_ID, keys=b"".join(keys), holders=named)


def holds(node: Node, keys: list[Key]) -> list[bool]:
    return [core_of(node).shards.get(SPACE_ID, each) is not None for each in keys]


def leases_of(node: Node) -> int:
    return sum(len(session.leases) for session in core_of(node).sessions.values())


def story_of(node: Node, number: int) -> list[tuple[str, str]]:
    decisions = core_of(node).story.tell(frozenset({SPACE_ID}), KEYS[number])
    return [(decision.what, decision.why) for decision in decisions]


def test_a_shards_story_tells_from_where_it_came_and_why_it_went(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:1])
    obey(target, pull=pull_command(source, KEYS[:1]))
    wait_for(lambda: holds(target, KEYS[:1])[0])
    obey(target, drop=drop_command(KEYS[:1], source))
    wait_for(lambda: not holds(target, KEYS[:1])[0])
    assert story_of(target, 0) == [
        ("copied", "from source: as the test says"),
        ("moved", "as the test says"),
    ]


def test_a_pull_that_is_commanded_again_and_again_is_one(source: Node, target: Node) -> None:
    put(source, KEYS)
    for epoch in (1, 1, 2):
        obey(target, epoch, pull=pull_command(source, KEYS))
    wait_for(lambda: all(holds(target, KEYS)))
    wait_for(lambda: not len(target.neighbours.puller.pulls))
    assert_sent(source, len(KEYS) * SHARD_BYTES)


def test_a_cancelled_moves_pulls_end_and_no_others(source: Node, target: Node) -> None:
    put(source, KEYS)
    slow = pull_command(source, KEYS[:10])
    slow.bytes_per_s, slow.move = MIN_BYTES_PER_S, 3  # takes two seconds
    other = pull_command(source, KEYS[10:])
    other.bytes_per_s, other.move = MIN_BYTES_PER_S, 4
    pulls = target.neighbours.puller.pulls
    obey(target, 2, pull=slow)
    obey(target, 2, 8, pull=other)
    assert len(pulls) == 2

    obey(target, 1, cancel=control_pb2.Command.Cancel(move=3))  # of another manager
    obey(target, 2, cancel=control_pb2.Command.Cancel(move=5))
    assert len(pulls) == 2
    obey(target, 2, cancel=control_pb2.Command.Cancel(move=3))
    obey(target, 2, cancel=control_pb2.Command.Cancel(move=3))  # may come again
    wait_for(lambda: not len(pulls))

    assert all(holds(target, KEYS[10:]))
    assert not all(holds(target, KEYS[:10]))


def test_a_drop_waits_for_leases_and_spares_what_is_needed(source: Node, target: Node) -> None:
    put(source, KEYS[:4])
    put(target, KEYS[:4])
    core = core_of(source)
    on(source, lambda: core.shards.claim(SPACE_ID, KEYS[0]))
    obey(source, pin=control_pb2.Command.Pin(namespace_id=SPACE_ID, keys=KEYS[1], pinned=True))
    with room_of(source) as room, room.view(KEYS[2:3]):
        obey(source, drop=drop_command(KEYS[:4], target))
        wait_for(lambda: holds(source, KEYS[:4]) == [True, False, True, False])
    assert core_of(target).pins == 1  # the pin has gone along
    wait_for(lambda: not holds(source, KEYS[2:3])[0])
    assert holds(source, KEYS[:1]) == [True]
    on(source, lambda: core.end_of_claim(SPACE_ID, KEYS[0], 0.0))
    obey(source, drop=drop_command(KEYS[:4], target))
    wait_for(lambda: not any(holds(source, KEYS[:4])))
    wait_for(lambda: not leases_of(target))


def test_a_shard_that_is_needed_again_before_its_leases_end_is_not_dropped(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:1])
    put(target, KEYS[:1])
    with room_of(source) as room, room.view(KEYS[:1]):
        obey(source, drop=drop_command(KEYS[:1], target))
        on(source, lambda: core_of(source).shards.claim(SPACE_ID, KEYS[0]))
    wait_for(lambda: not len(source.neighbours.commands.drops))
    assert holds(source, KEYS[:1]) == [True]


def test_what_its_holder_lacks_is_not_dropped(source: Node, target: Node) -> None:
    put(source, KEYS[:8])
    put(target, KEYS[2:5])
    obey(source, drop=drop_command(KEYS[:8], target))
    wait_for(lambda: not len(source.neighbours.commands.drops))
    assert holds(source, KEYS[:8]) == [True] * 2 + [False] * 3 + [True] * 3
    wait_for(lambda: not leases_of(target))


def test_what_the_first_holder_lacks_the_second_is_asked_for(
    start: Start, source: Node, target: Node
) -> None:
    third = start("third")
    put(source, KEYS[:3])
    put(target, KEYS[:1])
    put(third, KEYS[1:2])
    obey(source, drop=drop_command(KEYS[:3], target, third))
    wait_for(lambda: not len(source.neighbours.commands.drops))
    assert holds(source, KEYS[:3]) == [False, False, True]


def test_nothing_is_dropped_whose_holder_is_gone(source: Node, target: Node) -> None:
    put(source, KEYS[:4])
    put(target, KEYS[:4])
    wanted = drop_command(KEYS[:4], target)
    target.stop()
    obey(source, drop=wanted)
    wait_for(lambda: not len(source.neighbours.commands.drops))
    assert all(holds(source, KEYS[:4]))


def test_nothing_is_dropped_whose_holder_is_another_now(
    start: Start, source: Node, target: Node
) -> None:
    put(source, KEYS[:4])
    put(target, KEYS[:4])
    wanted = drop_command(KEYS[:4], target)
    wanted.holders[0].node = "third"
    obey(source, drop=wanted)
    wait_for(lambda: not len(source.neighbours.commands.drops))
    assert all(holds(source, KEYS[:4]))


def test_only_cache_that_lies_nowhere_else_is_dropped_without_a_holder(source: Node) -> None:
    put(source, KEYS[:2])
    obey(source, drop=drop_command(KEYS[:2]))
    assert all(holds(source, KEYS[:2]))
    wanted = drop_command(KEYS[:2])
    wanted.cache_only = True
    obey(source, drop=wanted)
    assert not any(holds(source, KEYS[:2]))


def test_a_node_that_registers_anew_drops_nothing_on_an_old_answer(
    source: Node, target: Node
) -> None:
    put(source, KEYS[:4])
    put(target, KEYS[:4])

    def tell_and_forget() -> None:
        commands = source.neighbours.commands
        wanted = control_pb2.Command(id=7, drop=drop_command(KEYS[:4], target))
        commands.obey([wanted], 1)
        assert len(commands.drops) == 4
        commands.registered()

    on(source, tell_and_forget)
    wait_for(lambda: not source.neighbours._confirming._tasks)
    assert all(holds(source, KEYS[:4]))


def test_a_command_that_makes_no_sense_harms_nobody(source: Node) -> None:
    put(source, KEYS[:1])
    obey(source, drop=control_pb2.Command.Drop(namespace_id=SPACE_ID, keys=b"short"))
    obey(source)
    assert holds(source, KEYS[:1]) == [True]
    assert source.neighbours._handler.metrics.commands == {"drop": 1, "unknown": 1}


# States -------------------------------------------------------------------------------


def test_a_state_whose_source_goes_while_it_is_asked_is_not_adopted(target: Node) -> None:
    """Else nobody could ever read it here, or make it anew."""
    put(target, KEYS[:1])
    until_s = time.monotonic() + DEADLINE_S
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        contextlib.closing(Connection(f"unix:{target.endpoints.unix_path}", until_s)) as source,
    ):
        host, port = mute.getsockname()
        greeting = node_pb2.HelloRequest(min_version=1, max_version=1, peer_token=TOKEN)
        source.call("hello", greeting, until_s)
        offer = node_pb2.AdoptStateRequest(
            namespace_id=SPACE_ID,
            name=bytes(32),
            version=7,
            key=KEYS[0],
            source="source",
            endpoints=types_pb2.Endpoints(host="another", tcp_address=f"{host}:{port}"),
            incarnation=1,
            offer=1,
        )
        source.begin("adopt_state", offer, until_s)
        wait_for(lambda: bool(target.handovers.adopted))
    wait_for(lambda: not target.handovers.adopted)
    with room_of(target) as room:
        assert room.state(bytes(32)).version() == (0, b"")
