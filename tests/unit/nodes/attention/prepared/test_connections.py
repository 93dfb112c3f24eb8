"""Connections of prepared queries: what ends them, and with what they end."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs
from tests.unit.client.conftest import Start, address
from tests.unit.client.test_deadlines import eventually
from tests.unit.client.test_grpc import Guest
from tests.unit.nodes.attention.asking import Asker, asker, ids, opening
from tests.unit.nodes.attention.prepared.again import CONTEXT, FORM, TIMEOUT_S, Again, over, soon

from kvfabric.errors import DeadlineExceeded, Retry, Unreachable
from kvfabric_client.prepared import PreparedConnection
from kvfabric_nodes import node as node_module
from kvfabric_nodes.attention import prepared
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.kernels.native import NativeKernel
from kvfabric_nodes.attention.kernels.reference import ReferenceKernel
from kvfabric_nodes.node import Node
from kvfabric_nodes.serving import server


@pytest.mark.parametrize("size_bytes", [(512 << 10) + 1, (1 << 32) - 1])
def test_a_record_that_is_none_ends_its_connection(
    ask: Asker, again: Again, size_bytes: int
) -> None:
    connection = again.connection
    connection._sock.sendall(struct.pack("<qqII", 1, 1, 0, size_bytes))
    connection._expected.append(1)
    with pytest.raises(Unreachable):
        connection.finish(soon())
    assert not connection.usable
    assert ask.client.stats().node, "the session goes on"


@pytest.fixture
def hurried(start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Again]:
    """Of a node that soon loses its patience, and prepares queries of many rows too."""
    monkeypatch.setattr(prepared, "RECORD_S", 1)
    kernels = Kernels([NativeKernel(1)], ReferenceKernel())
    monkeypatch.setattr(node_module, "cpu_kernels", lambda threads: kernels)
    with asker(address(start(), "unix")) as ask:
        ask.client.stats()
        again = Again(ask)
        yield again
        again.connection.close()


def test_a_record_that_comes_byte_by_byte_ends_its_connection(hurried: Again) -> None:
    record, until_s = struct.pack("<qqII", 1, 1, 0, 4096) + bytes(4096), soon()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until_s:
            hurried.connection._sock.sendall(record[:1])
            record = record[1:]
            time.sleep(0.01)
        pytest.fail("it has time for ever")


def test_an_answer_that_is_fetched_bit_by_bit_ends_its_connection(hurried: Again) -> None:
    with hurried.ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        call = over(hurried.ask.span_of(FORM, sequence.id), 40, count=4000)
        hurried.begin(hurried.prepare(call), call)
        left = 32 + 4000 * 4 * 9 * 4
        sock = hurried.connection._sock
        sock.settimeout(TIMEOUT_S)
        while left and (got := len(sock.recv(16 << 10))):
            left -= got
            time.sleep(0.25)
        assert left


def test_it_ends_with_its_session(node: Node) -> None:
    with asker(address(node, "tcp")) as ask:
        ask.client.stats()
        again = Again(ask)
        other = PreparedConnection(again.link._join(soon(), "attend"))
        with ask.room.sequence(FORM) as sequence:
            sequence.append(ids(40), CONTEXT[..., :40, :])
            assert again.prepare(over(ask.span_of(FORM, sequence.id), 40))
    other._expected.append(1)
    with pytest.raises(Unreachable):
        other.finish(soon())
    again.connection.close()
    assert node.attention.preparations is not None
    assert eventually(lambda: not node.attention.preparations._entries)  # type: ignore[union-attr]


def test_a_node_stops_whatever_a_session_without_connections_has_prepared(start: Start) -> None:
    node = start(grpc="127.0.0.1:0")
    guest = Guest(node)
    with asker(address(node, "unix")) as ask, ask.room.sequence(FORM) as sequence:
        sequence.append(ids(16), CONTEXT[..., :16, :])
        keys = [place.key for place in sequence.blocks() if place.key]
    span = opening(guest.space, FORM, 0)
    span.keys[:], span.first_tokens[:] = keys, [0]
    message = over(guest.call("OpenSpan", span).span, 16).message()
    message.prepare = True
    assert guest.call("Attend", message).prepared
    with capture_logs() as logs:
        node.stop()
    assert not [entry for entry in logs if entry["event"] == "node_failed"]
    guest.channel.close()


def test_they_leave_room_for_bulk(
    ask: Asker, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_THREADS", 1)
    with pytest.raises(Retry, match="1 attend connections are open; close some"):
        again.link._join(soon(), "attend")
    again.link._join(soon(), "bulk").close()


def test_an_answer_that_does_not_come_in_time_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(theirs):
        connection = PreparedConnection(_Detached(ours))  # type: ignore[arg-type]
        connection.begin(1, 0, 0, b"", 1, soon())
        with pytest.raises(DeadlineExceeded):
            connection.finish(time.monotonic() + 0.02)
        assert not connection.usable


class _Detached:
    address = "unix:there"

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def detach(self) -> socket.socket:
        return self._sock
