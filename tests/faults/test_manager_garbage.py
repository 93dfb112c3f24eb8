"""Garbage for the manager: bytes on its socket, bytes as messages, messages that make no sense.

After each it serves as before and its books agree.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.manager.service import ManagerServer, ManagerSettings
from kvfabric.rpc.v1 import control_pb2 as pb
from kvfabric.rpc.v1 import control_pb2_grpc

pytestmark = pytest.mark.faults

TIMEOUT_S = 20.0
SERVICE = "/kvfabric.rpc.v1.ControlService/"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EXAMPLES = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def server() -> Iterator[ManagerServer]:
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", store="memory:"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def channel(server: ManagerServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def assert_serves(server: ManagerServer, channel: grpc.Channel) -> None:
    stub = control_pb2_grpc.ControlServiceStub(channel)
    stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S)
    server.check()


@EXAMPLES
@given(garbage=st.binary(max_size=4096), preface=st.booleans())
def test_bytes_on_the_socket(
    server: ManagerServer, channel: grpc.Channel, garbage: bytes, preface: bool
) -> None:
    host, port = server.address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection,
        contextlib.suppress(ConnectionError),  # it may hang up before all is sent
    ):
        connection.sendall((HTTP2_PREFACE if preface else b"") + garbage)

    assert_serves(server, channel)


@EXAMPLES
@given(
    garbage=st.binary(max_size=512),
    method=st.sampled_from(["Register", "Locate", "ListNodes", "Stats", "Explain", "Nothing"]),
)
def test_bytes_as_a_message(
    server: ManagerServer, channel: grpc.Channel, garbage: bytes, method: str
) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(SERVICE + method)
    with contextlib.suppress(grpc.RpcError):
        call(garbage, timeout=TIMEOUT_S)

    assert_serves(server, channel)


@EXAMPLES
@given(garbage=st.lists(st.binary(max_size=256), min_size=1, max_size=3))
def test_bytes_as_heartbeats(
    server: ManagerServer, channel: grpc.Channel, garbage: list[bytes]
) -> None:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
        SERVICE + "Heartbeat"
    )
    with contextlib.suppress(grpc.RpcError):
        list(call(iter(garbage), timeout=TIMEOUT_S))

    assert_serves(server, channel)


NAMES = st.sampled_from(["a", "b"])
NUMBERS = st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1])
IDS = st.sampled_from([b"r" * 32, b"s" * 32, b"", b"x"])
BLOBS = st.one_of(
    st.lists(st.sampled_from([bytes(32), b"k" * 32, b"\xff" * 32])).map(b"".join),
    st.binary(max_size=70),
)
INVENTORIES = st.lists(
    st.builds(
        pb.Inventory,
        namespace_id=IDS,
        tier=st.sampled_from([0, 1, 2, 3, 17]),
        keys=BLOBS,
        size_bytes=st.lists(NUMBERS, max_size=2),
    ),
    max_size=3,
)
HEARTBEATS = st.builds(
    pb.HeartbeatRequest,
    node=NAMES,
    incarnation=NUMBERS,
    sequence=NUMBERS,
    full=st.booleans(),
    more=st.booleans(),
    added=INVENTORIES,
    removed=INVENTORIES,
    inventory_count=NUMBERS,
    inventory_hash=NUMBERS,
)
REGISTRATIONS = st.builds(
    pb.RegisterRequest,
    min_version=st.integers(0, 2),
    max_version=st.integers(0, 2),
    node=NAMES,
    incarnation=NUMBERS,
)


@EXAMPLES
@given(data=st.data())
def test_messages_that_make_no_sense(
    server: ManagerServer, channel: grpc.Channel, data: st.DataObject
) -> None:
    stub = control_pb2_grpc.ControlServiceStub(channel)
    with contextlib.suppress(grpc.RpcError):
        stub.Register(data.draw(REGISTRATIONS), timeout=TIMEOUT_S)
    heartbeats = data.draw(st.lists(HEARTBEATS, max_size=4))
    with contextlib.suppress(grpc.RpcError):
        for answer in stub.Heartbeat(iter(heartbeats), timeout=TIMEOUT_S):
            assert answer.epoch == 1

    assert_serves(server, channel)
