"""A client written from proto/README.md alone: sockets, BLAKE3, XXH3 and the messages.

It uses nothing of the project's own wire, keys, checksums or client, so what it can do
another language can.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import xxhash
from blake3 import blake3

from kvfabric.rpc.v1 import node_pb2, node_pb2_grpc, types_pb2, wire_pb2
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

TIMEOUT_S = 20.0
FINGERPRINT = bytes(range(32))
SPACE = types_pb2.Namespace(tenant="default", fingerprint=FINGERPRINT, salt=b"lora")
LAYERS = 2
SHARD = bytes(i % 253 for i in range(2 * 300_000))  # two layers of two parts each


def digest(context: str, raw: bytes) -> bytes:
    return blake3(raw, derive_key_context=context).digest()


def fields(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


NAMESPACE = digest("kvfabric v1 namespace", fields(b"default", FINGERPRINT, b"lora"))
LINK = digest("kvfabric v1 chain", bytes(32) + struct.pack("<4I", 1, 2, 3, 4))
PART = struct.pack("<QIIIII", 0, 4, 0, LAYERS, 0, 1)
KEY = digest("kvfabric v1 shard key", fields(NAMESPACE, LINK, PART))
ABSENT = digest("kvfabric v1 shard key", fields(NAMESPACE, bytes(32), PART))
SUMS = [
    xxhash.xxh3_64_intdigest(SHARD[start:end])
    for start, end in ((0, 262_144), (262_144, 300_000), (300_000, 562_144), (562_144, 600_000))
]


class Peer:
    """One connection."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(address)

    def send(self, frame: wire_pb2.Frame, payload: bytes = b"") -> None:
        header = frame.SerializeToString()
        self.sock.sendall(struct.pack("<II", len(header), len(payload)) + header + payload)

    def receive(self) -> tuple[wire_pb2.Frame, bytes]:
        header_bytes, payload_bytes = struct.unpack("<II", self.exactly(8))
        return wire_pb2.Frame.FromString(self.exactly(header_bytes)), self.exactly(payload_bytes)

    def exactly(self, count: int) -> bytes:
        out = b""
        while len(out) < count:
            data = self.sock.recv(count - len(out))
            assert data, "the node closed the connection"
            out += data
        return out

    def call(self, frame: wire_pb2.Frame) -> wire_pb2.Frame:
        self.send(frame)
        answer, payload = self.receive()
        assert (answer.id, payload) == (frame.id, b"")
        return answer

    def descriptor(self, frame: wire_pb2.Frame) -> tuple[wire_pb2.Frame, int]:
        """A call whose answer brings one descriptor beside its first byte."""
        self.send(frame)
        data, (descriptor,), _, _ = socket.recv_fds(self.sock, 8, 1)
        data += self.exactly(8 - len(data))
        header_bytes, _ = struct.unpack("<II", data)
        return wire_pb2.Frame.FromString(self.exactly(header_bytes)), descriptor


def hello(session: bytes = b"", features: tuple[str, ...] = ()) -> wire_pb2.Frame:
    frame = wire_pb2.Frame(id=1)
    request = frame.hello_request
    request.min_version = request.max_version = 1
    request.client = "from the specification"
    request.namespaces.append(SPACE)
    request.features.extend(features)
    request.session = session
    return frame


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Serves on a unix socket, TCP and gRPC; its books are right at the end."""
    node = Node(NodeSettings(node="n0", memory=16 << 20, runtime_dir=tmp_path / "run"))
    node.start()
    yield node
    node.check()
    node.stop()


def write_by_shared_memory(peer: Peer) -> None:
    frame = wire_pb2.Frame(id=2)
    reserve = frame.reserve_request
    reserve.namespace_id = NAMESPACE
    reserve.keys.append(KEY)
    reserve.size_bytes.append(len(SHARD))
    reserve.layers = LAYERS
    granted = peer.call(frame).reserve_response
    assert list(granted.statuses) == [types_pb2.STATUS_OK]

    wanted = wire_pb2.MapRequest(segments=granted.segments)
    answer, descriptor = peer.descriptor(wire_pb2.Frame(id=3, map_request=wanted))
    assert list(answer.map_response.segments) == list(granted.segments)
    with mmap.mmap(descriptor, answer.map_response.size_bytes[0]) as memory:
        os.close(descriptor)
        offset = granted.offsets[0]
        memory[offset : offset + len(SHARD)] = SHARD

    commit = node_pb2.CommitRequest(reservation=granted.reservation, checksums=SUMS)
    sealed = peer.call(wire_pb2.Frame(id=4, commit_request=commit)).commit_response
    assert list(sealed.statuses) == [types_pb2.STATUS_OK], sealed.reasons


def read_by_shared_memory(peer: Peer) -> bytes:
    acquire = node_pb2.AcquireRequest(namespace_id=NAMESPACE, keys=[ABSENT, KEY])
    found = peer.call(wire_pb2.Frame(id=5, acquire_request=acquire)).acquire_response
    assert list(found.statuses) == [types_pb2.STATUS_MISS, types_pb2.STATUS_OK]
    assert list(found.checksums) == SUMS
    assert found.layers[1] == LAYERS

    wanted = wire_pb2.MapRequest(segments=[found.segments[1]])
    answer, descriptor = peer.descriptor(wire_pb2.Frame(id=6, map_request=wanted))
    with mmap.mmap(descriptor, answer.map_response.size_bytes[0]) as memory:
        os.close(descriptor)
        shard = memory[found.offsets[1] : found.offsets[1] + found.size_bytes[1]]

    # Id 0: no answer; the next answer belongs to the next call.
    peer.send(wire_pb2.Frame(release_request=node_pb2.ReleaseRequest(leases=[found.lease])))
    assert leases(peer, wire_pb2.Frame(id=7)) == 0

    again = peer.call(wire_pb2.Frame(id=8, acquire_request=acquire)).acquire_response
    assert leases(peer, wire_pb2.Frame(id=9)) == 1
    assert leases(peer, wire_pb2.Frame(id=10, released_leases=[again.lease])) == 0
    return shard


def leases(peer: Peer, frame: wire_pb2.Frame) -> int:
    """How many the node counts, asked by this frame."""
    frame.stats_request.SetInParent()
    return peer.call(frame).stats_response.stats.leases


def read_by_bulk(peer: Peer) -> bytes:
    request = node_pb2.ReadRequest(namespace_id=NAMESPACE, keys=[ABSENT, KEY])
    peer.send(wire_pb2.Frame(id=2, read_request=request))
    first, _ = peer.receive()
    header = first.read_response.header
    assert list(header.statuses) == [types_pb2.STATUS_MISS, types_pb2.STATUS_OK]
    assert list(header.checksums) == SUMS
    out, last = b"", False
    while not last:
        frame, payload = peer.receive()
        assert (frame.read_response.index, frame.read_response.offset) == (1, len(out))
        out, last = out + payload, frame.read_response.last
    return out


def write_by_bulk(peer: Peer) -> None:
    header = node_pb2.WriteRequest.Header(
        namespace_id=NAMESPACE, keys=[KEY], size_bytes=[len(SHARD)], layers=LAYERS
    )
    peer.send(wire_pb2.Frame(id=2, write_request=node_pb2.WriteRequest(header=header)))
    grants, _ = peer.receive()
    assert list(grants.write_response.statuses) == [types_pb2.STATUS_OK]
    for start in range(0, len(SHARD), 400_000):
        step = node_pb2.WriteRequest(index=0, offset=start)
        peer.send(wire_pb2.Frame(id=2, write_request=step), SHARD[start : start + 400_000])
    trailer = node_pb2.WriteRequest.Trailer(checksums=SUMS)
    peer.send(wire_pb2.Frame(id=2, write_request=node_pb2.WriteRequest(trailer=trailer)))
    verdicts, _ = peer.receive()
    assert verdicts.write_response.last
    assert list(verdicts.write_response.statuses) == [types_pb2.STATUS_OK]


def read_by_grpc(address: str) -> bytes:
    with grpc.insecure_channel(address) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        session = stub.Hello(hello().hello_request, timeout=TIMEOUT_S).session
        chunks = stub.Read(
            node_pb2.ReadRequest(namespace_id=NAMESPACE, keys=[KEY]),
            metadata=(("kvfabric-session", session.decode()),),
            timeout=TIMEOUT_S,
        )
        assert list(next(chunks).header.checksums) == SUMS
        return b"".join(chunk.payload for chunk in chunks)


def tcp_address(node: Node) -> tuple[str, int]:
    host, _, port = node.endpoints.tcp_address.rpartition(":")
    return host, int(port)


def test_what_is_written_by_shared_memory_is_read_on_every_way(node: Node) -> None:
    local, remote = Peer(node.endpoints.unix_path), Peer(tcp_address(node))
    answer = local.call(hello(features=("shm", "no such feature"))).hello_response
    assert (answer.version, answer.node) == (1, "n0")
    assert list(answer.namespace_ids) == [NAMESPACE]
    assert list(answer.features) == ["shm"]
    write_by_shared_memory(local)
    assert read_by_shared_memory(local) == SHARD

    session = remote.call(hello()).hello_response.session
    bulk = Peer(tcp_address(node))
    joined = bulk.call(hello(session, ("bulk",))).hello_response
    assert list(joined.features) == ["bulk"]
    assert read_by_bulk(bulk) == SHARD
    assert read_by_grpc(node.endpoints.grpc_address) == SHARD
    for peer in (local, bulk, remote):
        peer.sock.close()


def test_what_is_written_over_tcp_is_read_by_shared_memory(node: Node) -> None:
    remote, local = Peer(tcp_address(node)), Peer(node.endpoints.unix_path)
    session = remote.call(hello()).hello_response.session
    bulk = Peer(tcp_address(node))
    bulk.call(hello(session, ("bulk",)))
    write_by_bulk(bulk)

    local.call(hello(features=("shm",)))
    assert read_by_shared_memory(local) == SHARD
    for peer in (local, bulk, remote):
        peer.sock.close()


def test_a_call_before_hello_is_refused(node: Node) -> None:
    peer = Peer(node.endpoints.unix_path)
    answer = peer.call(wire_pb2.Frame(id=9, stats_request=node_pb2.StatsRequest()))
    assert answer.error.code == types_pb2.ERROR_CODE_REFUSED
    peer.sock.close()


def test_a_version_that_is_not_spoken_is_refused_with_both_ranges(node: Node) -> None:
    peer = Peer(node.endpoints.unix_path)
    frame = hello()
    frame.hello_request.min_version = frame.hello_request.max_version = 7
    error = peer.call(frame).error
    assert error.code == types_pb2.ERROR_CODE_UNSUPPORTED
    assert "7 to 7" in error.message
    assert "1 to 1" in error.message
    peer.sock.close()


def test_a_namespace_of_another_tenant_is_denied(node: Node) -> None:
    peer = Peer(node.endpoints.unix_path)
    frame = hello()
    frame.hello_request.namespaces[0].tenant = "somebody else"
    assert peer.call(frame).error.code == types_pb2.ERROR_CODE_DENIED

    # Nor is one known by its id alone.
    frame.hello_request.ClearField("namespaces")
    peer.call(frame)
    match = node_pb2.MatchRequest(namespace_id=NAMESPACE, keys=[KEY])
    answer = peer.call(wire_pb2.Frame(id=2, match_request=match))
    assert answer.error.code == types_pb2.ERROR_CODE_DENIED
    peer.sock.close()
