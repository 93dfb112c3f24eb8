"""Calls that must be refused, with the reason: nothing is stored, nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    ROOM,
    SPACE,
    NodeProcess,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.checksums import checksums
from kvfabric.errors import Denied, FabricError, Refused, Unsupported
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import node_pb2, node_pb2_grpc, wire_pb2
from kvfabric.types import Key, Namespace, NamespaceId, Status
from kvfabric.wire import frames, sockets

pytestmark = pytest.mark.faults

SIZE = 64 << 10
ZEROS = checksums(memoryview(bytes(SIZE)))


@pytest.fixture
def wire(shared_node: NodeProcess) -> Iterator[Wire]:
    with Wire(shared_node.unix, "shm") as wire:
        yield wire
        wire.call("purge", node_pb2.PurgeRequest(namespace_id=ROOM))
    shared_node.settle()


def test_a_wrong_checksum_is_refused_and_the_extent_comes_back(wire: Wire) -> None:
    granted = wire.reserve([key_of(1)], SIZE)
    wire.fill(granted, bytes(SIZE))
    answer = wire.commit(granted.reservation, checksums=[ZEROS[0] ^ 1])
    assert list(answer.statuses) == [Status.REFUSED]
    assert "write it again" in answer.reasons[0]
    assert not wire.acquire([key_of(1)]).lease
    assert wire.stats().tiers[0].held_bytes == 0
    wire.store(key_of(1), bytes(SIZE))


@pytest.mark.parametrize("sums", [[], ZEROS * 2], ids=["too short", "too long"])
def test_a_checksum_column_of_wrong_length_is_refused(wire: Wire, sums: list[int]) -> None:
    granted = wire.reserve([key_of(1)], SIZE)
    answer = wire.commit(granted.reservation, checksums=sums)
    assert list(answer.statuses) == [Status.REFUSED]
    assert "a length or the number of layers is wrong" in answer.reasons[0]
    assert wire.stats().reservations == 0


def test_a_second_commit_is_refused_and_harms_nothing(wire: Wire) -> None:
    granted = wire.reserve([key_of(1), key_of(2)], SIZE)
    wire.fill(granted, bytes(SIZE), 0)
    wire.fill(granted, bytes(SIZE), 1)
    first = wire.commit(granted.reservation, indices=[0], checksums=ZEROS)
    twice = wire.commit(granted.reservation, indices=[0, 1], checksums=ZEROS)
    assert list(first.statuses) == [Status.OK]
    assert list(twice.statuses) == [Status.REFUSED, Status.OK]
    assert "settled already" in twice.reasons[0]
    with pytest.raises(Refused, match="reserve again"):
        wire.commit(granted.reservation, checksums=ZEROS * 2)
    assert list(wire.acquire([key_of(1), key_of(2)]).statuses) == [Status.OK, Status.OK]


def test_a_commit_after_its_deadline_is_refused_and_the_key_is_free(wire: Wire) -> None:
    granted = wire.reserve([key_of(1)], SIZE, deadline_ms=20)
    until(lambda: wire.stats().tiers[0].quarantined_bytes == SIZE, "the deadline passes")
    late = wire.commit(granted.reservation, checksums=ZEROS)
    assert list(late.statuses) == [Status.REFUSED]
    assert "deadline" in late.reasons[0]
    assert wire.stats().tiers[0].quarantined_bytes == 0
    assert list(wire.reserve([key_of(1)], SIZE).statuses) == [Status.OK]


def test_a_value_larger_than_a_segment_or_the_arena_is_refused(wire: Wire) -> None:
    for size in (1 << 20, 16 << 20, 1 << 62):
        answer = wire.reserve([key_of(1)], size)
        assert list(answer.statuses) == [Status.REFUSED]
        assert "larger segments or smaller shards" in answer.reasons[0]
    with pytest.raises(Refused, match="limit is 4096"):
        wire.reserve([key_of(1)], SIZE, layers=SIZE)


def test_a_batch_larger_than_the_arena_stores_what_fits(shared_node: NodeProcess) -> None:
    keys = [key_of(number) for number in range(40)]
    contents = [bytes_of(key, 512 << 10) for key in keys]
    with shared_node.client() as client:
        room = client.open(SPACE)
        statuses = room.put(keys, contents)
        assert statuses.count(Status.OK) == 16
        assert set(statuses) == {Status.OK, Status.RETRY}
        for key, data, status in zip(room.get(keys), contents, statuses, strict=True):
            assert (key is None) == (status is Status.RETRY)
            assert key is None or key.tobytes() == data
        room.purge()


def test_unknown_keys_miss(wire: Wire) -> None:
    keys = [key_of(1), key_of(2)]
    assert list(wire.acquire(keys).statuses) == [Status.MISS, Status.MISS]
    ask = node_pb2.PinRequest(namespace_id=ROOM, keys=keys)
    assert list(wire.call("pin", ask).statuses) == [Status.MISS, Status.MISS]
    unpin = node_pb2.UnpinRequest(namespace_id=ROOM, keys=keys)
    assert list(wire.call("unpin", unpin).statuses) == [Status.MISS, Status.MISS]
    verify = node_pb2.VerifyRequest(namespace_id=ROOM, keys=keys)
    assert list(wire.call("verify", verify).statuses) == [Status.MISS, Status.MISS]
    assert wire.call("purge", node_pb2.PurgeRequest(namespace_id=ROOM, keys=keys)).shards == 0
    with pytest.raises(Refused, match="a key has 32"):
        wire.acquire([Key(b"short")])


def test_another_tenant_cannot_name_map_read_match_or_purge(
    wire: Wire, shared_node: NodeProcess
) -> None:
    segment = wire.store(key_of(1), bytes(SIZE)).segments[0]
    other = Namespace("rival", SPACE.fingerprint, SPACE.salt)
    with Wire(shared_node.unix, "shm", space=other, tenant="rival") as rival:
        with pytest.raises(Denied, match=f"segment {segment} is not one of tenant 'rival'"):
            rival.call("map", wire_pb2.MapRequest(segments=[segment]))
        for name, request in _calls_with(ROOM, [key_of(1)]):
            with pytest.raises(Denied, match="not open in this session"):
                rival.call(name, request)
        with pytest.raises(Denied, match="belongs to tenant 'default'"):
            Wire(shared_node.unix, space=None, tenant="rival", session=wire.hello.session)
        with pytest.raises(Denied, match="cannot open a namespace of tenant 'default'"):
            Wire(shared_node.unix, space=SPACE, tenant="rival")
        everything = rival.call("purge", node_pb2.PurgeRequest())
        assert everything.shards == 0
        told = rival.call("explain", node_pb2.ExplainRequest(key=key_of(1)[:4]))
        assert not told.events
        assert not rival.acquire([key_of(1)], namespace_id(other)).lease
    assert list(wire.acquire([key_of(1)]).statuses) == [Status.OK]


def test_another_namespace_of_the_same_tenant_does_not_meet(
    wire: Wire, shared_node: NodeProcess
) -> None:
    wire.store(key_of(1), bytes(SIZE))
    salted = Namespace("default", SPACE.fingerprint, b"another salt")
    with Wire(shared_node.unix, space=salted) as other:
        room = namespace_id(salted)
        assert not other.acquire([key_of(1)], room).lease
        match = node_pb2.MatchRequest(namespace_id=room, keys=[key_of(1)])
        assert other.call("match", match).matched == 0
        assert other.call("purge", node_pb2.PurgeRequest(namespace_id=room)).shards == 0
    assert wire.acquire([key_of(1)]).lease


def _calls_with(room: NamespaceId, keys: Sequence[Key]) -> list[tuple[str, Any]]:
    return [
        ("match", node_pb2.MatchRequest(namespace_id=room, keys=keys)),
        ("reserve", node_pb2.ReserveRequest(namespace_id=room, keys=keys, size_bytes=[64])),
        ("acquire", node_pb2.AcquireRequest(namespace_id=room, keys=keys)),
        ("verify", node_pb2.VerifyRequest(namespace_id=room, keys=keys)),
        ("pin", node_pb2.PinRequest(namespace_id=room, keys=keys)),
        ("unpin", node_pb2.UnpinRequest(namespace_id=room, keys=keys)),
        ("purge", node_pb2.PurgeRequest(namespace_id=room, keys=keys)),
        ("purge", node_pb2.PurgeRequest(namespace_id=room)),
        ("explain", node_pb2.ExplainRequest(namespace_id=room, key=keys[0])),
    ]


def test_another_sessions_reservation_and_lease_are_out_of_reach(
    wire: Wire, shared_node: NodeProcess
) -> None:
    wire.store(key_of(1), bytes(SIZE))
    lease = wire.acquire([key_of(1)]).lease
    granted = wire.reserve([key_of(2)], SIZE)
    wire.fill(granted, bytes(SIZE))
    with Wire(shared_node.unix) as other:
        with pytest.raises(Refused, match="has no reservation"):
            other.commit(granted.reservation, checksums=ZEROS)
        with pytest.raises(Refused, match="has no reservation"):
            other.call("abort", node_pb2.AbortRequest(reservation=granted.reservation))
        with pytest.raises(Refused, match="has no lease"):
            other.call("renew", node_pb2.RenewRequest(lease=lease))
        other.call("release", node_pb2.ReleaseRequest(leases=[lease]))
    assert wire.stats().leases == 1
    assert list(wire.commit(granted.reservation, checksums=ZEROS).statuses) == [Status.OK]


def test_what_is_between_nodes_is_denied_to_clients(wire: Wire) -> None:
    with pytest.raises(Denied, match="shows no peer_token"):
        wire.call("adopt_state", node_pb2.AdoptStateRequest(namespace_id=ROOM, name=bytes(32)))
    detached = node_pb2.OpenGroupRequest(namespace_id=ROOM, keys=[key_of(1)], detached=True)
    with pytest.raises(Denied, match="only other nodes' groups"):
        wire.call("open_group", detached)


def test_a_refused_hello_leaves_no_session(shared_node: NodeProcess) -> None:
    with Wire(shared_node.unix, space=None) as wire:
        before = wire.stats().sessions
        with pytest.raises(Unsupported, match="bring the older one up to date"):
            wire.call("hello", node_pb2.HelloRequest(min_version=99, max_version=99))
        with pytest.raises(Denied, match="KVFABRIC_TOKEN"):
            Wire(shared_node.unix, token=b"wrong")
        many = node_pb2.HelloRequest(min_version=1, max_version=1)
        for number in range(1025):
            many.namespaces.add(
                tenant="default", fingerprint=bytes(32), salt=number.to_bytes(4, "little")
            )
        with grpc.insecure_channel(shared_node.line["grpc_address"]) as channel:
            stub = node_pb2_grpc.NodeServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="more than 1024 namespaces"):
                stub.Hello(many, timeout=ANSWER_TIMEOUT_S)
        assert wire.stats().sessions == before


def test_a_session_cannot_swallow_another_or_turn_into_a_transfer(
    shared_node: NodeProcess,
) -> None:
    """Either would leave a session whose end nobody notices."""
    with Wire(shared_node.unix) as first, Wire(shared_node.unix) as second:
        for session, features in ((first, ()), (second, ("bulk",))):
            request = node_pb2.HelloRequest(
                min_version=1, max_version=1, session=session.hello.session, features=features
            )
            with pytest.raises(Refused, match="open a new one"):
                second.call("hello", request)
        with pytest.raises(Refused, match="no such session"):
            Wire(shared_node.unix, session=b"never given")
    shared_node.settle()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([(0, 0, SIZE // 2)], "bytes came of"),
        ([(0, 0, SIZE), (0, SIZE, 64)], "longer than the"),
        ([(0, 64, 64)], "in order"),
        ([(0, 0, 64), (0, 0, 64)], "in order"),
        ([(7, 0, 64)], "in order"),
        ([(0, 0, 0)], "in order"),
    ],
    ids=["shorter", "longer", "gap", "repeated", "not granted", "empty"],
)
def test_a_streamed_write_of_wrong_length_or_order_is_refused(
    shared_node: NodeProcess, kind: str, steps: list[tuple[int, int, int]], complaint: str
) -> None:
    address = shared_node.unix if kind == "unix" else shared_node.tcp
    with Wire(address) as owner:
        sock = _begin_write(address, owner, key_of(1))
        for index, offset, size_bytes in steps:
            frame = wire_pb2.Frame(id=1)
            frame.write_request.index = index
            frame.write_request.offset = offset
            _send(sock, frame, bytes(size_bytes))
        try:
            frame = wire_pb2.Frame(id=1)
            frame.write_request.trailer.checksums.extend(ZEROS)
            _send(sock, frame)
            answer = _receive(sock)
        except FabricError:
            answer = wire_pb2.Frame()  # it may be gone before what it said arrives
        answer.ClearField("id")
        assert complaint in str(answer) or not answer.ByteSize()
        until(lambda: owner.stats().reservations == 0, "the reservation is given back")
        assert not owner.acquire([key_of(1)]).lease
        sock.close()
    shared_node.settle()


def test_payload_behind_the_trailer_is_refused(shared_node: NodeProcess) -> None:
    with Wire(shared_node.unix) as owner:
        sock = _begin_write(shared_node.unix, owner, key_of(1))
        frame = wire_pb2.Frame(id=1)
        frame.write_request.trailer.checksums.extend(ZEROS)
        _send(sock, frame, b"more")
        assert "payload behind a trailer" in _receive(sock).error.message
        until(lambda: owner.stats().reservations == 0, "the reservation is given back")
        sock.close()


def test_a_streamed_write_that_stalls_ends_by_its_deadline(shared_node: NodeProcess) -> None:
    with Wire(shared_node.tcp) as owner:
        sock = _begin_write(shared_node.tcp, owner, key_of(1), deadline_ms=100)
        until(lambda: owner.stats().reservations == 0, "the reservation is given back")
        assert owner.stats().tiers[0].quarantined_bytes == 0
        sock.close()


def test_a_grpc_write_that_stalls_ends_by_its_deadline(shared_node: NodeProcess) -> None:
    with grpc.insecure_channel(shared_node.line["grpc_address"]) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        hello = node_pb2.HelloRequest(min_version=1, max_version=1)
        hello.namespaces.add(tenant="default", fingerprint=bytes(32), salt=SPACE.salt)
        session = stub.Hello(hello, timeout=ANSWER_TIMEOUT_S).session.decode()
        shared_node.guests += 1
        header = node_pb2.WriteRequest.Header(
            namespace_id=ROOM, keys=[key_of(1)], size_bytes=[SIZE], deadline_ms=100
        )

        def stall() -> Iterator[node_pb2.WriteRequest]:
            yield node_pb2.WriteRequest(header=header)
            until(lambda: shared_node.stats().reservations == 0, "the reservation is given back")

        answers = stub.Write(
            stall(), timeout=ANSWER_TIMEOUT_S, metadata=(("kvfabric-session", session),)
        )
        assert list(next(answers).statuses) == [Status.OK]
        with pytest.raises(grpc.RpcError, match="did not end by its deadline"):
            next(answers)
        books = shared_node.tier()
        assert books.reserved_bytes == books.quarantined_bytes == 0


def test_promises_to_clients_that_share_no_memory_end_by_their_deadline(
    shared_node: NodeProcess,
) -> None:
    """Nobody can touch those extents, so nothing waits for the session's end."""
    with Wire(shared_node.unix, "shm") as local, Wire(shared_node.tcp) as remote:
        local.store(key_of(1), bytes(SIZE))
        late = remote.reserve([key_of(2)], SIZE, deadline_ms=50)
        lease = node_pb2.AcquireRequest(namespace_id=ROOM, keys=[key_of(1)], lease_ms=50)
        assert remote.call("acquire", lease).lease
        until(lambda: shared_node.stats().reservations == 0, "the reservation ends")
        until(lambda: shared_node.stats().leases == 0, "the lease ends")
        assert shared_node.tier().quarantined_bytes == 0
        with pytest.raises(Refused, match="reserve again"):
            remote.commit(late.reservation, checksums=ZEROS)
        with Wire(shared_node.unix, "shm", space=None, session=remote.hello.session) as joined:
            again = remote.reserve([key_of(2)], SIZE)
            with pytest.raises(Refused, match="open one over unix"):
                joined.fill(again, bytes(SIZE))
        local.call("purge", node_pb2.PurgeRequest(namespace_id=ROOM))
    shared_node.settle()


def test_a_grpc_read_that_nobody_fetches_ends_by_its_deadline(shared_node: NodeProcess) -> None:
    keys = [key_of(number) for number in range(14)]
    with (
        shared_node.client() as client,
        grpc.insecure_channel(shared_node.line["grpc_address"]) as channel,
    ):
        room = client.open(SPACE)
        room.put(keys, [bytes_of(key, 512 << 10) for key in keys])
        stub = node_pb2_grpc.NodeServiceStub(channel)
        hello = node_pb2.HelloRequest(min_version=1, max_version=1)
        hello.namespaces.add(tenant="default", fingerprint=bytes(32), salt=SPACE.salt)
        session = stub.Hello(hello, timeout=ANSWER_TIMEOUT_S).session.decode()
        shared_node.guests += 1
        read = node_pb2.ReadRequest(namespace_id=ROOM, keys=keys, deadline_ms=200)
        answers = stub.Read(read, timeout=5.0, metadata=(("kvfabric-session", session),))
        assert set(next(answers).header.statuses) == {Status.OK}
        until(lambda: shared_node.stats().leases == 0, "the lease ends", 4.0)
        answers.cancel()
        room.purge()


def test_an_answer_too_large_for_a_frame_leaves_no_promise(shared_node: NodeProcess) -> None:
    """A reader that cannot be told of its lease cannot give it back."""
    keys = [key_of(number) for number in range(64)]
    data = np.zeros(4096 * 8, np.uint8)
    with shared_node.client() as client, Wire(shared_node.unix) as wire:
        room = client.open(SPACE)
        for start in range(0, 64, 16):  # a commit must fit into a frame, too
            some = keys[start : start + 16]
            assert set(room.put(some, [data] * 16, layers=4096)) == {Status.OK}
        with pytest.raises(Refused, match="smaller batch"):
            wire.acquire(keys)
        assert wire.stats().leases == 0
        room.purge()


def _begin_write(address: str, owner: Wire, key: Key, deadline_ms: int = 5000) -> Any:
    """A bulk connection on which one key was granted."""
    bulk = Wire(address, "bulk", space=None, session=owner.hello.session)
    sock = bulk.connection.detach()
    header = node_pb2.WriteRequest.Header(
        namespace_id=ROOM, keys=[key], size_bytes=[SIZE], deadline_ms=deadline_ms
    )
    _send(sock, wire_pb2.Frame(id=1, write_request=node_pb2.WriteRequest(header=header)))
    assert list(_receive(sock).write_response.statuses) == [Status.OK]
    return sock


def _send(sock: Any, frame: wire_pb2.Frame, payload: bytes = b"") -> None:
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    sockets.send(sock, frames.pack(frame, len(payload)), memoryview(payload), deadline_s)


def _receive(sock: Any) -> wire_pb2.Frame:
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    return sockets.receive_frame(sock, memoryview(bytearray(1 << 20)), deadline_s)[0]


def test_thousands_of_refusals_fit_into_one_answer(shared_node: NodeProcess) -> None:
    with Wire(shared_node.unix) as wire:
        keys = [key_of(number) for number in range(4096)]
        answer = wire.reserve(keys, 256 << 10)
        statuses = list(answer.statuses)
        assert statuses.count(Status.OK) == 32
        assert statuses.count(Status.RETRY) == 4096 - 32
        assert "no room for" in answer.reasons[32]
        with pytest.raises(Refused, match="the limit is 4096"):
            wire.reserve([*keys, key_of(4096)], 64)
