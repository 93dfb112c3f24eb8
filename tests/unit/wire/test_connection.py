"""A connection's calling end, against a peer that does what peers do when things go wrong."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfabric.errors import Conflict, DeadlineExceeded, Refused, Unreachable, to_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.wire import frames, sockets
from kvfabric.wire.connection import MAX_RELEASED, Connection


class Peer:
    """The other end: takes requests in and answers what the test says."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._inbox = frames.Inbox()
        self._taken: deque[wire_pb2.Frame] = deque()

    def take(self) -> wire_pb2.Frame:
        while not self._taken:
            self._taken.extend(self._inbox.feed(self.sock.recv(65536)))
        return self._taken.popleft()

    def send(self, frame: wire_pb2.Frame) -> None:
        self.sock.sendall(frames.pack(frame))


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Connection, Peer]]:
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        connection = Connection(f"unix:{path}", soon())
        accepted, _ = listener.accept()
    with accepted:
        accepted.settimeout(10)
        yield connection, Peer(accepted)
        connection.close()


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def answered(answer: Callable[[], None], call: Callable[[], object]) -> object:
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        return call()
    finally:
        thread.join(10)


def matched(frame_id: int, count: int) -> wire_pb2.Frame:
    frame = wire_pb2.Frame(id=frame_id)
    frame.match_response.matched = count
    return frame


def test_answers_find_their_requests_in_any_order(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends
    ids = [connection.begin("match", node_pb2.MatchRequest(), soon()) for _ in range(3)]
    for frame in reversed([peer.take() for _ in ids]):
        peer.send(matched(frame.id, int(frame.id)))
    for frame_id in ids:
        assert connection.finish(frame_id, soon()).match_response.matched == frame_id


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(
    ends: tuple[Connection, Peer],
) -> None:
    connection, peer = ends
    with pytest.raises(DeadlineExceeded):
        connection.call("match", node_pb2.MatchRequest(), soon(0.05))
    first = peer.take()

    def answer() -> None:
        second = peer.take()
        peer.send(matched(first.id, 1))
        peer.send(matched(second.id, 2))

    frame = answered(answer, lambda: connection.call("match", node_pb2.MatchRequest(), soon()))
    assert isinstance(frame, wire_pb2.Frame)
    assert frame.match_response.matched == 2
    assert [late.match_response.matched for late in connection.late] == [1]
    assert not connection.closed


class Interrupt(BaseException):
    """What a signal's handler raises."""


@pytest.fixture
def interrupted() -> Iterator[None]:
    """A signal interrupts the main thread a moment from now."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("interrupted")
def test_the_answer_to_an_interrupted_caller_is_late(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends
    with pytest.raises(Interrupt):
        connection.call("match", node_pb2.MatchRequest(), soon())
    peer.send(matched(peer.take().id, 1))

    def answer() -> None:
        peer.send(matched(peer.take().id, 2))

    answered(answer, lambda: connection.call("match", node_pb2.MatchRequest(), soon()))
    assert [late.match_response.matched for late in connection.late] == [1]


def test_a_forgotten_answer_that_has_arrived_is_late_too(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends
    first = connection.begin("match", node_pb2.MatchRequest(), soon())
    second = connection.begin("match", node_pb2.MatchRequest(), soon())
    peer.send(matched(first, 1))
    peer.send(matched(second, 2))
    connection.finish(second, soon())
    connection.forget(first)
    assert [late.id for late in connection.late] == [first]


def test_an_error_is_raised_as_its_own_kind(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends

    def answer() -> None:
        peer.send(wire_pb2.Frame(id=peer.take().id, error=to_proto(Conflict("look again"))))

    with pytest.raises(Conflict, match="look again"):
        answered(answer, lambda: connection.call("match", node_pb2.MatchRequest(), soon()))
    assert not connection.closed


def test_an_error_about_the_connection_reaches_whoever_waits(
    ends: tuple[Connection, Peer],
) -> None:
    connection, peer = ends
    peer.send(wire_pb2.Frame(error=to_proto(Refused("that was no frame"))))
    with pytest.raises(Refused, match="no frame"):
        connection.call("match", node_pb2.MatchRequest(), soon())


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 8])
def test_a_peer_that_speaks_something_else_ends_the_connection(
    ends: tuple[Connection, Peer], garbage: bytes
) -> None:
    connection, peer = ends
    peer.sock.sendall(garbage)
    with pytest.raises(Refused, match="does not speak this protocol"):
        connection.call("match", node_pb2.MatchRequest(), soon())
    assert connection.closed


def test_a_peer_that_dies_is_seen_at_once(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends
    assert connection.alive()
    peer.send(matched(99, 1))  # what it said before its death lies unread
    peer.sock.close()
    assert not connection.alive()
    with pytest.raises(Unreachable):
        connection.call("match", node_pb2.MatchRequest(), soon())
    assert connection.closed


def test_many_threads_may_ask_whether_the_peer_lives(ends: tuple[Connection, Peer]) -> None:
    connection, _ = ends
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(connection.alive) for _ in range(20_000)]
        assert all(answer.result(10) for answer in asked)


def test_a_peer_that_does_not_read_costs_no_more_than_the_deadline(
    ends: tuple[Connection, Peer],
) -> None:
    connection, _ = ends
    large = node_pb2.MatchRequest(keys=[bytes(32)] * 20_000)

    def flood() -> None:
        for _ in range(100):
            connection.tell("match", large, soon(0.2))

    with pytest.raises(DeadlineExceeded):
        flood()
    assert connection.closed, "half a frame is out"


def test_descriptors_of_an_answer_are_the_caller_s(ends: tuple[Connection, Peer]) -> None:
    connection, peer = ends
    read_end, write_end = os.pipe()

    def answer() -> None:
        frame = wire_pb2.Frame(id=peer.take().id)
        frame.map_response.segments.append(5)
        data = frames.pack(frame)
        socket.send_fds(peer.sock, [data[:5]], [write_end])
        peer.sock.sendall(data[5:])

    result = answered(
        answer, lambda: connection.call_for_descriptors("map", wire_pb2.MapRequest(), soon())
    )
    assert isinstance(result, tuple)
    frame, [descriptor] = result
    assert list(frame.map_response.segments) == [5]
    os.write(descriptor, b"x")
    assert os.read(read_end, 1) == b"x"
    for each in (read_end, write_end, descriptor):
        os.close(each)


def test_descriptors_of_an_answer_that_never_ends_are_closed(
    ends: tuple[Connection, Peer],
) -> None:
    connection, peer = ends
    read_end, write_end = os.pipe()
    socket.send_fds(peer.sock, [frames.PREFIX.pack(100, 0)], [write_end])
    os.close(write_end)
    with pytest.raises(DeadlineExceeded):
        connection.call_for_descriptors("map", wire_pb2.MapRequest(), soon(0.1))
    assert connection.closed, "the rest of the answer may still bring descriptors"
    assert os.read(read_end, 1) == b"", "the write end is still open somewhere"
    os.close(read_end)


def test_leases_go_back_with_the_next_request_but_not_with_a_hello(tmp_path: Path) -> None:
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        released = deque(range(1, MAX_RELEASED + 6))
        connection = Connection(f"unix:{path}", soon(), released)
        accepted, _ = listener.accept()
    with accepted:
        peer = Peer(accepted)
        connection.begin("hello", node_pb2.HelloRequest(), soon())
        connection.tell("match", node_pb2.MatchRequest(), soon())
        connection.tell("match", node_pb2.MatchRequest(), soon())
        taken = [list(peer.take().released_leases) for _ in range(3)]
        assert [len(leases) for leases in taken] == [0, MAX_RELEASED, 5]
        assert [lease for leases in taken for lease in leases] == list(range(1, MAX_RELEASED + 6))
    connection.close()


def test_leases_whose_request_fails_go_back_with_another_one(tmp_path: Path) -> None:
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        released = deque([7, 8])
        connection = Connection(f"unix:{path}", soon(), released)
        accepted, _ = listener.accept()
    with accepted:
        too_large = node_pb2.MatchRequest(keys=[bytes(32)] * 40_000)
        with pytest.raises(Refused, match="smaller batches"):
            connection.tell("match", too_large, soon())
        assert list(released) == [7, 8]
        accepted.close()
        with pytest.raises(Unreachable):
            connection.tell("match", node_pb2.MatchRequest(), soon())
        assert set(released) == {7, 8}


@pytest.mark.parametrize(
    "address",
    ["", "unix", "unix:", "tcp:", "tcp:host", "tcp:host:port", "tcp:host:99999", "udp:host:1"],
)
def test_an_address_of_no_known_kind_is_refused(address: str) -> None:
    with pytest.raises(Refused, match="must be unix:PATH or tcp:HOST:PORT"):
        sockets.connect(address, soon())


@pytest.mark.parametrize(
    "address",
    ["unix:/nowhere/node.sock", f"unix:/{'x' * 200}", "tcp:127.0.0.1:1"],
)
def test_where_nobody_listens_is_unreachable(address: str) -> None:
    with pytest.raises(Unreachable):
        sockets.connect(address, soon())


def test_a_large_payload_crosses_in_pieces() -> None:
    a, b = socket.socketpair()
    with a, b:
        data = os.urandom(3 << 20)
        got = bytearray(len(data) + 10)
        thread = threading.Thread(
            target=sockets.send, args=(a, b"0123456789", memoryview(data), soon())
        )
        thread.start()
        sockets.receive_into(b, memoryview(got), soon())
        thread.join(10)
        assert bytes(got) == b"0123456789" + data
