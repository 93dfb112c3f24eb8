"""NodeService over gRPC, for clients in any language: the same handler, the same promises."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import kvfabric_client
from kvfabric import checksums
from kvfabric.errors import Denied, Refused
from kvfabric.grpc_codes import error_of
from kvfabric.rpc.v1 import node_pb2, node_pb2_grpc, types_pb2
from kvfabric.types import Namespace, Status
from kvfabric_client import Room
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, flip, key, payload
from .test_deadlines import eventually, promises

SPACE = types_pb2.Namespace(tenant="default", fingerprint=b"f" * 32)
CHUNK_BYTES = 1 << 20


class Guest:
    """A session over gRPC."""

    def __init__(self, node: Node, **fields: Any) -> None:
        self.channel = grpc.insecure_channel(node.endpoints.grpc_address)
        self.stub = node_pb2_grpc.NodeServiceStub(self.channel)
        asked = {"min_version": 1, "max_version": 1, "namespaces": [SPACE], **fields}
        self.hello = self.stub.Hello(node_pb2.HelloRequest(**asked), timeout=10)
        self.space = next(iter(self.hello.namespace_ids), b"")
        self.metadata = (("kvfabric-session", self.hello.session.decode()),)

    def call(self, method: str, request: Any) -> Any:
        return getattr(self.stub, method)(request, timeout=20, metadata=self.metadata)

    def write(
        self, shards: dict[int, Any], *, layers: int = 1, sums: list[int] | None = None
    ) -> list[node_pb2.WriteResponse]:
        header = node_pb2.WriteRequest.Header(
            namespace_id=self.space,
            keys=[key(number) for number in shards],
            size_bytes=[len(shard) for shard in shards.values()],
            layers=layers,
        )

        def steps() -> Iterator[node_pb2.WriteRequest]:
            yield node_pb2.WriteRequest(header=header)
            for index, shard in enumerate(shards.values()):
                for start in range(0, len(shard), CHUNK_BYTES):
                    chunk = bytes(shard[start : start + CHUNK_BYTES])
                    yield node_pb2.WriteRequest(index=index, offset=start, payload=chunk)
            right = [s for shard in shards.values() for s in checksums.checksums(shard, layers)]
            trailer = node_pb2.WriteRequest.Trailer(checksums=right if sums is None else sums)
            yield node_pb2.WriteRequest(trailer=trailer)

        return list(self.stub.Write(steps(), timeout=20, metadata=self.metadata))

    def read(self, *numbers: int) -> tuple[Any, dict[int, bytes]]:
        request = node_pb2.ReadRequest(
            namespace_id=self.space, keys=[key(number) for number in numbers]
        )
        answers = list(self.stub.Read(request, timeout=20, metadata=self.metadata))
        assert [answer.last for answer in answers] == [False] * (len(answers) - 1) + [True]
        got: dict[int, bytes] = {}
        for answer in answers[1:]:
            assert len(got.get(answer.index, b"")) == answer.offset
            got[answer.index] = got.get(answer.index, b"") + answer.payload
        return answers[0].header, got


@pytest.fixture
def node(start: Start) -> Node:
    return start(grpc="127.0.0.1:0")


@pytest.fixture
def guest(node: Node) -> Iterator[Guest]:
    guest = Guest(node)
    yield guest
    guest.channel.close()


@pytest.fixture
def room(node: Node) -> Iterator[Room]:
    with contextlib.closing(kvfabric_client.connect(address(node, "unix"))) as client:
        yield client.open(Namespace("default", b"f" * 32))


def test_what_is_written_over_grpc_is_read_over_grpc_and_over_shared_memory(
    guest: Guest, room: Room
) -> None:
    shards = {1: payload(1, 2_500_000).data, 2: payload(2, 10).data}
    first, last = guest.write(shards, layers=5)
    assert list(first.statuses) == list(last.statuses) == [types_pb2.STATUS_OK] * 2
    assert last.last

    header, got = guest.read(1, 9, 2)
    ok, miss = types_pb2.STATUS_OK, types_pb2.STATUS_MISS
    assert list(header.statuses) == [ok, miss, ok]
    assert got == {0: bytes(shards[1]), 2: bytes(shards[2])}
    assert list(header.checksums) == [
        *checksums.checksums(shards[1], 5),
        *checksums.checksums(shards[2], 5),
    ]
    [copy] = room.get([key(1)])
    assert copy is not None
    assert np.array_equal(copy, payload(1, 2_500_000))


def test_what_exists_is_told_at_once(guest: Guest) -> None:
    guest.write({1: payload(1, 100).data})
    [answer] = list(
        guest.stub.Write(
            iter(
                [
                    node_pb2.WriteRequest(
                        header=node_pb2.WriteRequest.Header(
                            namespace_id=guest.space, keys=[key(1)], size_bytes=[100]
                        )
                    )
                ]
            ),
            timeout=10,
            metadata=guest.metadata,
        )
    )
    assert list(answer.statuses) == [types_pb2.STATUS_EXISTS]
    assert answer.last


@pytest.mark.parametrize("sums", [[], [1], [1, 2]])
def test_wrong_checksums_store_nothing(guest: Guest, node: Node, sums: list[int]) -> None:
    answers = guest.write({1: payload(1, 100).data}, sums=sums)
    assert list(answers[-1].statuses) == [types_pb2.STATUS_REFUSED]
    assert "checksums" in answers[-1].reasons[0]
    assert core_of(node).books().free_bytes == core_of(node).books().capacity_bytes


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [node_pb2.WriteRequest(index=0, payload=b"x")],
        ["header"],
        ["header", node_pb2.WriteRequest(index=0, offset=5, payload=b"x")],
        ["header", node_pb2.WriteRequest(index=3, payload=b"x")],
        ["header", node_pb2.WriteRequest(index=0, payload=b"x" * 101)],
        ["header", node_pb2.WriteRequest(index=0)],
    ],
)
def test_a_write_out_of_order_is_refused_and_leaves_nothing(
    guest: Guest, node: Node, steps: list[Any]
) -> None:
    header = node_pb2.WriteRequest.Header(namespace_id=guest.space, keys=[key(1)], size_bytes=[100])
    sent = [node_pb2.WriteRequest(header=header) if s == "header" else s for s in steps]
    with pytest.raises(grpc.RpcError) as caught:
        list(guest.stub.Write(iter(sent), timeout=10, metadata=guest.metadata))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert eventually(lambda: promises(node) == (0, 0))


def test_a_write_that_is_cancelled_leaves_nothing(guest: Guest, node: Node) -> None:
    header = node_pb2.WriteRequest.Header(
        namespace_id=guest.space, keys=[key(1)], size_bytes=[100], deadline_ms=60_000
    )
    go_on = threading.Event()

    def steps() -> Iterator[node_pb2.WriteRequest]:
        yield node_pb2.WriteRequest(header=header)
        go_on.wait(20)

    call = guest.stub.Write(steps(), timeout=20, metadata=guest.metadata)
    assert list(next(iter(call)).statuses) == [types_pb2.STATUS_OK]
    call.cancel()
    go_on.set()
    assert eventually(lambda: promises(node) == (0, 0))


def test_a_read_that_is_cancelled_lets_go(guest: Guest, node: Node) -> None:
    guest.write({n: payload(n, 3 << 20).data for n in range(6)})
    request = node_pb2.ReadRequest(namespace_id=guest.space, keys=[key(n) for n in range(6)])
    call = guest.stub.Read(request, timeout=20, metadata=guest.metadata)
    next(iter(call))
    call.cancel()
    assert eventually(lambda: promises(node) == (0, 0))


def test_damage_is_seen_by_the_reader_s_checksums_and_dropped_by_verify(
    guest: Guest, room: Room
) -> None:
    guest.write({1: payload(1, 1000).data})
    flip(room, key(1), 7)
    header, got = guest.read(1)
    assert checksums.checksums(memoryview(got[0])) != list(header.checksums)

    request = node_pb2.VerifyRequest(namespace_id=guest.space, keys=[key(1), key(2)])
    assert list(guest.call("Verify", request).statuses) == [types_pb2.STATUS_MISS] * 2
    assert room.match([key(1)]).matched == 0


def test_every_call_answers(guest: Guest) -> None:
    guest.write({1: payload(1, 100).data})
    both: dict[str, Any] = {"namespace_id": guest.space, "keys": [key(1), key(2)]}
    assert guest.call("Match", node_pb2.MatchRequest(**both)).matched == 1
    ok, miss = Status.OK, Status.MISS
    assert list(guest.call("Pin", node_pb2.PinRequest(**both)).statuses) == [ok, miss]
    assert list(guest.call("Unpin", node_pb2.UnpinRequest(**both)).statuses) == [ok, miss]
    lease = guest.call("Acquire", node_pb2.AcquireRequest(**both)).lease
    assert guest.call("Renew", node_pb2.RenewRequest(lease=lease, lease_ms=500)).lease_ms == 500
    guest.call("Release", node_pb2.ReleaseRequest(leases=[lease]))
    reserve = node_pb2.ReserveRequest(
        namespace_id=guest.space, keys=[key(5)], size_bytes=[64], deadline_ms=1000
    )
    reservation = guest.call("Reserve", reserve).reservation
    commit = node_pb2.CommitRequest(reservation=reservation, checksums=[1])
    assert list(guest.call("Commit", commit).statuses) == [Status.REFUSED]
    reservation = guest.call("Reserve", reserve).reservation
    guest.call("Abort", node_pb2.AbortRequest(reservation=reservation))
    assert guest.call("Stats", node_pb2.StatsRequest()).stats.node == "n0"
    explain = node_pb2.ExplainRequest(key=key(1)[:31])
    assert guest.call("Explain", explain).events
    assert guest.call("Purge", node_pb2.PurgeRequest(**both)).shards == 1


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Match", node_pb2.MatchRequest(keys=[b"short"]), grpc.StatusCode.INVALID_ARGUMENT),
        ("Match", node_pb2.MatchRequest(keys=[key(1)]), grpc.StatusCode.PERMISSION_DENIED),
        ("Renew", node_pb2.RenewRequest(lease=3), grpc.StatusCode.INVALID_ARGUMENT),
        ("Commit", node_pb2.CommitRequest(reservation=3), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_an_error_has_its_code(
    guest: Guest, method: str, request_: Any, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        guest.call(method, request_)
    assert caught.value.code() is code
    denied = code is grpc.StatusCode.PERMISSION_DENIED
    assert type(error_of(caught.value, "")) is (Denied if denied else Refused)


def test_a_read_of_another_s_namespace_is_denied(node: Node, guest: Guest) -> None:
    stranger = Guest(
        node,
        principal="other",
        namespaces=[types_pb2.Namespace(tenant="other", fingerprint=b"f" * 32)],
    )
    stranger.space = guest.space
    for attempt in (lambda: stranger.read(1), lambda: stranger.write({1: b"x"})):
        with pytest.raises(grpc.RpcError) as caught:
            attempt()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    stranger.channel.close()


def test_without_a_session_every_call_is_denied(node: Node) -> None:
    with grpc.insecure_channel(node.endpoints.grpc_address) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Stats(node_pb2.StatsRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "call Hello" in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            stub.Hello(node_pb2.HelloRequest(min_version=5, max_version=9), timeout=10)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_second_hello_adds_namespaces_to_the_session(guest: Guest, node: Node) -> None:
    more = node_pb2.HelloRequest(
        min_version=1,
        max_version=1,
        session=guest.hello.session,
        namespaces=[types_pb2.Namespace(tenant="default", fingerprint=b"g" * 32)],
    )
    answer = guest.stub.Hello(more, timeout=10)
    assert answer.session == guest.hello.session
    assert "shm" not in answer.features
    assert len(core_of(node).sessions) == 1
    match = node_pb2.MatchRequest(namespace_id=answer.namespace_ids[0], keys=[key(1)])
    assert guest.call("Match", match).matched == 0
