"""Hello: versions, features, sessions that several connections carry, and their end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvfabric.errors import Denied, FabricError, Refused, Unsupported
from kvfabric.rpc.v1 import node_pb2, types_pb2, wire_pb2
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
