"""Blocks so large that a thread verifies them: what may happen to their sequence meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvfabric import checksums
from kvfabric.errors import Conflict, Refused, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Status
from kvfabric.wire.connection import Connection
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, key
from .test_deadlines import eventually
from .test_sequence_calls import Wire

BLOCK_BYTES = 512 << 10
TOKENS = 8
SUMS = checksums.checksums(memoryview(bytes(BLOCK_BYTES)), 1)


class Gate:
    """The thread that verifies stands still until this is open."""

    def __init__(self, node: Node) -> None:
        self.opened = threading.Event()
        self.verifier: Any = node.sequence_calls._verifier
        self.verifier.submit(self.opened.wait, 30)

    def verifies(self) -> bool:
        """Whether something waits behind the gate."""
        return bool(self.verifier._work_queue.qsize())


@pytest.fixture
def node(start: Start) -> Node:
    return start()


@pytest.fixture
def wire(node: Node) -> Iterator[Wire]:
    with contextlib.closing(Wire(node)) as wire:
        yield wire


@pytest.fixture
def gate(node: Node) -> Iterator[Gate]:
    gate = Gate(node)
    yield gate
    gate.opened.set()


def joined(node: Node, wire: Wire) -> Connection:
    """Another connection of the same session."""
    connection = Connection(address(node, "unix"), time.monotonic() + 20)
    hello = node_pb2.HelloRequest(min_version=1, max_version=1, session=wire.session)
    connection.call("hello", hello, time.monotonic() + 20)
    return connection


def full_block(wire: Wire, idle_ms: int = 0) -> tuple[int, int]:
    """A sequence with one open block, all zero and all visible."""
    opened = wire.call(
        "OpenSequence",
        node_pb2.OpenSequenceRequest(
            namespace_id=wire.space, size_bytes=BLOCK_BYTES, block_tokens=TOKENS, idle_ms=idle_ms
        ),
    )
    names = {"sequence": opened.sequence, "epoch": opened.epoch}
    wire.call("Extend", node_pb2.ExtendRequest(blocks=1, **names))
    wire.call("Append", node_pb2.AppendRequest(start=0, tokens=TOKENS, **names))
    return opened.sequence, opened.epoch


def sealing(wire: Wire, names: tuple[int, int]) -> tuple[threading.Thread, list[Any]]:
    """A seal that is under way: what it answers, or the error that it raises."""
    request = node_pb2.SealRequest(sequence=names[0], epoch=names[1], keys=[key(1)], checksums=SUMS)
    got: list[Any] = []

    def run() -> None:
        try:
            got.append([Status(status) for status in wire.call("Seal", request).statuses])
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def ended(gate: Gate, thread: threading.Thread) -> None:
    gate.opened.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_large_block_is_verified_and_sealed(wire: Wire) -> None:
    thread, got = sealing(wire, full_block(wire))
    thread.join(20)

    assert got == [[Status.OK]]


def test_a_seal_whose_blocks_are_cut_meanwhile_is_a_conflict(
    node: Node, wire: Wire, gate: Gate
) -> None:
    names = full_block(wire)
    thread, got = sealing(wire, names)
    assert eventually(gate.verifies)

    with contextlib.closing(joined(node, wire)) as other:
        request = node_pb2.TruncateRequest(sequence=names[0], epoch=names[1], tokens=0)
        other.call("truncate", request, time.monotonic() + 20)
        ended(gate, thread)

    assert [type(error) for error in got] == [Conflict]
    assert core_of(node).books().reserved_bytes == 0


@pytest.mark.parametrize("heir_comes", [True, False])
def test_a_seal_whose_writer_is_fenced_or_closes_meanwhile_fails(
    node: Node, wire: Wire, gate: Gate, heir_comes: bool
) -> None:
    names = full_block(wire)
    thread, got = sealing(wire, names)
    assert eventually(gate.verifies)

    with contextlib.closing(Wire(node)) as heir:
        if heir_comes:
            resume = node_pb2.OpenSequenceRequest(resume=names[0])
            heir.call("OpenSequence", resume)
        else:
            with contextlib.closing(joined(node, wire)) as other:
                request = node_pb2.CloseSequenceRequest(sequence=names[0], epoch=names[1])
                other.call("close_sequence", request, time.monotonic() + 20)
        ended(gate, thread)

    assert [type(error) for error in got] == [Conflict if heir_comes else Refused]
    assert core_of(node).books().held_bytes == 0


def test_what_others_seal_meanwhile_is_shared(node: Node, wire: Wire, gate: Gate) -> None:
    thread, got = sealing(wire, full_block(wire))
    assert eventually(gate.verifies)

    with contextlib.closing(Wire(node)) as other:
        unchecked = _unchecked_put(node, other)
        ended(gate, thread)

    assert unchecked == [Status.OK]
    assert got == [[Status.EXISTS]]
    assert core_of(node).books().held_bytes == BLOCK_BYTES


def _unchecked_put(node: Node, wire: Wire) -> list[Status]:
    """The same block by another session, whose commit nobody verifies."""
    session = next(s for s in core_of(node).sessions.values() if s.checked and not s.tails)
    session.checked = False
    request = node_pb2.ReserveRequest(
        namespace_id=wire.space, keys=[key(1)], size_bytes=[BLOCK_BYTES], layers=1
    )
    reserved = wire.call("Reserve", request)
    commit = node_pb2.CommitRequest(reservation=reserved.reservation)
    return [Status(status) for status in wire.call("Commit", commit).statuses]


def test_a_sequence_does_not_end_for_idleness_while_its_blocks_are_verified(
    node: Node, wire: Wire, gate: Gate
) -> None:
    names = full_block(wire, idle_ms=50)
    thread, got = sealing(wire, names)
    assert eventually(gate.verifies)
    sequence = node.sequences.all[names[0]]
    first_s = sequence.deadline_s

    assert eventually(lambda: sequence.deadline_s > first_s)  # put off by the node itself
    ended(gate, thread)

    assert got == [[Status.OK]]


def test_a_session_that_ends_while_its_block_is_verified_leaves_nothing(
    node: Node, gate: Gate
) -> None:
    dying = Wire(node)
    thread, got = sealing(dying, full_block(dying))
    assert eventually(gate.verifies)

    dying.life._sock.shutdown(socket.SHUT_RDWR)

    core = core_of(node)
    assert eventually(lambda: core.books().reserved_bytes == 0 and not core.sessions)
    ended(gate, thread)
    dying.close()
    assert [type(error) for error in got] == [Unreachable]
    assert core.books().held_bytes == 0
