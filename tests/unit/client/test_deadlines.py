"""Deadlines, a node that stalls, a node that goes away: clear errors, and nothing leaks."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import DeadlineExceeded, Refused, Retry, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Namespace, Status
from kvfabric_client import Client, Room, shm
from kvfabric_client.link import Link
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, key, payload

SPACE = Namespace("default", b"f" * 32)


@contextlib.contextmanager
def stalled(node: Node) -> Iterator[None]:
    """The node answers nothing meanwhile."""
    go_on, stalls = threading.Event(), threading.Event()
    assert node._loop is not None

    def stall() -> None:
        stalls.set()
        go_on.wait(30)

    node._loop.call_soon_threadsafe(stall)
    assert stalls.wait(10)
    try:
        yield
    finally:
        go_on.set()


def eventually(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + 10
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.01)
    return True


def promises(node: Node) -> tuple[int, int]:
    sessions = list(core_of(node).sessions.values())
    return sum(len(s.leases) for s in sessions), sum(len(s.reservations) for s in sessions)


def test_a_call_ends_by_its_deadline_and_the_next_one_is_answered(room: Room, node: Node) -> None:
    room.put([key(1)], [payload(0, 1000)])
    with stalled(node):
        for call in (
            lambda: room.match([key(1)], timeout_s=0.05),
            lambda: room.get([key(1)], timeout_s=0.05),
            lambda: room.put([key(2)], [b"x"], timeout_s=0.05),
            lambda: room.view([key(1)], timeout_s=0.05),
        ):
            with pytest.raises(DeadlineExceeded):
                call()
    assert room.match([key(1)]).matched == 1
    assert room.put([key(3)], [b"x"]) == [Status.OK]


def test_what_was_granted_too_late_is_given_back(room: Room, node: Node) -> None:
    """The answers come after their callers have gone: nobody else could let go of them."""
    room.put([key(1)], [payload(0, 1000)])
    with stalled(node):
        for number in range(3):
            with pytest.raises(DeadlineExceeded):
                room.get([key(1)], timeout_s=0.02)
            with pytest.raises(DeadlineExceeded):
                room.put([key(10 + number)], [b"x"], timeout_s=0.02)

    def nothing_promised() -> bool:
        room.match([key(1)])
        return promises(node) == (0, 0)

    assert eventually(nothing_promised)


def test_after_a_get_has_raised_nothing_writes_into_its_buffers(room: Room, node: Node) -> None:
    room.put([key(1)], [payload(0, 1_000_000)])
    target = np.zeros(1_000_000, np.uint8)
    with stalled(node), pytest.raises(DeadlineExceeded):
        room.get_into([key(1)], [target], timeout_s=0.05)
    target[:] = 7
    assert room.get_into([key(1)], [np.zeros(1_000_000, np.uint8)]) == [Status.OK]
    assert (target == 7).all()


def test_a_deadline_that_has_passed_raises_before_anything_is_copied(room: Room) -> None:
    room.put([key(1)], [payload(0, 1000)])
    with pytest.raises(DeadlineExceeded):
        room.get([key(1)], timeout_s=0)
    with pytest.raises(DeadlineExceeded):
        room.put([key(2)], [b"x"], timeout_s=0)
    assert room.match([key(2)]).matched == 0


def test_who_waits_for_a_connection_gives_up_by_his_own_deadline(room: Room, node: Node) -> None:
    room.put([key(1)], [payload(0, 1000)])
    with ThreadPoolExecutor(12) as threads, stalled(node):
        slow = [threads.submit(room.get, [key(1)], timeout_s=20) for _ in range(4)]
        quick = [threads.submit(room.get, [key(1)], timeout_s=0.2) for _ in range(8)]
        for call in quick:
            assert isinstance(call.exception(10), DeadlineExceeded)
        assert not any(call.done() for call in slow)
    assert all(call.result()[0] is not None for call in slow)


def test_who_waits_for_a_transfer_does_not_take_the_turn_of_a_call(node: Node) -> None:
    until_s = time.monotonic() + 30

    def transfer(link: Link) -> None:
        with link.bulk(until_s):
            pass

    with contextlib.closing(Link(address(node, "tcp"), "default", b"", until_s)) as link:
        waiting = link._returned._waiters  # type: ignore[attr-defined]
        with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as borrowed:
            for _ in range(4):
                borrowed.enter_context(link.bulk(until_s))
            for _ in range(3):
                borrowed.enter_context(link.connection(until_s))
            with link.connection(until_s):
                threads.submit(transfer, link)
                assert eventually(lambda: len(waiting) == 1)
                call = threads.submit(link.call, "stats", node_pb2.StatsRequest(), until_s)
                assert eventually(lambda: len(waiting) == 2)
            assert call.result(10).stats_response.stats.node == "n0"


def test_eight_threads_share_a_client(room: Room, node: Node) -> None:
    def work(thread: int) -> None:
        for turn in range(12):
            numbers = [1000 * thread + 10 * turn + n for n in range(4)]
            keys = [key(number) for number in numbers]
            shards = [payload(number, 20_000 + 1000 * thread) for number in numbers]
            assert room.put(keys, shards, layers=2) == [Status.OK] * 4
            for copy, shard in zip(room.get(keys), shards, strict=True):
                assert copy is not None
                assert np.array_equal(copy, shard)
            with room.view(keys) as views:
                assert bytes(views[3] or b"") == bytes(shards[3])
            assert room.match(keys).matched == 4

    with ThreadPoolExecutor(8) as threads:
        for call in [threads.submit(work, thread) for thread in range(8)]:
            call.result(60)
    assert eventually(lambda: promises(node) == (0, 0))
    node.check()


def test_closing_waits_for_calls_in_other_threads(home: str, node: Node) -> None:
    client = kvfabric_client.connect(home, timeout_s=20)
    room = client.open(SPACE)
    room.put([key(1)], [payload(0, 1000)])
    with ThreadPoolExecutor(2) as threads:
        with stalled(node):
            call = threads.submit(room.get, [key(1)])
            assert eventually(lambda: client._calls == 1)
            closing = threads.submit(client.close)
            assert eventually(lambda: client._closed)
            assert not closing.done()
        assert call.result(10)[0] is not None
        closing.result(10)
    with pytest.raises(Refused, match="closed; connect again"):
        room.get([key(1)])
    assert eventually(lambda: not core_of(node).sessions)


def test_closing_twice_is_closing_once(home: str) -> None:
    client = kvfabric_client.connect(home)
    client.close()
    client.close()


def test_a_client_takes_the_next_node_when_its_own_goes_away(start: Start) -> None:
    first, second = start("n0"), start("n1")
    with kvfabric_client.connect(timeout_s=5) as client:
        room = client.open(SPACE)
        assert client.stats().node == "n0"
        room.put([key(1)], [b"x"])
        first.stop()
        assert room.get([key(1)]) == [None]
        assert room.put([key(1)], [b"y"]) == [Status.OK]
        assert client.stats().node == "n1"
        second.stop()
        with pytest.raises(Unreachable):
            room.get([key(1)])


def test_a_client_goes_on_with_a_node_that_was_restarted(start: Start) -> None:
    start("n0").stop()
    with kvfabric_client.Client(timeout_s=5) as client:
        room = client.open(SPACE)
        for _ in range(3):
            node = start("n0")
            assert eventually(lambda: _stored(room))
            node.stop()
            with pytest.raises(Retry):
                room.match([key(1)])


def test_leases_of_a_node_that_is_gone_are_not_offered_to_the_next_one(start: Start) -> None:
    node = start("n0")
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "default", b"", deadline_s)) as link:
        node.stop()
        link.release(1)
        assert link._releaser is not None
        link._releaser.join(10)
        assert not link._releaser.is_alive()


def test_an_interrupted_copy_waits_for_the_thread_that_copies_with_it() -> None:
    going_on, until_s = threading.Event(), time.monotonic() + 10
    done: list[int] = []

    def work(jobs: Sequence[int]) -> None:
        if 2 in jobs:
            started.set()
            assert going_on.wait(until_s - time.monotonic())
        else:
            assert started.wait(10)  # so that the other half is not taken back
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        done.extend(jobs)

    def interrupt(*_: object) -> None:
        threading.Timer(0.05, going_on.set).start()
        raise InterruptedError("by a signal")

    started = threading.Event()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with ThreadPoolExecutor(1) as copiers:
            with pytest.raises(InterruptedError, match="by a signal"):
                shm.split([1, 2], work, shm.SPLIT_BYTES, copiers)
            assert done == [1, 2]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_session_that_ended_with_its_node_is_unreachable_not_refused(start: Start) -> None:
    """Another node answers at the same address, and knows nothing of the session."""
    node = start("n0")
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "default", b"", deadline_s)) as link:
        link.call("stats", node_pb2.StatsRequest(), deadline_s)
        node.stop()
        start("n0")
        with pytest.raises(Unreachable, match="has ended"):
            link.call("stats", node_pb2.StatsRequest(), deadline_s)
        with pytest.raises(Unreachable, match="has ended"), link.bulk(deadline_s):
            pass


def _stored(room: Room) -> bool:
    try:
        return room.put([key(1)], [b"x"]) == [Status.OK]
    except Unreachable:
        return False


def test_a_view_knows_when_its_node_is_gone(start: Start) -> None:
    node = start("n0")
    with kvfabric_client.connect(timeout_s=5) as client:
        room = client.open(SPACE)
        room.put([key(1)], [b"x"])
        with room.view([key(1)]) as views:
            assert views.alive()
            node.stop()
            assert not views.alive()
            with pytest.raises(Unreachable):
                views.renew()


def test_where_no_node_is_the_error_says_what_to_do() -> None:
    with pytest.raises(Unreachable, match="kvfabric up"):
        kvfabric_client.connect()
    with pytest.raises(Unreachable):
        kvfabric_client.connect("tcp:127.0.0.1:1", timeout_s=1)
    for wrong in ("n0.sock", "unix:", "tcp:host", "tcp:host:99999", "http://x"):
        with pytest.raises((Refused, Unreachable)):
            kvfabric_client.connect(wrong, timeout_s=1)


def test_clients_that_come_and_go_leave_nothing_open(node: Node, home: str) -> None:
    import os

    def session(number: int) -> None:
        with kvfabric_client.connect(home) as client:
            room = client.open(SPACE)
            room.put([key(number)], [payload(0, 100_000)])
            room.get([key(number)])

    session(0)
    assert eventually(lambda: not core_of(node).sessions)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 6):
        session(number)
    assert eventually(lambda: not core_of(node).sessions)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_failed_fill_gives_its_reservation_back(
    node: Node, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvfabric_client import buffers

    with kvfabric_client.connect(address(node, kind)) as client:
        room = client.open(SPACE)
        room.put([key(0)], [b"x"])

        def fail(*_: Any) -> int:
            raise MemoryError("of the client")

        monkeypatch.setattr(buffers, "_checksum", fail)
        with pytest.raises(MemoryError):
            room.put([key(1)], [payload(0, 1000)])
        monkeypatch.undo()
        assert eventually(lambda: promises(node) == (0, 0))
        assert client.stats().node == "n0"


def test_a_mapping_that_fails_leaves_no_lease_behind(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvfabric_client.connect(address(node, "tcp")) as writer:
        writer.open(SPACE).put([key(1)], [payload(0, 1000)])
    with kvfabric_client.connect(address(node, "unix")) as client:
        room = client.open(SPACE)

        def fail(*_: Any) -> None:
            raise Refused("no descriptors left")

        monkeypatch.setattr(Link, "map_segments", fail)
        with pytest.raises(Refused):
            room.get([key(1)])
        with pytest.raises(Refused):
            room.put([key(2)], [b"x"])
        monkeypatch.undo()
        assert eventually(lambda: promises(node) == (0, 0))
        assert isinstance(client, Client)
