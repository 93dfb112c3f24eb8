"""A node's heartbeats, to managers that do as the tests want."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import kvfabric_client
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import PROTOCOL_VERSION, Namespace
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

from .conftest import key

SPACE = Namespace("default", b"f" * 32)
TOKEN = b"t" * 32
DEADLINE_S = 20.0
QUIET_S = 0.3  # so long nothing must come


class Manager(control_pb2_grpc.ControlServiceServicer):
    """Answers heartbeats as `answer` says: at first it is content, and wants nothing."""

    def __init__(self) -> None:
        self.reports: queue.Queue[control_pb2.HeartbeatRequest] = queue.Queue()
        self.registered: queue.Queue[control_pb2.RegisterRequest] = queue.Queue()
        self.answer = control_pb2.HeartbeatResponse(epoch=5)
        self.heartbeat_ms = 60_000

    def Register(  # noqa: N802
        self, request: control_pb2.RegisterRequest, context: Any
    ) -> control_pb2.RegisterResponse:
        self.registered.put(request)
        return control_pb2.RegisterResponse(
            version=PROTOCOL_VERSION, epoch=5, heartbeat_ms=self.heartbeat_ms, peer_token=TOKEN
        )

    def Heartbeat(self, requests: Any, context: Any) -> Any:  # noqa: N802
        for request in requests:
            self.reports.put(request)
            yield self.answer

    def next(self) -> control_pb2.HeartbeatRequest:
        return self.reports.get(timeout=DEADLINE_S)


@pytest.fixture
def served() -> Iterator[tuple[Manager, str]]:
    server = grpc.server(ThreadPoolExecutor(4))
    manager = Manager()  # type: ignore[abstract]  # a node asks nothing else
    control_pb2_grpc.add_ControlServiceServicer_to_server(manager, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield manager, f"127.0.0.1:{port}"
    server.stop(0).wait(10)


@pytest.fixture
def manager(served: tuple[Manager, str]) -> Manager:
    return served[0]


@pytest.fixture
def start(served: tuple[Manager, str], tmp_path: Path) -> Iterator[Callable[[], Node]]:
    """Starts the node, once the test has told the manager what to do."""
    nodes: list[Node] = []

    def start_node() -> Node:
        node = Node(
            NodeSettings(
                node="n0",
                memory=1 << 20,
                runtime_dir=tmp_path / "run",
                grpc="",
                metrics="",
                manager=served[1],
            )
        )
        node.start()
        nodes.append(node)
        return node

    yield start_node
    for node in nodes:
        node.check()
        node.stop()


@pytest.fixture
def node(start: Callable[[], Node], manager: Manager) -> Node:
    """Has given its first report."""
    node = start()
    assert manager.next().full
    return node


def on(node: Node, call: Callable[[], object]) -> None:
    assert node._loop is not None
    node._loop.call_soon_threadsafe(call)


def poke(node: Node) -> None:
    heartbeat = node.neighbours.heartbeat
    assert heartbeat is not None
    on(node, heartbeat.poke)


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def assert_quiet(manager: Manager) -> None:
    """The next one is due in a minute."""
    with pytest.raises(queue.Empty):
        manager.reports.get(timeout=QUIET_S)


def test_full_reports_in_vain_do_not_come_one_upon_the_other(
    start: Callable[[], Node], manager: Manager
) -> None:
    manager.answer.want_full = True
    node = start()
    assert manager.next().full
    poke(node)
    assert_quiet(manager)


def test_a_poke_makes_a_heartbeat_come_soon_with_the_changes_alone(
    node: Node, manager: Manager
) -> None:
    with kvfabric_client.connect(f"unix:{node.endpoints.unix_path}") as client:
        client.open(SPACE).put([key(1)], [bytes(100)])
        assert_quiet(manager)
        poke(node)
        report = manager.next()
    assert not report.full
    assert report.added[0].keys == key(1)
    assert report.inventory_count == 1
    assert not report.HasField("stats")  # that has its time
    assert not report.HasField("loans")
    assert not report.HasField("sequences")


def test_the_fabrics_token_comes_with_the_registration(node: Node) -> None:
    assert node.neighbours.peers.peer_token == TOKEN
    assert node.neighbours._handler.peer_token == TOKEN


def test_the_manager_tells_a_node_to_take_nothing_in_and_to_serve_again(
    node: Node, manager: Manager
) -> None:
    assert node._core is not None
    for draining in (True, False):
        manager.answer.draining = draining
        poke(node)
        manager.next()
        wait_for(lambda expected=draining: node._core.draining is expected)  # type: ignore[misc]


def test_commands_of_an_older_epoch_are_refused(node: Node, manager: Manager) -> None:
    counts = node.neighbours._handler.metrics.commands
    command = control_pb2.Command(id=1, pin=control_pb2.Command.Pin())
    manager.answer.commands.append(command)
    manager.answer.epoch = 4
    manager.answer.draining = True
    poke(node)
    manager.next()
    wait_for(lambda: counts["stale"])
    assert node._core is not None
    assert not node._core.draining
    manager.answer.epoch = 6
    poke(node)
    manager.next()
    wait_for(lambda: counts["pin"])
    assert counts == {"stale": 1, "pin": 1}


def test_the_greatest_epoch_that_was_seen_is_told_at_the_next_registration(
    node: Node, manager: Manager
) -> None:
    assert manager.registered.get(timeout=DEADLINE_S).epoch == 0
    manager.answer.epoch = 9
    poke(node)
    manager.next()
    manager.answer.want_register = True
    poke(node)
    assert manager.registered.get(timeout=DEADLINE_S).epoch == 9


def test_a_command_that_makes_the_node_fail_costs_it_one_heartbeat_and_no_more(
    node: Node, manager: Manager
) -> None:
    heartbeat = node.neighbours.heartbeat
    assert heartbeat is not None

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake in the node")

    heartbeat.obey = fail
    manager.registered.get(timeout=DEADLINE_S)
    manager.answer = control_pb2.HeartbeatResponse(epoch=5, commands=[control_pb2.Command(id=1)])
    poke(node)
    manager.next()
    manager.answer = control_pb2.HeartbeatResponse(epoch=5)
    manager.registered.get(timeout=DEADLINE_S)
    assert manager.next().full


def test_a_part_that_fails_at_its_tick_keeps_no_other_from_going_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines would never end, and loans would not be renewed."""

    def fail(_: float) -> None:
        raise RuntimeError("a mistake in the node")

    monkeypatch.setattr(node.neighbours.commands, "tick", fail)
    ticks: queue.Queue[float] = queue.Queue()

    def due(now_s: float) -> tuple[()]:
        ticks.put(now_s)
        return ()

    monkeypatch.setattr(node.sequences._idle, "due", due)
    assert ticks.get(timeout=DEADLINE_S) < ticks.get(timeout=DEADLINE_S)
