"""Nodes killed with a keeper beside them: what was sealed is served again, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    ROOM,
    SPACE,
    NodeProcess,
    Process,
    Starter,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.cluster import processes as living
from kvfabric.types import Key, Status
from kvfabric_client import Room
from kvfabric_nodes.keeper.outbox import TELL_S

pytestmark = pytest.mark.faults

SIZE = 100_000
KEPT = ("--keeper", "true", "--keep-s", "60")


@pytest.fixture
def start(start_node: Starter, folder: Path) -> Iterator[Callable[..., NodeProcess]]:
    """Starts the node n0 with a keeper, which does not outlive the test."""

    def start(*options: str) -> NodeProcess:
        return start_node("n0", *options, *KEPT)

    yield start
    # The nodes that still run end after this, and find their keeper gone.
    if (folder / "n0.keeper").exists():
        os.kill(keeper_of(folder), signal.SIGTERM)


def keeper_of(folder: Path) -> int:
    """The process that listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(folder / "n0.keeper"))
        raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[0])


def counter(node: NodeProcess, name: str) -> float:
    return {c.name: c.value for c in node.stats().counters}.get(f"kvfabric_node_{name}", 0.0)


def told(node: NodeProcess) -> None:
    """The keeper is told a moment after an answer, within some rounds of the loop."""
    until_s = time.monotonic() + TELL_S
    while time.monotonic() < until_s:
        node.stats()
    for _ in range(20):
        node.stats()


def store(room: Room, keys: list[Key], size_bytes: int = SIZE) -> None:
    statuses = room.put(keys, [bytes_of(key, size_bytes) for key in keys])
    assert set(statuses) == {Status.OK}


def holds(room: Room, keys: list[Key], size_bytes: int = SIZE) -> list[bool]:
    """Which are there; a wrong byte fails at once."""
    found = room.get(keys)
    for key, copy in zip(keys, found, strict=True):
        assert copy is None or copy.tobytes() == bytes_of(key, size_bytes)
    return [copy is not None for copy in found]


def test_what_was_sealed_before_a_kill_under_load_is_read_back_exactly(
    start: Callable[..., NodeProcess], start_child: Callable[..., Process]
) -> None:
    options = ("--memory", "128MiB", "--segment", "2MiB")
    node = start(*options)
    children = [start_child("churn", address, 7, 8.0) for address in (node.unix, node.tcp)]
    for child in children:
        child.read()
    keys = [key_of(number) for number in range(200)]
    with node.client() as client:
        room = client.open(SPACE)
        store(room, keys)
        room.pin(keys[:3])
        told(node)
        node.kill()
        again = start(*options, "--tcp", node.line["tcp_address"])
        assert holds(room, keys) == [True] * 200
        assert again.stats().pins == 3
        assert counter(again, "adopted_shards_total") >= 200
        room.unpin(keys[:3])
    results = [child.read() for child in children]
    assert [each["wrong"] for each in results] == [0, 0]
    assert all(each["retries"] > 0 for each in results)


def test_clients_go_on_over_restart_after_restart_and_no_memory_stays_frozen(
    start: Callable[..., NodeProcess], start_child: Callable[..., Process]
) -> None:
    nodes = [start()]  # small, so that slots are used again and again
    children = [start_child("churn", nodes[0].unix, seed, 60.0) for seed in (1, 2)]
    for child in children:
        child.read()
    for _ in range(3):
        until(lambda: nodes[-1].tier().shards > 20, "they are at work")
        told(nodes[-1])
        nodes[-1].kill()
        nodes.append(start())
        assert counter(nodes[-1], "adopted_shards_total") > 10
    until(
        lambda: nodes[-1].stats().sessions == 3 and counter(nodes[-1], "frozen_segments") == 0,
        "clients that came back have let go of what their old sessions mapped",
    )
    assert all(child.running() for child in children)
    for child in children:
        child.kill()
        assert child.popen.stdout is not None
        assert child.popen.stdout.read() == b"", "wrong bytes were read"


def test_a_client_stopped_in_the_middle_of_a_write_harms_nobody_when_it_wakes_up(
    start: Callable[..., NodeProcess], start_child: Callable[..., Process]
) -> None:
    node = start()
    torn = key_of(1, "torn")
    with node.client() as client:
        room = client.open(SPACE)
        store(room, [key_of(number) for number in range(2)])
        child = start_child("write", node.unix, torn.hex(), SIZE, 60_000)
        place = child.read()
        child.pause()
        told(node)
        node.kill()
        again = start()
        assert counter(again, "frozen_segments") > 0
        assert room.get([torn]) == [None], "it was never sealed"
        # More than there is room for: every slot that may be used is used, some twice.
        keys = [key_of(number) for number in range(2, 300)]
        for key in keys:
            room.put([key], [bytes_of(key, SIZE)])
        present = [key for key, held in zip(keys, holds(room, keys), strict=True) if held]
        assert len(present) > 20
        with Wire(again.unix) as wire:
            places = wire.acquire(present)
            granted = set(zip(places.segments, places.offsets, strict=True))
        assert (place["segment"], place["offset"]) not in granted

        child.resume()
        child.tell("write it all")
        assert child.read()["status"] == Status.REFUSED, "its session is no more"
        assert holds(room, present) == [True] * len(present)
        assert holds(room, [key_of(0), key_of(1)]) == [True, True]
        child.kill()
        until(lambda: counter(again, "frozen_segments") == 0, "the node sees that it is gone")
        assert again.tier().quarantined_bytes == 0


def test_a_bit_that_flips_while_the_node_is_down_costs_its_shard(
    start: Callable[..., NodeProcess], folder: Path
) -> None:
    node = start()
    keys = [key_of(number) for number in range(10)]
    with node.client() as client:
        room = client.open(SPACE)
        store(room, keys)
        with Wire(node.unix) as wire:
            places = wire.acquire(keys[4:5])
        told(node)
        node.kill()
        with memory_of(keeper_of(folder), places.segments[0]).open("r+b", buffering=0) as memory:
            memory.seek(places.offsets[0] + SIZE // 2)
            byte = memory.read(1)
            memory.seek(places.offsets[0] + SIZE // 2)
            memory.write(bytes([byte[0] ^ 4]))
        again = start()
        assert holds(room, keys) == [number != 4 for number in range(10)]
        assert counter(again, 'unadopted_shards_total{reason="damaged"}') == 1
        store(room, keys[4:5])


def test_what_was_purged_does_not_come_back(start: Callable[..., NodeProcess]) -> None:
    node = start()
    with node.client() as client:
        room = client.open(SPACE)
        keys = [key_of(number) for number in range(20)]
        store(room, keys)
        told(node)
        room.purge(keys[:10])
        node.kill()
        start()
        assert holds(room, keys) == [False] * 10 + [True] * 10


def memory_of(pid: int, segment: int) -> Path:
    """The descriptor that a process has of this segment."""
    (found,) = [
        entry
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(entry).startswith(f"/memfd:kvfabric-{segment} ")
    ]
    return found


def test_a_node_whose_keeper_was_killed_gets_another_that_knows_everything(
    start: Callable[..., NodeProcess], start_child: Callable[..., Process], folder: Path
) -> None:
    options = ("--memory", "64MiB", "--segment", "2MiB")
    node = start(*options)
    child = start_child("churn", node.unix, 3, 5.0)
    child.read()
    keys = [key_of(number) for number in range(100)]
    with node.client() as client:
        room = client.open(SPACE)
        store(room, keys[:50])
        first = keeper_of(folder)
        os.kill(first, signal.SIGKILL)
        store(room, keys[50:])
        until(lambda: counter(node, "keeper") == 1, "another is started")
        assert keeper_of(folder) != first
        assert counter(node, "keeper_losses_total") == 1
        told(node)
        node.kill()
        start(*options)
        assert holds(room, keys) == [True] * 100
    assert child.read()["wrong"] == 0


def test_with_its_keeper_killed_too_a_node_begins_with_nothing(
    start: Callable[..., NodeProcess], folder: Path
) -> None:
    node = start()
    keys = [key_of(number) for number in range(5)]
    with node.client() as client:
        room = client.open(SPACE)
        store(room, keys)
        keeper = keeper_of(folder)
        node.kill()
        os.kill(keeper, signal.SIGKILL)
        start()
        assert holds(room, keys) == [False] * 5
        store(room, keys)


def test_a_second_node_of_the_same_name_gets_neither_socket_nor_memory(
    start: Callable[..., NodeProcess], folder: Path
) -> None:
    node = start()
    with node.client() as client:
        room = client.open(SPACE)
        store(room, [key_of(1)])
        twin = NodeProcess("n0", folder, "--memory", "8MiB", *KEPT)
        assert twin.popen.wait(ANSWER_TIMEOUT_S) == 1
        twin.close()
        assert "another rManager has the memory of node n0" in twin.log.read_text()
        assert holds(room, [key_of(1)]) == [True]
    assert counter(node, "keeper") == 1


def test_an_orderly_end_leaves_no_keeper(start: Callable[..., NodeProcess], folder: Path) -> None:
    node = start()
    keeper = living.of(keeper_of(folder))
    assert keeper is not None
    with node.client() as client:
        store(client.open(SPACE), [key_of(1)])
    assert node.end() == 0
    node.killed = True  # on purpose, and cleanly
    assert not keeper.alive
    assert not (folder / "n0.keeper").exists()


def test_an_orderly_end_may_leave_it_for_the_next_version(
    start: Callable[..., NodeProcess], folder: Path
) -> None:
    node = start("--keep-on-stop", "true")
    with node.client() as client:
        room = client.open(SPACE)
        keys = [key_of(number) for number in range(30)]
        store(room, keys)
        assert node.end() == 0
        node.killed = True
        start()
        assert holds(room, keys) == [True] * 30
        with Wire(node.unix) as wire:
            assert wire.acquire(keys, ROOM).lease
