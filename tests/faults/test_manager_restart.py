"""The manager in a process of its own, killed and started again under scripted nodes."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvfabric.directory import Inventory
from kvfabric.rpc.v1 import control_pb2 as pb
from kvfabric.rpc.v1 import control_pb2_grpc, types_pb2

pytestmark = pytest.mark.faults

TIMEOUT_S = 30.0
ROOMS = [b"r" * 32, b"s" * 32]
NODES = 3
REPORT_KEYS = 1000  # per message, so that full reports take several


class ManagerProcess:
    """`python -m kvfabric.manager`, and what it printed when it was ready."""

    def __init__(self, store: Path, listen: str = "127.0.0.1:0") -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvfabric.manager"),
                *("--listen", listen, "--store", f"sqlite:{store}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        ready = json.loads(line) if line else {}
        self.address: str = ready.get("manager", "")
        self.epoch: int = ready.get("epoch", 0)
        assert ready.get("pid", self._process.pid) == self._process.pid

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal. Returns the exit status and what was written to stderr."""
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        _, errors = self._process.communicate(timeout=TIMEOUT_S)
        return self._process.returncode, errors


class ScriptedNode:
    """A node's side of the control plane, one heartbeat at a time."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.held: dict[bytes, set[bytes]] = {room: set() for room in ROOMS}
        self.epochs: set[int] = set()
        self._told: dict[bytes, set[bytes]] = {room: set() for room in ROOMS}
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.initial_reconnect_backoff_ms", 50)]
        )
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._sequence = 0
        self._want_full = False
        self._connect()

    def heartbeat(self) -> None:
        """Tell what changed, or everything where that is wanted; reconnect where needed."""
        messages = self._messages()
        self._told = {room: set(keys) for room, keys in self.held.items()}
        self._want_full = False
        for message in messages:
            self._requests.put(message)
            try:
                answer = next(self._answers)
            except grpc.RpcError:
                self._connect()
                return
            assert answer.sequence == message.sequence
            assert not answer.want_register
            self.epochs.add(answer.epoch)
            self._want_full |= answer.want_full

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()

    def _connect(self) -> None:
        """Register and open a stream; heartbeats go on as if nothing had happened."""
        request = pb.RegisterRequest(min_version=1, max_version=1, node=self.name, incarnation=1)
        answer = self._stub.Register(request, wait_for_ready=True, timeout=TIMEOUT_S)
        assert answer.known_incarnation == 0
        self.epochs.add(answer.epoch)
        self._requests: queue.SimpleQueue[pb.HeartbeatRequest | None] = queue.SimpleQueue()
        self._answers = self._stub.Heartbeat(iter(self._requests.get, None), timeout=TIMEOUT_S)

    def _messages(self) -> list[pb.HeartbeatRequest]:
        if not self._want_full:
            added = {room: self.held[room] - self._told[room] for room in ROOMS}
            removed = {room: self._told[room] - self.held[room] for room in ROOMS}
            return [self._message(columns(added), columns(removed))]
        pieces = [
            {room: set(keys[first : first + REPORT_KEYS])}
            for room, keys in ((room, sorted(self.held[room])) for room in ROOMS)
            for first in range(0, len(keys), REPORT_KEYS)
        ]
        return [
            self._message(columns(piece), [], full=True, more=number < len(pieces))
            for number, piece in enumerate(pieces, start=1)
        ]

    def _message(
        self,
        added: list[pb.Inventory],
        removed: list[pb.Inventory],
        full: bool = False,
        more: bool = False,
    ) -> pb.HeartbeatRequest:
        self._sequence += 1
        inventory = Inventory().plus(b"".join(key for keys in self.held.values() for key in keys))
        return pb.HeartbeatRequest(
            node=self.name,
            incarnation=1,
            sequence=self._sequence,
            added=added,
            removed=removed,
            inventory_count=inventory.count,
            inventory_hash=inventory.hash,
            full=full,
            more=more,
        )


def columns(held: dict[bytes, set[bytes]]) -> list[pb.Inventory]:
    return [
        pb.Inventory(
            namespace_id=room, tier=types_pb2.TIER_DRAM, keys=b"".join(keys), size_bytes=[64]
        )
        for room, keys in held.items()
        if keys
    ]


def located(
    stub: control_pb2_grpc.ControlServiceStub, room: bytes, keys: list[bytes]
) -> dict[bytes, tuple[str, ...]]:
    found: dict[bytes, tuple[str, ...]] = {}
    for first in range(0, len(keys), 4000):
        batch = keys[first : first + 4000]
        answer = stub.Locate(pb.LocateRequest(namespace_id=room, keys=batch), timeout=TIMEOUT_S)
        homes = [*(tuple(place.nodes) for place in answer.places), ()]
        found |= {key: homes[index] for key, index in zip(batch, answer.place, strict=True)}
    return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ManagerProcess]:
    process = ManagerProcess(tmp_path / "manager.db")
    yield process
    process.end(signal.SIGKILL)


def test_after_kill_9_the_directory_is_the_nodes_inventories_within_two_heartbeats(
    manager: ManagerProcess, tmp_path: Path
) -> None:
    # Given nodes with a few thousand shards each, some of them on several
    chance = random.Random(20260101)
    universe = [chance.randbytes(32) for _ in range(5000)]
    nodes = [ScriptedNode(f"n{number}", manager.address) for number in range(NODES)]
    for node in nodes:
        for room in ROOMS:
            node.held[room] = set(chance.sample(universe, 2500))
        node.heartbeat()
    assert manager.epoch == 1

    # When the manager is killed and started again, and the nodes' inventories go on changing
    manager.end(signal.SIGKILL)
    again = ManagerProcess(tmp_path / "manager.db", manager.address)
    try:
        for node in nodes:
            node.heartbeat()  # finds the stream broken, and connects anew
        for _ in range(2):
            for node in nodes:
                node.held[ROOMS[0]].remove(min(node.held[ROOMS[0]]))
                node.held[ROOMS[0]].add(chance.randbytes(32))
                node.heartbeat()

        # Then the new one knows what they hold, key by key
        asked = universe + [key for node in nodes for key in node.held[ROOMS[0]]]
        with grpc.insecure_channel(again.address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            for room in ROOMS:
                assert located(stub, room, asked) == {
                    key: tuple(node.name for node in nodes if key in node.held[room])
                    for key in asked
                }
            stats = stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S)
        assert stats.replicas == sum(len(keys) for node in nodes for keys in node.held.values())

        # And every answer since the restart carried a greater epoch
        assert again.epoch == 2
        assert [node.epochs for node in nodes] == [{1, 2}] * NODES
    finally:
        for node in nodes:
            node.close()
        again.end(signal.SIGKILL)


def test_sigterm_ends_it_cleanly_while_a_node_is_connected(manager: ManagerProcess) -> None:
    node = ScriptedNode("n0", manager.address)
    node.heartbeat()

    status, errors = manager.end(signal.SIGTERM)

    assert status == 0
    assert "Traceback" not in errors
    node.close()


def test_what_keeps_it_from_starting_is_said_on_stderr(
    manager: ManagerProcess, tmp_path: Path
) -> None:
    second = ManagerProcess(tmp_path / "other.db", manager.address)
    status, errors = second.end(signal.SIGKILL)
    assert (second.address, status) == ("", 2)
    assert f"cannot listen on {manager.address}" in errors

    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    third = ManagerProcess(tmp_path / "notes.txt")
    status, errors = third.end(signal.SIGKILL)
    assert (third.address, status) == ("", 2)
    assert "notes.txt is not a store; name another file" in errors
