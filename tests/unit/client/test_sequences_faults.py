"""Sequences whose answers are lost, whose session ends, whose node stalls, dies or is emptied."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import Conflict, DeadlineExceeded, Retry
from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format, Key, Namespace
from kvfabric_client import Client, Room
from kvfabric_client.deadline import Deadline
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of
from .test_deadlines import eventually, stalled
from .test_sequences import FORM, ids, kv

SPACE = Namespace("default", b"f" * 32)


def sequences_of(node: Node) -> int:
    return len(node.sequences.all)


@pytest.mark.parametrize("name", ["append", "seal", "extend", "truncate"])
def test_a_call_whose_answer_comes_too_late_may_be_repeated(
    room: Room, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node has done it; nobody knows."""
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:10], floats[..., :10, :])
        home = sequence.writer.home
        call = home.call

        def late(called: str, *given: object) -> object:
            answer = call(called, *given)  # type: ignore[arg-type]
            if called == name:
                monkeypatch.setattr(home, "call", call)
                raise DeadlineExceeded("the answer came too late")
            return answer

        monkeypatch.setattr(home, "call", late)
        if name == "truncate":
            with pytest.raises(DeadlineExceeded):
                sequence.truncate(5)
            sequence.truncate(5)
        else:
            with pytest.raises(DeadlineExceeded):
                sequence.append(prompt[10:50], floats[..., 10:50, :])
        start = sequence.length
        sequence.append(prompt[start:], floats[..., start:, :])
        sequence.writer.outline.check()
        assert np.array_equal(sequence.read(), floats)
        assert list(sequence.token_ids) == prompt


def test_a_call_that_was_given_up_and_comes_later_still_does_nothing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for room, or in a socket; open blocks that it gives back are written to."""
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:50], floats[..., :50, :])
        home = sequence.writer.home
        call = home.call
        given_up: list[node_pb2.TruncateRequest] = []

        def lost(called: str, request: Any, deadline: Deadline) -> Any:
            if called != "truncate":
                return call(called, request, deadline)
            given_up.append(request)
            raise DeadlineExceeded("it is still on its way")

        monkeypatch.setattr(home, "call", lost)
        with pytest.raises(DeadlineExceeded):
            sequence.truncate(5)
        sequence.append(prompt[50:], floats[..., 50:, :])
        with pytest.raises(Conflict, match="not its writer"):
            call("truncate", given_up[0], Deadline.after(10.0))
        assert np.array_equal(sequence.read(), floats)
        sequence.append([1], kv(1))


def test_a_fork_that_came_too_late_is_closed(room: Room, node: Node) -> None:
    """Its open block would be nobody's until the session ends."""
    with room.sequence(FORM) as sequence:
        sequence.append(ids(20), kv(20))
        with stalled(node), pytest.raises(DeadlineExceeded):
            sequence.fork(timeout_s=0.2)

        def closed() -> bool:
            room.match([Key(bytes(32))])  # whatever call is next finds the answer
            return sequences_of(node) == 1

        assert eventually(closed)
        sequence.append([1], kv(1))


def test_an_append_that_a_stalled_node_did_not_answer_is_repeated_by_its_start(
    room: Room, node: Node
) -> None:
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:20], floats[..., :20, :])
        with stalled(node), pytest.raises(DeadlineExceeded):
            sequence.append(prompt[20:], floats[..., 20:, :], timeout_s=0.2)
        sequence.append(prompt[20:], floats[..., 20:, :], start=20)
        assert np.array_equal(sequence.read(), floats)


def test_a_session_that_ends_costs_the_open_blocks_and_is_resumed_at_the_same_node(
    room: Room, node: Node
) -> None:
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:40], floats[..., :40, :])
        number = sequence.id
        sequence.writer.home.link.close()
        if sequence.writer.home.tails.shared:  # else the writer has a copy of its own
            missing = sequence.read_into(np.empty_like(floats[..., :40, :]))
            assert missing == [range(32, 40)]
        assert np.array_equal(sequence.read(0, 32), floats[..., :32, :])
        with pytest.raises(Conflict, match="the sequence ends at 32"):
            sequence.append(prompt[40:], floats[..., 40:, :])
        assert sequence.length == 32
        assert sequence.id == number
        sequence.append(prompt[32:], floats[..., 32:, :])
        assert np.array_equal(sequence.read(), floats)
        sequence.seal()
        sequence.writer.home.link.close()
        assert sequence.append([1], kv(1)) == 61  # nothing was lost: nobody notices
    assert sequences_of(node) == 0


def test_a_sequence_that_its_node_has_forgotten_is_opened_again(room: Room, node: Node) -> None:
    prompt, floats = ids(40), kv(40)
    with room.sequence(FORM, idle_s=0.05) as sequence:
        sequence.append(prompt, floats)
        room.client.renewals.close()
        assert eventually(lambda: room.client.stats() and sequences_of(node) == 0)
        number = sequence.id
        with pytest.raises(Conflict, match="the sequence ends at 32"):
            sequence.append([1], kv(1))
        assert sequence.id != number
        assert sequence.length == 32
        sequence.append(prompt[32:], floats[..., 32:, :])
        assert np.array_equal(sequence.read(), floats)


def test_an_idle_sequence_lives_as_long_as_its_object(room: Room, node: Node) -> None:
    sequence = room.sequence(FORM, idle_s=0.3)
    sequence.append(ids(5), kv(5))
    until_s = time.monotonic() + 1.0
    assert not eventually(lambda: sequences_of(node) == 0 or time.monotonic() > until_s) or (
        sequences_of(node) == 1
    )
    assert np.array_equal(sequence.read(), kv(5))
    del sequence
    assert eventually(lambda: room.client.stats() and sequences_of(node) == 0)


# Two nodes ------------------------------------------------------------------------------


@pytest.fixture
def manager(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagerServer]:
    settings = ManagerSettings(
        listen="127.0.0.1:0", runtime_dir=str(runtime_dir), heartbeat_ms=50, silence_ms=2000
    )
    server = ManagerServer(settings)
    server.start()
    monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
    yield server
    server.stop()


@pytest.fixture
def nodes(start: Start, manager: ManagerServer) -> tuple[Node, Node]:
    return start("n0", manager=manager.address), start("n1", manager=manager.address)


@pytest.fixture(params=["unix", "tcp"])
def writer(request: pytest.FixtureRequest, nodes: tuple[Node, Node]) -> Iterator[Client]:
    with kvfabric_client.connect(address(nodes[0], request.param), timeout_s=20) as client:
        yield client


def test_a_sequence_moves_to_another_node_and_reads_what_it_left_behind(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    room = writer.open(SPACE)
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:40], floats[..., :40, :])
        assert sequence.node == "n0"
        assert sequence.move() == "n1"
        assert sequence.length == 40
        assert sequences_of(nodes[0]) == 0
        sequence.append(prompt[40:], floats[..., 40:, :])
        assert [place.node for place in sequence.blocks()] == ["n0"] * 3 + ["n1"] * 2
        assert np.array_equal(sequence.read(), floats)
        with sequence.view(30, 50) as view:
            parts = [block.kv for block in view if block.kv is not None]
            assert np.array_equal(np.concatenate(parts, axis=3), floats[..., 30:50, :])


def test_a_home_that_dies_costs_what_only_it_had(writer: Client, nodes: tuple[Node, Node]) -> None:
    room = writer.open(SPACE)
    prompt, floats = ids(64), kv(64)
    _replicate(nodes[1], 32)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:50], floats[..., :50, :])
        nodes[0].stop()
        with pytest.raises(Conflict, match="on node n1 the sequence ends at 32"):
            sequence.append(prompt[50:], floats[..., 50:, :])
        assert sequence.node == "n1"
        assert np.array_equal(sequence.read(), floats[..., :32, :])
        sequence.append(prompt[32:], floats[..., 32:, :])
        assert np.array_equal(sequence.read(), floats)


def test_a_home_that_dies_while_it_is_read_is_replaced_by_replicas(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    room = writer.open(SPACE)
    prompt, floats = ids(64), kv(64)
    _replicate(nodes[1], 48)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt, floats)
        nodes[0].stop()
        target = np.empty_like(floats)
        missing: list[list[range]] = []

        def found() -> bool:  # the directory forgets the dead node by its silence
            missing.append(sequence.read_into(target, timeout_s=2))
            return missing[-1] == [range(48, 64)]

        assert eventually(found)
        assert np.array_equal(target[..., :48, :], floats[..., :48, :])


def test_a_node_that_is_drained_is_left_with_the_open_tokens(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    room = writer.open(SPACE)
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:20], floats[..., :20, :])
        attempt = sequence.fork(tentative=True)
        _drain(writer, nodes[0])
        sequence.append(prompt[20:40], floats[..., 20:40, :])
        assert sequence.node == "n0"  # the attempt would end
        attempt.close()
        sequence.append(prompt[40:], floats[..., 40:, :])
        assert sequence.node == "n1"
        assert np.array_equal(sequence.read(), floats)


def test_one_that_nobody_writes_to_leaves_a_node_that_is_drained(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    with writer.open(SPACE).sequence(FORM, idle_s=0.3) as sequence:
        sequence.append(ids(20), kv(20))
        _drain(writer, nodes[0])
        assert eventually(lambda: sequence.node == "n1")
        assert np.array_equal(sequence.read(), kv(20))
        assert eventually(lambda: sequences_of(nodes[0]) == 0)


def test_layers_that_differ_keep_a_sequence_where_it_is(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    prompt, floats = ids(60), kv(60)
    with writer.open(SPACE).sequence(FORM) as sequence:
        sequence.append(prompt[:5], floats[0, ..., :5, :], layer=0)
        _drain(writer, nodes[0])
        sequence.append(prompt[5:60], floats[0, ..., 5:60, :], layer=0)
        sequence.append(prompt[:60], floats[1], layer=1)
        assert sequence.append(prompt[:60], floats[2], layer=2) == 60
        assert sequence.node == "n0"
        sequence.append(ids(40, 1), kv(40, seed=1))
        assert sequence.node == "n1"
        assert np.array_equal(sequence.read(0, 60), floats)


def _drain(client: Client, node: Node) -> None:
    client.manager().drain(node.settings.node, client.deadline(None))
    assert eventually(lambda: bool(core_of(node).draining))


def _replicate(node: Node, tokens: int) -> None:
    """This node too has the blocks of so many of the first tokens."""
    with kvfabric_client.connect(address(node, "unix")) as client:
        sequence = client.open(SPACE).sequence(FORM)
        sequence.append(ids(64)[:tokens], kv(64)[..., :tokens, :])
        sequence.close()


def test_a_node_that_is_drained_is_stayed_at_while_there_is_no_other(
    writer: Client, nodes: tuple[Node, Node]
) -> None:
    nodes[1].stop()
    prompt, floats = ids(60), kv(60)
    with writer.open(SPACE).sequence(FORM) as sequence:
        sequence.append(prompt[:20], floats[..., :20, :])
        _drain(writer, nodes[0])
        sequence.append(prompt[20:40], floats[..., 20:40, :])
        sequence.append(prompt[40:], floats[..., 40:, :])
        assert sequence.node == "n0"
        assert np.array_equal(sequence.read(), floats)


def test_a_node_without_room_says_so(start: Start) -> None:
    node = start(memory=1 << 20, segment=64 << 10)
    with kvfabric_client.connect(address(node, "unix"), timeout_s=2) as client:
        room = client.open(SPACE)
        with room.sequence(FORM) as sequence:
            tokens = 16 * 200  # of which there is room for 160 blocks or so
            with pytest.raises(Retry, match="no room for more"):
                sequence.append(range(tokens), kv(tokens))
            assert 0 < sequence.length < tokens
            assert sequence.length % 16 == 0
            assert np.array_equal(sequence.read(), kv(tokens)[..., : sequence.length, :])


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_restore_into_a_full_home_says_what_is_not_stored_and_may_be_repeated(
    start: Start, kind: str
) -> None:
    form = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=32)
    node = start(memory=1 << 20, segment=256 << 10)  # 64 blocks
    with kvfabric_client.connect(address(node, kind), timeout_s=20) as client:
        room = client.open(SPACE)
        with room.sequence(form) as sequence, room.sequence(form) as other:
            floats = kv(64, form=form)
            sequence.append(ids(64), floats)
            gone = [place.key for place in sequence.blocks()[2:] if place.key]
            with kvfabric_client.connect(address(node, "unix")) as vandal:
                vandal.open(SPACE).purge(gone)
            other.append(range(1000, 1000 + 61 * 16), kv(61 * 16, form=form))
            lost = floats[..., 32:, :]
            with pytest.raises(Retry, match=r"tokens 48 to 63 was not stored .* restore it again"):
                sequence.restore(32, lost, timeout_s=0.5)
            assert client.stats().reservations == 0
            assert sequence.read_into(np.empty_like(floats)) == [range(48, 64)]
            other.truncate(60 * 16)
            sequence.restore(32, lost)
            assert np.array_equal(sequence.read(), floats)
