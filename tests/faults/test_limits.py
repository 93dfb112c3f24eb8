"""Floods, clients that dawdle and descriptors that run out: limits hold, and say so."""

from __future__ import annotations

import resource
import select
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    ROOM,
    SPACE,
    NodeProcess,
    Starter,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.errors import FabricError, Retry, Unreachable
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Status
from kvfabric.wire import frames, sockets
from kvfabric_nodes.node import Node
from kvfabric_nodes.serving import server
from kvfabric_nodes.settings import NodeSettings

pytestmark = pytest.mark.faults

SIZE = 64 << 10


def _dial(node: NodeProcess) -> socket.socket:
    return sockets.connect(node.unix, time.monotonic() + ANSWER_TIMEOUT_S)


def _closed(sock: socket.socket, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
    """Whether the peer ends it in time."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(timeout_s * 1000))


def test_a_flood_of_connections_stops_at_the_limit_and_sessions_go_on(node: NodeProcess) -> None:
    with node.client() as client, ExitStack() as flood:
        room = client.open(SPACE)
        room.put([key_of(1)], [bytes_of(key_of(1), SIZE)])
        held = [flood.enter_context(_dial(node)) for _ in range(server.MAX_CONNECTIONS)]
        assert _closed(held[-1])
        assert not _closed(held[0], 0.0)
        with pytest.raises(Unreachable):
            Wire(node.unix)
        (copy,) = room.get([key_of(1)])
        assert copy is not None
        assert copy.tobytes() == bytes_of(key_of(1), SIZE)
    until(lambda: _greets(node), "it takes new sessions when the flood is over")
    assert "connection_refused" in node.log.read_text()


def _greets(node: NodeProcess) -> bool:
    try:
        Wire(node.unix).close()
    except FabricError:
        return False
    return True


def test_one_transfer_too_many_is_told_to_come_later(node: NodeProcess) -> None:
    with Wire(node.tcp) as owner, ExitStack() as flood:

        def join() -> None:
            flood.enter_context(Wire(node.tcp, "bulk", space=None, session=owner.hello.session))

        for _ in range(server.MAX_THREADS):
            join()
        with pytest.raises(Retry, match="64 bulk connections are open; close some"):
            join()
        assert owner.stats().sessions == 1


def test_a_client_that_does_not_fetch_its_answers_is_put_down(node: NodeProcess) -> None:
    with Wire(node.unix) as wire:
        assert wire.reserve([key_of(1)], SIZE).reservation
        request = frames.pack(wire_pb2.Frame(id=1, stats_request=node_pb2.StatsRequest()))
        sock = wire.connection._sock
        sock.settimeout(ANSWER_TIMEOUT_S)
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < deadline_s:
                sock.sendall(request * 1000)
    until(lambda: node.tier().reserved_bytes == 0, "its session has ended")
    assert "does not fetch its answers" in node.log.read_text()


def test_a_client_that_maps_memory_and_does_not_fetch_is_deaf_until_it_closes(
    node: NodeProcess,
) -> None:
    with Wire(node.unix, "shm") as wire:
        granted = wire.reserve([key_of(1)], SIZE)
        wire.fill(granted, bytes(SIZE))
        request = frames.pack(wire_pb2.Frame(id=1, stats_request=node_pb2.StatsRequest()))
        sock = wire.connection._sock
        sock.settimeout(ANSWER_TIMEOUT_S)
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        while "does not fetch its answers" not in node.log.read_text():
            assert time.monotonic() < deadline_s
            sock.sendall(request * 1000)
        assert node.tier().reserved_bytes == SIZE, "it may still write there"
    until(lambda: node.tier().reserved_bytes == 0, "its end gives all back")


def test_more_waiting_transfers_than_memory_do_not_block_calls(node: NodeProcess) -> None:
    """Readers that dawdle hold their leases and their threads, not the node."""
    with node.client() as client, Wire(node.tcp) as owner, ExitStack() as dawdlers:
        room = client.open(SPACE)
        keys = [key_of(number) for number in range(15)]
        room.put(keys, [bytes_of(key, 512 << 10) for key in keys])
        for _ in range(8):
            bulk = dawdlers.enter_context(
                Wire(node.tcp, "bulk", space=None, session=owner.hello.session)
            )
            read = node_pb2.ReadRequest(namespace_id=ROOM, keys=keys, deadline_ms=500)
            bulk.connection._sock.sendall(frames.pack(wire_pb2.Frame(id=1, read_request=read)))
        assert room.match(keys).matched == 15
        until(lambda: node.stats().leases == 0, "their deadline ends what they hold")
        assert room.put([key_of(99)], [bytes_of(key_of(99), 512 << 10)]) == [Status.OK]


@pytest.fixture
def impatient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 0.2)
    monkeypatch.setattr(server, "FRAME_TIMEOUT_S", 0.2)
    return Node(NodeSettings(node="n0", memory=1 << 20, runtime_dir=folder))


def test_half_open_connections_and_frames_in_drops_are_ended(impatient: Node) -> None:
    """In this process, with shorter patience."""
    impatient.start()
    try:
        path = impatient.endpoints.unix_path
        with Wire(f"unix:{path}") as wire, socket.socket(socket.AF_UNIX) as mute:
            mute.connect(path)
            assert _closed(mute)
            sock = wire.connection._sock
            with suppress(OSError):
                for _ in range(200):  # ten seconds for a frame that should take none
                    sock.sendall(b"\x08")
                    if _closed(sock, 0.05):
                        break
            assert _closed(sock, 0.0)
        with Wire(f"unix:{path}") as idle:
            assert not _closed(idle.connection._sock, 0.5), "who owes nothing may be silent"
            assert idle.stats().sessions == 1
        impatient.check()
    finally:
        impatient.stop()


def test_a_node_out_of_descriptors_says_so_and_recovers(node: NodeProcess) -> None:
    with node.client() as client:
        room = client.open(SPACE)
        room.put([key_of(1)], [bytes_of(key_of(1), SIZE)])
        open_now = len(list(Path(f"/proc/{node.pid}/fd").iterdir()))
        _, hard = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (open_now + 4, hard))
        with ExitStack() as flood:
            for _ in range(8):
                flood.enter_context(_dial(node))
            until(lambda: "accept_failed" in node.log.read_text(), "it complains")
            (copy,) = room.get([key_of(1)])
            assert copy is not None
            started_s = _cpu_s(node)
            for _ in range(20):
                room.match([key_of(1)])
            until(lambda: node.log.read_text().count("accept_failed") > 1, "it tries again")
            assert _cpu_s(node) - started_s < 0.4, "it spins while it waits"
        until(lambda: _greets(node), "it takes new sessions again")
    assert "ulimit -n" in node.log.read_text()


def _cpu_s(node: NodeProcess) -> float:
    fields = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_node_with_too_few_descriptors_does_not_start_and_says_why(folder: Path) -> None:
    node = NodeProcess("n0", folder, "--memory", "8MiB", files=16)
    assert node.popen.wait(ANSWER_TIMEOUT_S) == 1
    node.close()
    node.check_quiet()
    assert "ulimit -n" in node.log.read_text()


def test_a_client_with_too_few_descriptors_is_told_and_leaves_nothing(
    start_node: Starter,
) -> None:
    node = start_node("n0", "--memory", "64MiB", "--segment", "1MiB")
    code = f"""
import os, resource, numpy as np
from kvfabric import logs
from kvfabric.errors import FabricError
from kvfabric.types import Key, Namespace
from kvfabric_client import connect
logs.configure("error")
client = connect({node.unix!r})
room = client.open(Namespace("default", bytes(32), b"faults"))
open_now = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 8, open_now + 8))
keys = [Key(bytes([i]) * 32) for i in range(30)]
for call in (
    lambda: room.put(keys, [np.zeros(1 << 20, np.uint8)] * 30),
    lambda: connect({node.tcp!r}) and [connect({node.tcp!r}) for _ in range(20)],
):
    try:
        call()
        print("stored")
    except FabricError as error:
        print(type(error).__name__, error)
stats = client.stats()
print("left", stats.reservations, stats.leases)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=ANSWER_TIMEOUT_S,
        check=False,
    )
    assert ran.stderr == ""
    lines = ran.stdout.splitlines()
    assert "ulimit -n" in lines[0], lines
    assert "ulimit -n" in lines[1], lines
    assert lines[2] == "left 0 0"
