"""Hello: versions, features, sessions that several connections carry, and their end."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvfabric.errors import Broken, Denied, FabricError, Refused, Retry, Unsupported
from kvfabric.rpc.v1 import node_pb2, types_pb2, wire_pb2
from kvfabric.wire import frames, sockets
from kvfabric.wire.connection import Connection
from kvfabric_nodes.node import Node

from .conftest import address, core_of, key
from .test_deadlines import eventually

SPACE = types_pb2.Namespace(tenant="default", fingerprint=b"f" * 32)


def soon() -> float:
    return time.monotonic() + 10


def hello(**fields: Any) -> node_pb2.HelloRequest:
    return node_pb2.HelloRequest(**{"min_version": 1, "max_version": 1, **fields})


@pytest.fixture
def connection(home: str) -> Iterator[Connection]:
    with contextlib.closing(Connection(home, soon())) as connection:
        yield connection


def greet(connection: Connection, **fields: Any) -> node_pb2.HelloResponse:
    return connection.call("hello", hello(**fields), soon()).hello_response


def test_a_newer_client_speaks_the_node_s_version(connection: Connection) -> None:
    answer = greet(connection, max_version=7)
    assert answer.version == 1
    assert answer.node == "n0"
    assert (answer.max_batch, answer.max_deadline_ms) == (4096, 600_000)


@pytest.mark.parametrize(("least", "most"), [(2, 9), (0, 0)])
def test_versions_that_do_not_meet_are_refused_with_both(
    connection: Connection, least: int, most: int
) -> None:
    with pytest.raises(Unsupported, match=f"protocol {least} to {most}, this node 1 to 1"):
        greet(connection, min_version=least, max_version=most)


def test_only_features_that_both_have_are_in_force(connection: Connection, home: str) -> None:
    answer = greet(connection, features=["shm", "unchecked", "teleport"])
    expected = ["shm", "unchecked"] if home.startswith("unix") else ["unchecked"]
    assert list(answer.features) == expected


def test_the_first_frame_must_be_a_hello(connection: Connection) -> None:
    with pytest.raises(Refused, match="first frame"):
        connection.call("match", node_pb2.MatchRequest(), soon())


def test_a_hello_that_is_refused_opens_no_session(connection: Connection, node: Node) -> None:
    spaces = [
        types_pb2.Namespace(tenant="default", fingerprint=n.to_bytes(32, "big"))
        for n in range(1025)
    ]
    for wrong in (
        {"namespaces": spaces},
        {"namespaces": [types_pb2.Namespace(tenant="other", fingerprint=bytes(32))]},
        {"namespaces": [types_pb2.Namespace(tenant="default", fingerprint=b"short")]},
        {"token": b"wrong"},
        {"session": b"no such"},
    ):
        with pytest.raises(Refused):
            greet(connection, **wrong)
    assert not core_of(node).sessions


def test_a_session_is_carried_by_several_connections_and_ends_with_its_first(
    home: str, node: Node
) -> None:
    first, second = Connection(home, soon()), Connection(home, soon())
    session = greet(first, namespaces=[SPACE])
    joined = greet(second, session=session.session)
    assert joined.session == session.session
    [space] = session.namespace_ids
    match = node_pb2.MatchRequest(namespace_id=space, keys=[key(1)])
    assert second.call("match", match, soon()).match_response.matched == 0
    assert len(core_of(node).sessions) == 1

    first.close()
    assert eventually(lambda: not core_of(node).sessions)
    with pytest.raises(FabricError):
        second.call("match", match, soon())
    second.close()


def test_a_joined_connection_may_go_and_the_session_stays(home: str, node: Node) -> None:
    first, second = Connection(home, soon()), Connection(home, soon())
    session = greet(first, namespaces=[SPACE])
    greet(second, session=session.session)
    second.close()
    first.call("stats", node_pb2.StatsRequest(), soon())
    assert len(core_of(node).sessions) == 1
    first.close()


def test_another_tenant_cannot_join_a_session(home: str) -> None:
    first, second = Connection(home, soon()), Connection(home, soon())
    session = greet(first)
    with pytest.raises(Denied, match="belongs to tenant 'default'"):
        greet(second, principal="other", session=session.session)
    first.close()
    second.close()


def test_what_a_session_reserved_ends_with_it(home: str, node: Node) -> None:
    connection = Connection(home, soon())
    session = greet(connection, namespaces=[SPACE])
    reserve = node_pb2.ReserveRequest(
        namespace_id=session.namespace_ids[0], keys=[key(1)], size_bytes=[1000]
    )
    connection.call("reserve", reserve, soon())
    assert core_of(node).books().reserved_bytes == 1024
    connection.close()
    assert eventually(lambda: core_of(node).books().reserved_bytes == 0)


@pytest.mark.parametrize("sums", [[], [1], [1, 2, 3]])
def test_a_commit_of_wrong_checksums_frees_the_extent(
    connection: Connection, node: Node, sums: list[int]
) -> None:
    session = greet(connection, namespaces=[SPACE])
    reserve = node_pb2.ReserveRequest(
        namespace_id=session.namespace_ids[0], keys=[key(1)], size_bytes=[1000]
    )
    granted = connection.call("reserve", reserve, soon()).reserve_response
    commit = node_pb2.CommitRequest(reservation=granted.reservation, checksums=sums)
    answer = connection.call("commit", commit, soon()).commit_response
    assert list(answer.statuses) == [types_pb2.STATUS_REFUSED]
    assert "checksums" in answer.reasons[0]
    assert core_of(node).books().reserved_bytes == 0
    with pytest.raises(Refused, match="committed or aborted before"):
        connection.call("commit", commit, soon())


def test_descriptors_are_for_unix_sockets(connection: Connection, home: str) -> None:
    greet(connection)
    request = wire_pb2.MapRequest(segments=[1])
    expected = "not one of tenant" if home.startswith("unix") else "unix sockets only"
    with pytest.raises(Refused, match=expected):
        connection.call("map", request, soon())


def test_a_release_of_unknown_leases_is_nothing(connection: Connection) -> None:
    greet(connection)
    connection.call("release", node_pb2.ReleaseRequest(leases=[1, 1, 99]), soon())
    with pytest.raises(Refused, match="no lease 7"):
        connection.call("renew", node_pb2.RenewRequest(lease=7), soon())


def test_tcp_and_unix_sessions_see_the_same_shards(node: Node) -> None:
    spaces = []
    for kind in ("unix", "tcp"):
        with contextlib.closing(Connection(address(node, kind), soon())) as connection:
            spaces.append(greet(connection, namespaces=[SPACE]).namespace_ids[0])
    assert spaces[0] == spaces[1]


def test_a_transfer_without_a_thread_comes_later_and_its_session_ends(
    connection: Connection, home: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = greet(connection, namespaces=[SPACE])

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, contextlib.closing(Connection(home, soon())) as bulk:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(Retry, match="can't start new thread; close bulk connections"):
            greet(bulk, session=session.session, features=["bulk"])
    with contextlib.closing(Connection(home, soon())) as bulk:
        greet(bulk, session=session.session, features=["bulk"])
    connection.close()
    assert eventually(lambda: not core_of(node).sessions)
    node.stop()
    assert node.wait(0)


def test_a_connection_that_owes_answers_takes_no_transfers(node: Node) -> None:
    home = address(node, "unix")  # its buffers are small
    owner = Connection(home, soon())
    session = greet(owner, namespaces=[SPACE])
    with contextlib.closing(owner), contextlib.closing(sockets.connect(home, soon())) as sock:
        early = frames.pack(wire_pb2.Frame(id=1, stats_request=node_pb2.StatsRequest()))
        join = wire_pb2.Frame(id=2, hello_request=hello(session=session.session, features=["bulk"]))
        sender = threading.Thread(target=sock.sendall, args=(early * 50_000 + frames.pack(join),))
        sender.start()
        sender.join(10)  # answers to as many do not fit the socket's buffers
        scratch = memoryview(bytearray(frames.MAX_HEADER_BYTES))
        answer = wire_pb2.Frame()
        while answer.id != 2:
            answer, _ = sockets.receive_frame(sock, scratch, soon())
        assert "open a new one for bulk" in answer.error.message


@pytest.mark.filterwarnings("error")
def test_a_call_that_ends_before_it_begins_is_closed(connection: Connection, node: Node) -> None:
    session = greet(connection, namespaces=[SPACE])
    request = node_pb2.VerifyRequest(namespace_id=session.namespace_ids[0], keys=[key(1)])
    verify = frames.pack(wire_pb2.Frame(id=7, verify_request=request))
    connection._sock.sendall(verify + b"\xff" * 8)  # nothing that follows can be understood
    assert eventually(lambda: not core_of(node).sessions)
    gc.collect()


def test_a_call_cannot_end_what_a_stream_is_filling(
    connection: Connection, home: str, node: Node
) -> None:
    session = greet(connection, namespaces=[SPACE])
    header = node_pb2.WriteRequest.Header(
        namespace_id=session.namespace_ids[0], keys=[key(1)], size_bytes=[1000]
    )
    with contextlib.closing(Connection(home, soon())) as bulk:
        greet(bulk, session=session.session, features=["bulk"])
        bulk.call("write", node_pb2.WriteRequest(header=header), soon())
        (reservation,) = (i for s in core_of(node).sessions.values() for i in s.reservations)
        refused = pytest.raises(Refused, match=f"no reservation {reservation}")
        with refused:
            connection.call("abort", node_pb2.AbortRequest(reservation=reservation), soon())
        with refused:
            connection.call("commit", node_pb2.CommitRequest(reservation=reservation), soon())
        assert core_of(node).books().reserved_bytes == 1024
    assert eventually(lambda: core_of(node).books().reserved_bytes == 0)


def test_a_transfer_that_the_node_fails_at_is_answered_and_the_node_stops(
    connection: Connection, home: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = greet(connection, namespaces=[SPACE])
    with contextlib.closing(Connection(home, soon())) as bulk:
        greet(bulk, session=session.session, features=["bulk"])

        def fail(now_s: float) -> None:
            raise AssertionError("a bug")

        read = node_pb2.ReadRequest(namespace_id=session.namespace_ids[0], keys=[key(1)])
        with monkeypatch.context() as patched:
            patched.setattr(core_of(node), "tick", fail)
            with pytest.raises(Broken, match="a bug"):
                bulk.call("read", read, soon())
    connection.close()
    node.stop()
    assert node.wait(0)
