"""States: one of those who swap at once wins, and a reader's snapshot stays what it was."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import Conflict, FabricError, Retry
from kvfabric.manager.service import ManagerServer
from kvfabric.types import Namespace
from kvfabric_client import Room, StateConflict
from kvfabric_client.buffers import Bytes
from kvfabric_nodes.node import Node
from kvfabric_nodes.sequences.states import Name

from .conftest import Start, address, core_of, key, payload
from .test_outgrown import manager, wait_connected, wait_for

__all__ = ["manager"]  # fixture


def test_a_value_is_put_read_and_replaced(room: Room) -> None:
    state = room.state("conversation 7")
    assert state.get().value is None
    first = state.put(payload(1, 3000), expected=0)
    snapshot = state.get()
    assert snapshot.version == first
    assert np.array_equal(snapshot.value, payload(1, 3000))  # type: ignore[arg-type]
    second = state.put(b"another", expected=first)
    assert second > first
    assert bytes(room.state("conversation 7").get().value) == b"another"  # type: ignore[arg-type]
    assert room.state("conversation 8").get().version == 0
    assert state.version()[0] == second


def test_who_comes_second_is_told_the_current_version(room: Room) -> None:
    state = room.state(b"n" * 32)
    assert state.name == b"n" * 32
    version = state.put(b"one", expected=0)
    with pytest.raises(StateConflict, match="read it again") as caught:
        state.put(b"two", expected=0)
    assert issubclass(StateConflict, Conflict)
    assert (caught.value.version, caught.value.key) == state.version()
    assert caught.value.version == version


def test_a_head_may_be_swapped_to_any_shard_of_the_node_and_removed(room: Room, node: Node) -> None:
    room.put([key(1)], [payload(1, 1000)])
    state = room.state("s")
    version = state.swap(0, key(1))
    assert core_of(node).shards.claims(room.id, key(1)) == 1
    assert np.array_equal(state.get().value, payload(1, 1000))  # type: ignore[arg-type]
    state.swap(version, None)
    assert state.get().value is None
    assert core_of(node).shards.claims(room.id, key(1)) == 0
    with pytest.raises(FabricError):
        state.swap(state.version()[0], key(2))  # nobody holds it


def test_updates_of_several_at_once_are_all_counted(room: Room) -> None:
    def add(value: Bytes | None) -> bytes:
        count = 0 if value is None else int.from_bytes(bytes(value), "little")
        return (count + 1).to_bytes(8, "little")

    def work(_: int) -> None:
        for _ in range(5):
            room.state("counter").update(add)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    value = room.state("counter").get().value
    assert value is not None
    assert int.from_bytes(bytes(value), "little") == 15


def test_a_snapshot_stays_while_the_state_goes_on(room: Room) -> None:
    state = room.state("s")
    state.put(payload(1, 5000), expected=0)
    before = state.get()
    with room.view([before.key]) as view:
        state.put(payload(2, 5000), expected=before.version)
        assert bytes(view[0] or b"") == payload(1, 5000).tobytes()


def test_a_state_that_has_left_is_not_made_anew_before_the_manager_knows(
    room: Room, node: Node
) -> None:
    state = room.state("s")
    state.put(b"one", expected=0)
    name = (room.id, state.name)

    async def find(name: Name, make: bool) -> str:
        return "n0"  # as it was a moment ago

    async def leave() -> None:
        node.state_calls.find = find
        assert node.handovers.freeze(name, 0.0)
        node.handovers.leave(name, "n1", node._clock.now())

    assert node._loop is not None
    asyncio.run_coroutine_threadsafe(leave(), node._loop).result(10)
    with pytest.raises(Retry, match="is at node n1, and nobody says how to reach it"):
        state.get(timeout_s=0.2)
    with pytest.raises(Retry, match="is at node n1"):
        state.swap(0, key(1), timeout_s=0.2)
    assert node.states.count == 0


def test_a_state_that_ended_with_its_node_is_waited_for_until_the_manager_is_sure(
    start: Start, manager: ManagerServer
) -> None:
    nodes = [start(name, manager=manager.address) for name in ("home", "other")]
    wait_connected(*nodes)
    with kvfabric_client.connect(address(nodes[0], "unix"), timeout_s=20) as client:
        room = client.open(Namespace("default", b"f" * 32))
        room.state("s", at=address(nodes[1], "tcp")).put(b"one", expected=0)
        state = room.state("s")
        wait_for(lambda: state.version()[0])  # the home node has sent it there
        heads = manager._service._core.moving.heads
        heads.sure_s = manager._service._clock.now() + 5  # as after a start: longer than silence
        nodes[1].stop()
        assert state.version() == (0, b"")
        assert state.put(b"two", expected=0)
