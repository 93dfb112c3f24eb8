"""Calls on sequences, groups and states of a real node, as frames and by gRPC."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from kvfabric import checksums
from kvfabric.errors import Conflict, Refused
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Status
from kvfabric.wire.connection import Connection
from kvfabric_nodes.node import Node
from kvfabric_nodes.sequences import room as sequence_room

from .conftest import Start, address, key, payload
from .test_grpc import Guest

SPACE = types_pb2.Namespace(tenant="default", fingerprint=b"f" * 32)
LAYERS = 2
BLOCK_BYTES = 64 << 10
TOKENS = 16
SHAPE: dict[str, Any] = {"size_bytes": BLOCK_BYTES, "layers": LAYERS, "block_tokens": TOKENS}


class Wire:
    """A session over a unix socket. It shares memory, but here the bytes travel in appends."""

    def __init__(self, node: Node) -> None:
        self.life = Connection(address(node, "unix"), _soon())
        hello = node_pb2.HelloRequest(min_version=1, max_version=1, namespaces=[SPACE])
        answer = self.life.call("hello", hello, _soon()).hello_response
        (self.space,) = answer.namespace_ids
        self.session = answer.session

    def call(self, method: str, request: Any) -> Any:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in method).lstrip("_")
        return getattr(self.life.call(name, request, _soon()), f"{name}_response")

    def close(self) -> None:
        self.life.close()


def _soon() -> float:
    return time.monotonic() + 20


class Writer:
    """One sequence as its writer sees it, over either kind of session."""

    def __init__(self, link: Any, keys: list[int] | None = None, resume: int = 0) -> None:
        self.link = link
        request = node_pb2.OpenSequenceRequest(namespace_id=link.space, resume=resume, **SHAPE)
        request.keys.extend(key(number) for number in keys or ())
        self.opened = link.call("OpenSequence", request)
        self.id, self.epoch = self.opened.sequence, self.opened.epoch

    def call(self, method: str, **fields: Any) -> Any:
        kind = getattr(node_pb2, f"{method}Request")
        return self.link.call(method, kind(sequence=self.id, epoch=self.epoch, **fields))

    def write(self, number: int, tokens: int = TOKENS) -> None:
        """A whole block's bytes into the first open block; `tokens` of them become visible."""
        described = self.link.call("Describe", node_pb2.DescribeRequest(sequence=self.id))
        appended = self.call(
            "Append",
            start=described.length,
            tokens=tokens,
            blocks=[0],
            offsets=[0],
            size_bytes=[BLOCK_BYTES],
            payload=payload(number, BLOCK_BYTES).tobytes(),
        )
        assert appended.length == described.length + tokens

    def seal(self, *numbers: int, tokens: list[int] | None = None) -> list[Status]:
        sums = [s for n in numbers for s in checksums.checksums(block(n), LAYERS)]
        keys = [key(number) for number in numbers]
        answer = self.call("Seal", keys=keys, tokens=tokens, checksums=sums)
        return [Status(status) for status in answer.statuses]

    def put(self, *numbers: int) -> None:
        for number in numbers:
            assert self.call("Extend", blocks=1).reason == ""
            self.write(number)
            assert self.seal(number) == [Status.OK]


def block(number: int) -> memoryview:
    return memoryview(payload(number, BLOCK_BYTES).data)


@pytest.fixture
def node(start: Start) -> Node:
    return start(grpc="127.0.0.1:0")


@pytest.fixture(params=["wire", "grpc"])
def link(request: pytest.FixtureRequest, node: Node) -> Iterator[Any]:
    if request.param == "grpc":
        guest = Guest(node)
        with contextlib.closing(guest.channel):
            yield guest
    else:
        with contextlib.closing(Wire(node)) as wire:
            yield wire


def test_a_sequence_is_written_sealed_and_read_back(node: Node, link: Any) -> None:
    writer = Writer(link)
    writer.put(1, 2)
    writer.call("Extend", blocks=1)
    writer.write(3, tokens=5)

    assert writer.seal(3, tokens=[5]) == [Status.OK]

    described = link.call("Describe", node_pb2.DescribeRequest(sequence=writer.id))
    assert described.length == 2 * TOKENS + 5
    assert list(described.keys) == [key(1), key(2), key(3)]
    assert list(described.tokens) == [TOKENS, TOKENS, 5]
    assert list(described.nodes) == ["n0"]
    assert list(described.place) == [0, 0, 0]
    reader = Guest(node)
    with contextlib.closing(reader.channel):
        _, got = reader.read(1, 2, 3)
    assert [got[index] for index in range(3)] == [bytes(block(n)) for n in (1, 2, 3)]


def test_a_fork_of_a_sealed_block_copies_it_and_shares_the_rest(node: Node, link: Any) -> None:
    writer = Writer(link)
    writer.put(1, 2)
    fork = link.call("Fork", node_pb2.ForkRequest(sequence=writer.id, tokens=TOKENS + 3))
    other = Writer.__new__(Writer)
    other.link, other.id, other.epoch = link, fork.sequence, fork.epoch
    assert fork.tails.first_token == TOKENS

    other.call("Append", start=TOKENS + 3, tokens=TOKENS - 3)  # what was copied, as it is
    sums = checksums.checksums(block(2), LAYERS)
    answer = other.call("Seal", keys=[key(9)], checksums=sums)

    assert list(answer.statuses) == [Status.OK]
    described = link.call("Describe", node_pb2.DescribeRequest(sequence=fork.sequence))
    assert list(described.keys) == [key(1), key(9)]
    stats = link.call("Stats", node_pb2.StatsRequest()).stats
    assert stats.tiers[0].shards == 3
    assert stats.tiers[0].held_bytes == 3 * BLOCK_BYTES


def test_blocks_that_have_to_be_cleared_are_opened_a_few_at_a_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_room, "ZEROED_BYTES", 2 * BLOCK_BYTES)
    guest = Guest(node)
    with contextlib.closing(guest.channel):
        writer = Writer(guest)
        some = writer.call("Extend", blocks=3)
        assert len(some.tails.segments) == 2
        assert "extend again" in some.reason
        rest = writer.call("Extend", blocks=3)
        assert (len(rest.tails.segments), rest.reason) == (3, "")


def test_a_checksum_that_is_wrong_leaves_the_block_open(link: Any) -> None:
    writer = Writer(link)
    writer.call("Extend", blocks=2)
    writer.write(1)

    answer = writer.call("Seal", keys=[key(1)], checksums=[1, 2])

    assert list(answer.statuses) == [Status.REFUSED]
    assert "checksums" in answer.reasons[0]
    assert len(answer.tails.segments) == 2
    assert writer.seal(1) == [Status.OK]


def test_a_new_writer_fences_the_old_one(link: Any) -> None:
    old = Writer(link)
    old.put(1)
    old.call("Extend", blocks=1)
    old.write(2, tokens=3)

    new = Writer(link, resume=old.id)

    assert (new.opened.length, new.epoch) == (TOKENS, old.epoch + 1)
    with pytest.raises((Conflict, grpc.RpcError), match="resume it") as caught:
        old.call("Append", start=TOKENS, tokens=1)
    if isinstance(caught.value, grpc.RpcError):
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.ABORTED
    old.call("CloseSequence")  # lets go of what it had open
    new.put(2)


def test_a_writer_settles_what_it_gave_up_and_nobody_else_does(node: Node, link: Any) -> None:
    writer = Writer(link)
    writer.call("Extend", blocks=2)
    writer.write(1)
    ask = node_pb2.DescribeRequest(sequence=writer.id, settle=writer.epoch)
    with contextlib.closing(Wire(node)) as other:
        said = other.call("Describe", ask)
        assert (said.settled, said.epoch) == (False, writer.epoch)

    for _ in range(2):  # its answer may be lost, too
        said = link.call("Describe", ask)
        assert (said.settled, said.epoch) == (True, writer.epoch + 1)
    assert (said.length, len(said.tails.segments)) == (TOKENS, 2)
    with pytest.raises((Conflict, grpc.RpcError), match="not its writer"):
        writer.call("Truncate", tokens=0)
    writer.epoch = said.epoch
    assert writer.seal(1) == [Status.OK]
    heir = Writer(link, resume=writer.id)  # of the same session
    said = link.call("Describe", ask)
    assert (said.settled, said.epoch) == (False, heir.epoch)


def test_a_sequence_begins_with_what_is_held_up_to_the_first_miss(link: Any) -> None:
    Writer(link).put(1, 2, 4)

    opened = Writer(link, keys=[1, 2, 3, 4]).opened

    assert list(opened.statuses) == [Status.OK, Status.OK, Status.MISS, Status.OK]
    assert opened.length == 2 * TOKENS


def test_the_sealed_part_outlives_a_session_that_dies(node: Node) -> None:
    with contextlib.closing(Wire(node)) as dying:
        writer = Writer(dying)
        writer.put(1)
        writer.call("Extend", blocks=3)
        writer.write(2)

    with contextlib.closing(Wire(node)) as heir:
        resumed = Writer(heir, resume=writer.id)
        assert resumed.opened.length == TOKENS
        described = heir.call("Describe", node_pb2.DescribeRequest(sequence=writer.id))
        assert not described.tails.segments
        resumed.call("CloseSequence", drop=True)
        stats = heir.call("Stats", node_pb2.StatsRequest()).stats
        assert (stats.tiers[0].shards, stats.tiers[0].reserved_bytes) == (0, 0)


def test_a_payload_that_does_not_fit_is_refused(link: Any) -> None:
    writer = Writer(link)
    writer.call("Extend", blocks=1)

    for block_index, offset in ((1, 0), (0, BLOCK_BYTES - 3)):
        with pytest.raises((Refused, grpc.RpcError), match="extend first"):
            writer.call(
                "Append",
                start=0,
                tokens=1,
                blocks=[block_index],
                offsets=[offset],
                size_bytes=[4],
                payload=b"abcd",
            )


def test_a_group_keeps_what_its_chains_share(link: Any) -> None:
    Writer(link).put(1)
    keys = [key(n) for n in (1, 2, 3, 1, 2, 4)]

    request = node_pb2.OpenGroupRequest(namespace_id=link.space, keys=keys, lengths=[3, 3])
    group = link.call("OpenGroup", request)
    Writer(link).put(2)

    assert list(group.shared) == [0, 1]
    assert list(group.statuses) == [Status.OK, Status.MISS]
    assert list(group.nodes) == ["n0", ""]
    closed = link.call("CloseGroup", node_pb2.CloseGroupRequest(group=group.group))
    assert closed.shards == 0  # the sequences still need it


def test_a_state_is_swapped_by_who_saw_its_head(link: Any) -> None:
    Writer(link).put(1, 2)

    def swap(version: int, number: int) -> Any:
        return link.call(
            "SwapState",
            node_pb2.SwapStateRequest(
                namespace_id=link.space,
                name=b"s" * 32,
                expected_version=version,
                key=key(number),
            ),
        )

    first = swap(0, 1)
    late = swap(0, 2)

    assert first.swapped
    assert not late.swapped
    assert (late.version, late.key) == (first.version, key(1))
    read = link.call(
        "ReadState", node_pb2.ReadStateRequest(namespace_id=link.space, name=b"s" * 32)
    )
    assert (read.version, read.key) == (first.version, key(1))


def test_steps_are_summed_for_the_next_heartbeat(node: Node, link: Any) -> None:
    request = node_pb2.ReportStepsRequest(
        batch=[2, 4], tokens=[100, 300], seconds=[0.5, 1.0], waiting=7
    )

    link.call("ReportSteps", request)

    sums = node.steps.take()
    assert sums is not None
    assert (sums.steps, sums.batch, sums.tokens, sums.seconds) == (2, 6, 400, 1.5)
    assert (sums.batch_batch, sums.batch_tokens, sums.tokens_tokens) == (20, 1400, 100_000)
    assert (sums.batch_seconds, sums.tokens_seconds) == (5, 350)
    assert (sums.waiting, sums.last_batch) == (7, 4)
    assert node.steps.take() is None
