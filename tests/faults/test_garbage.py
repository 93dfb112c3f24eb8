"""Garbage on every socket: it costs its own connection at most, never the node or its books.

What is sent is random bytes, real frames with absurd values, cut and bent ones; each on a
fresh connection and on ones that said hello. Afterwards another tenant's shard is as it was.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    ROOM,
    SPACE,
    ManagerProcess,
    NodeProcess,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import node_pb2, node_pb2_grpc, wire_pb2
from kvfabric.types import Namespace, Status
from kvfabric.wire import frames

pytestmark = pytest.mark.faults

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
ANSWER_S = 0.02  # how long garbage is given to be answered
WATCHER = Namespace("watcher", bytes(32))
WATCHED = key_of(7, "watched")
SIZE = 64 << 10

FD = FieldDescriptor
ABSURD_INTS = st.sampled_from([0, 1, 2, 3, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
ABSURD_LONGS = ABSURD_INTS | st.sampled_from([1 << 40, (1 << 63) - 1, (1 << 64) - 1])
ABSURD_BYTES = st.sampled_from(
    [b"", b"x", ROOM, namespace_id(WATCHER), *(key_of(i) for i in range(4)), b"\xff" * 33]
)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FD.TYPE_BOOL: st.booleans(),
    FD.TYPE_BYTES: ABSURD_BYTES,
    FD.TYPE_STRING: st.sampled_from(["", "default", "watcher", "shm", "bulk", "\x00", "ä" * 99]),
    FD.TYPE_UINT32: ABSURD_INTS,
    FD.TYPE_UINT64: ABSURD_LONGS,
    FD.TYPE_FIXED64: ABSURD_LONGS,
    FD.TYPE_DOUBLE: st.floats(),
    FD.TYPE_FLOAT: st.floats(width=32),
    FD.TYPE_ENUM: st.sampled_from([0, 1, 2, 5, 99]),
}


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    """Any message of this type, with values that nobody in his senses would send."""
    return st.builds(
        lambda values: _build(descriptor, values),
        st.fixed_dictionaries(
            {},
            optional={
                field.name: _values(field, depth)
                for field in descriptor.fields
                if depth < 4 and not _is_map(field)
            },
        ),
    )


def _messages_of(descriptor: Descriptor, depth: int) -> st.SearchStrategy[Any]:
    return st.deferred(lambda: messages(descriptor, depth))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = _messages_of(field.message_type, depth + 1) if field.message_type else SCALARS[field.type]
    return st.lists(one, max_size=4) if field.is_repeated else one


def _build(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    message = GetMessageClass(descriptor)()
    for name, value in values.items():
        if isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def hello(**fields: Any) -> bytes:
    request = node_pb2.HelloRequest(min_version=1, max_version=1, features=["shm"], **fields)
    request.namespaces.add(tenant="default", fingerprint=bytes(32), salt=SPACE.salt)
    return frames.pack(wire_pb2.Frame(id=1, hello_request=request))


BODIES = [
    field.name
    for field in wire_pb2.Frame.DESCRIPTOR.fields
    if field.message_type is not None and field.name != "hello_response"
]


def _type_of(name: str) -> Descriptor:
    found = wire_pb2.Frame.DESCRIPTOR.fields_by_name[name].message_type
    assert found is not None
    return found


def _frame(name: str, body: Any, frame_id: int, payload: bytes) -> bytes:
    frame = wire_pb2.Frame(id=frame_id)
    getattr(frame, name).CopyFrom(body)
    return frames.pack(frame, len(payload)) + payload


FRAMES = st.sampled_from(BODIES).flatmap(
    lambda name: st.builds(
        _frame,
        st.just(name),
        messages(_type_of(name)),
        ABSURD_LONGS,
        st.sampled_from([b"", b"", b"payload"]),
    )
)
LENGTHS = st.builds(struct.pack, st.just("<II"), ABSURD_INTS, ABSURD_INTS)


def _bend(data: bytes, at: int, byte: int, end: int) -> bytes:
    at %= len(data)
    return (data[:at] + bytes([byte]) + data[at + 1 :])[: end % (len(data) + 1)]


BENT = st.builds(_bend, FRAMES, st.integers(0, 1 << 16), st.integers(0, 255), st.integers(0))
GARBAGE = st.lists(st.binary(max_size=64) | LENGTHS | FRAMES | FRAMES | BENT, max_size=6)


@pytest.fixture(scope="module")
def watched(shared_node: NodeProcess) -> Iterator[NodeProcess]:
    """The node with another tenant's pinned shard, which is intact after all that was sent."""
    with shared_node.client(tenant="watcher") as client:
        room = client.open(WATCHER)
        assert room.put([WATCHED], [bytes_of(WATCHED, SIZE)]) == [Status.OK]
        assert room.pin([WATCHED]) == [Status.OK]
        yield shared_node
        (copy,) = room.get([WATCHED])
        assert copy is not None
        assert copy.tobytes() == bytes_of(WATCHED, SIZE)
        assert room.match([WATCHED, key_of(0)]).matched == 1


def _throw(sock: socket.socket, pieces: list[bytes]) -> None:
    """Sends all, and reads what comes back for a moment."""
    with sock, suppress(OSError):
        sock.settimeout(ANSWER_TIMEOUT_S)
        for piece in pieces:
            sock.sendall(piece)
        sock.settimeout(ANSWER_S)
        while sock.recv(1 << 16):
            pass


def _connect(node: NodeProcess, kind: str) -> socket.socket:
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(node.unix.removeprefix("unix:"))
        return sock
    host, _, port = node.line[f"{kind}_address"].rpartition(":")
    return socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@QUICK
@given(greeted=st.booleans(), pieces=GARBAGE)
@example(greeted=True, pieces=[struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)])
@example(greeted=True, pieces=[hello(), hello(), b"\x00"])
def test_garbage_for_calls(
    watched: NodeProcess, kind: str, greeted: bool, pieces: list[bytes]
) -> None:
    _throw(_connect(watched, kind), [hello(), *pieces] if greeted else pieces)
    assert watched.stats().node == "n0"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@QUICK
@given(pieces=GARBAGE, write=st.booleans())
def test_garbage_for_transfers(
    watched: NodeProcess, kind: str, pieces: list[bytes], write: bool
) -> None:
    address = watched.unix if kind == "unix" else watched.tcp
    with Wire(address) as owner:
        bulk = Wire(address, "bulk", space=None, session=owner.hello.session)
        begin = wire_pb2.Frame(id=1)
        header = begin.write_request.header
        header.namespace_id = ROOM
        header.keys.append(key_of(1))
        header.size_bytes.append(SIZE)
        header.deadline_ms = 1000
        first = [frames.pack(begin)] if write else []
        _throw(bulk.connection.detach(), [*first, *pieces])
        until(lambda: owner.stats().reservations == 0, "what the transfer reserved comes back")
        assert owner.stats().leases == 0


METHODS = {
    method.name: method.input_type
    for method in node_pb2.DESCRIPTOR.services_by_name["NodeService"].methods
}


@QUICK
@given(data=st.data())
def test_garbage_for_grpc(node: NodeProcess, data: st.DataObject) -> None:
    """Well-formed messages with absurd values, and bytes that are no message at all."""
    node.settles = False
    with grpc.insecure_channel(node.line["grpc_address"]) as channel:
        session = _grpc_session(channel)
        for _ in range(5):
            name = data.draw(st.sampled_from(sorted(METHODS)))
            body = data.draw(
                messages(METHODS[name]).map(lambda m: m.SerializeToString())
                | st.binary(max_size=64)
            )
            path = f"/kvfabric.rpc.v1.NodeService/{name}"
            metadata = (("kvfabric-session", data.draw(st.sampled_from([session, "", "none"]))),)
            with suppress(grpc.RpcError):
                if name in ("Read", "Write"):
                    stream: Any = channel.stream_stream(path)  # raw bytes in and out
                    list(stream(iter([body, body]), timeout=2.0, metadata=metadata))
                else:
                    ask: Any = channel.unary_unary(path)
                    ask(body, timeout=ANSWER_TIMEOUT_S, metadata=metadata)
    with Wire(node.unix) as wire:
        books = wire.stats().tiers[0]
    promised = books.held_bytes + books.reserved_bytes + books.quarantined_bytes
    assert books.capacity_bytes == promised + books.free_bytes


def _grpc_session(channel: grpc.Channel) -> str:
    request = node_pb2.HelloRequest(min_version=1, max_version=1)
    request.namespaces.add(tenant="default", fingerprint=bytes(32), salt=SPACE.salt)
    stub = node_pb2_grpc.NodeServiceStub(channel)
    answer: node_pb2.HelloResponse = stub.Hello(request, timeout=ANSWER_TIMEOUT_S)
    return answer.session.decode()


@pytest.mark.parametrize("kind", ["grpc", "metrics"])
@settings(QUICK, max_examples=25)
@given(pieces=st.lists(st.binary(min_size=1, max_size=200), max_size=4))
@example(pieces=[b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 70000])
@example(pieces=[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64])
def test_garbage_for_http(watched: NodeProcess, kind: str, pieces: list[bytes]) -> None:
    _throw(_connect(watched, kind), pieces)
    assert watched.stats().node == "n0"


def test_one_byte_at_a_time_is_as_good_as_all_at_once(watched: NodeProcess) -> None:
    data = hello() + frames.pack(wire_pb2.Frame(id=2, stats_request=node_pb2.StatsRequest()))
    with _connect(watched, "tcp") as sock:
        for byte in data:
            sock.sendall(bytes([byte]))
        sock.settimeout(ANSWER_TIMEOUT_S)
        inbox = frames.Inbox()
        seen: list[wire_pb2.Frame] = []
        while len(seen) < 2:
            seen += inbox.feed(sock.recv(1 << 16))
    assert [frame.WhichOneof("body") for frame in seen] == ["hello_response", "stats_response"]


def test_a_client_that_maps_memory_and_sends_garbage_is_quarantined_until_it_closes(
    watched: NodeProcess,
) -> None:
    """It may still write into what it reserved: nobody else gets that before it is gone."""
    with Wire(watched.unix, "shm") as wire:
        granted = wire.reserve([key_of(1)], SIZE, deadline_ms=50)
        wire.fill(granted, bytes(SIZE))
        sock = wire.connection._sock
        sock.sendall(b"\xff" * 16)
        assert b"does not speak this protocol" in sock.recv(1 << 16)
        until(lambda: watched.tier().quarantined_bytes == SIZE, "its deadline passes")
        assert watched.stats().sessions == 3  # this one, the watcher's, and the asking one
        abort = wire_pb2.Frame(id=9)
        abort.abort_request.reservation = granted.reservation
        sock.sendall(frames.pack(abort))
        assert watched.tier().quarantined_bytes == SIZE, "it is not listened to any more"
    until(lambda: watched.tier().quarantined_bytes == 0, "its end gives all back")


def test_garbage_for_the_manager(
    tmp_path_factory: pytest.TempPathFactory, processes: list[Any]
) -> None:
    manager = ManagerProcess(tmp_path_factory.mktemp("manager"), "127.0.0.1:0")
    processes.append(manager)
    host, _, port = manager.address.rpartition(":")
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64
    for data in (b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n", http2):
        _throw(socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S), [data])
    with grpc.insecure_channel(manager.address) as channel:
        listed: Any = channel.unary_unary("/kvfabric.rpc.v1.ControlService/ListNodes")
        assert listed(b"", timeout=ANSWER_TIMEOUT_S) is not None
    assert manager.end() == 0
    assert "Traceback" not in manager.log.read_text()
