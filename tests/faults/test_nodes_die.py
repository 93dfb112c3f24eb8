"""Nodes stopped, killed and ended under their clients: calls end in time, buffers stay whole."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    SPACE,
    NodeProcess,
    Process,
    Starter,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.errors import DeadlineExceeded, FabricError, Retry, Unreachable
from kvfabric.types import Key, Status
from kvfabric_client import Client, Room, connect

pytestmark = pytest.mark.faults

SIZE = 512 << 10
CALL_S = 0.3  # the deadline of a call to a stopped node
SLACK_S = 5.0  # of this machine, which may be busy
PATTERN = 0x5A

Buffers = list[NDArray[np.uint8]]


def _stored(client: Client, count: int) -> tuple[Room, list[Key]]:
    room = client.open(SPACE)
    keys = [key_of(number) for number in range(count)]
    assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
    return room, keys


def _buffers(count: int) -> Buffers:
    return [np.zeros(SIZE, np.uint8) for _ in range(count)]


def _ends_in_time(call: Callable[[], object]) -> None:
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        call()
    assert time.monotonic() - started_s < CALL_S + SLACK_S, "it ended long after its deadline"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_get_from_a_stopped_node_ends_and_never_touches_its_buffers_again(
    node: NodeProcess, kind: str
) -> None:
    with node.client(node.unix if kind == "unix" else node.tcp) as client:
        room, keys = _stored(client, 8)
        buffers = _buffers(8)
        assert set(room.get_into(keys, buffers)) == {Status.OK}
        node.pause()
        _ends_in_time(lambda: room.get_into(keys, buffers, timeout_s=CALL_S))
        _ends_in_time(lambda: room.match(keys, timeout_s=CALL_S))
        _ends_in_time(lambda: room.put([key_of(99)], [bytes(SIZE)], timeout_s=CALL_S))
        _ends_in_time(lambda: room.view(keys, timeout_s=CALL_S))
        for buffer in buffers:
            buffer[:] = PATTERN
        node.resume()
        assert room.match(keys).matched == 8
        assert all(np.all(buffer == PATTERN) for buffer in buffers)
        assert set(room.get_into(keys, buffers)) == {Status.OK}
        for key, buffer in zip(keys, buffers, strict=True):
            assert buffer.tobytes() == bytes_of(key, SIZE)
        # What the node granted to calls that nobody waited for any more is given back.
        until(lambda: _promises(node) == (0, 0, 0), "late grants come back")


def _promises(node: NodeProcess) -> tuple[int, int, int]:
    stats = node.stats()
    tier = stats.tiers[0]
    return stats.leases, stats.reservations, tier.reserved_bytes + tier.quarantined_bytes


def test_a_node_stopped_in_the_middle_of_a_transfer_leaves_the_buffers_alone(
    start_node: Starter,
) -> None:
    node = start_node("n0", "--memory", "64MiB", "--segment", "4MiB")
    with node.client(node.tcp) as client:
        room, keys = _stored(client, 80)
        for _ in range(10):
            buffers = _buffers(80)
            if _stop_in_the_middle(node, room, keys, buffers):
                break
        else:
            pytest.fail("ten transfers of 40 MiB were faster than a signal")
        for buffer in buffers:
            buffer[:] = PATTERN
        node.resume()
        assert room.match(keys).matched == 80
        until(lambda: _promises(node) == (0, 0, 0), "the transfer's lease ends")
        assert all(np.all(buffer == PATTERN) for buffer in buffers)


def _stop_in_the_middle(node: NodeProcess, room: Room, keys: list[Key], buffers: Buffers) -> bool:
    failures: list[FabricError] = []

    def get() -> None:
        try:
            room.get_into(keys, buffers, timeout_s=2.0)
        except FabricError as error:
            failures.append(error)

    getter = threading.Thread(target=get)
    getter.start()
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not buffers[0].any() and time.monotonic() < deadline_s:
        pass
    node.pause()
    getter.join(ANSWER_TIMEOUT_S)
    assert not getter.is_alive()
    if failures:
        assert isinstance(failures[0], DeadlineExceeded)
        assert not buffers[-1].any(), "it was stopped too late"
        return True
    node.resume()
    return False


def test_a_killed_node_is_unreachable_at_once_and_back_after_its_restart(
    start_node: Starter,
) -> None:
    first = start_node("n0")
    with first.client() as client, first.client(first.tcp) as over_tcp:
        room, keys = _stored(client, 4)
        with room.view(keys) as views:
            before = [bytes(view) for view in views if view is not None]
            first.kill()
            assert not views.alive()
            with pytest.raises(Unreachable):
                views.renew()
            # The mapping itself survives the node: reading it is no crash.
            assert [bytes(view) for view in views if view is not None] == before
        for some in (room, over_tcp.open(SPACE)):
            with pytest.raises(Unreachable):
                some.get(keys)
            with pytest.raises(Unreachable):
                some.put(keys, [bytes(SIZE)] * 4)
        start_node("n0")  # on the same path, where the dead one's socket still lies
        assert room.get(keys) == [None] * 4
        assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
        (copy,) = room.get(keys[:1])
        assert copy is not None
        assert copy.tobytes() == bytes_of(keys[0], SIZE)


def test_clients_fall_back_to_a_second_node(
    start_node: Starter, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(folder))
    first, second = start_node("n0"), start_node("n1")
    with connect(timeout_s=ANSWER_TIMEOUT_S) as client:
        assert client.stats().node == "n0"
        room, keys = _stored(client, 4)
        first.kill()
        assert room.get(keys) == [None] * 4
        assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
        assert client.stats().node == "n1"
        assert second.tier().shards == 4


def test_a_node_killed_among_gets_and_puts_never_gives_wrong_bytes(
    start_node: Starter, start_child: Callable[..., Process]
) -> None:
    node = start_node("n0")
    children = [start_child("churn", address, 7, 3.0) for address in (node.unix, node.tcp)]
    for child in children:
        child.read()
    until(lambda: node.tier().shards > 20, "they are at work")
    node.kill()
    again = start_node("n0", "--tcp", node.line["tcp_address"])
    results = [child.read() for child in children]
    assert [each["wrong"] for each in results] == [0, 0]
    assert all(each["retries"] > 0 for each in results)
    until(lambda: all(not child.running() for child in children), "they end")
    assert again.tier().shards > 0, "they came back to the restarted node"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_sigterm_with_open_sessions_leaves_nothing(start_node: Starter, kind: str) -> None:
    node = start_node("n0")
    address = node.unix if kind == "unix" else node.tcp
    with node.client(address) as client, Wire(address, "shm") as wire:
        room, keys = _stored(client, 4)
        assert all(copy is not None for copy in room.get(keys))
        granted = wire.reserve([key_of(9)], SIZE)
        assert granted.reservation
        bulk = Wire(address, "bulk", space=None, session=wire.hello.session)
        memory = _inodes(Path(f"/proc/{node.pid}/fd"))
        assert len(memory) == 16
        with room.view(keys), suppress(Retry):
            assert node.end() == 0
            node.killed = True  # on purpose, and cleanly
        bulk.close()
    assert not Path(node.unix.removeprefix("unix:")).exists()
    del room  # and with it the last mapping on our side
    gc.collect()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped = {line.split()[4] for line in maps.read_text().splitlines() if "memfd:" in line}
            assert not mapped & memory, f"{maps} still maps the node's memory"


def _inodes(descriptors: Path) -> set[str]:
    """Of the memory files among a process's descriptors."""
    return {
        str(each.stat().st_ino)
        for each in descriptors.iterdir()
        if "memfd:kvfabric" in os.readlink(each)
    }


def test_a_second_node_of_the_same_name_is_refused(start_node: Starter, folder: Path) -> None:
    start_node("n0")
    twin = NodeProcess("n0", folder, "--memory", "8MiB")
    assert twin.popen.wait(ANSWER_TIMEOUT_S) == 1
    twin.close()
    assert "another node serves on" in twin.log.read_text()
