"""What the home node does not hold is found by the manager and read from where it lies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import Retry
from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings
from kvfabric.types import BATCH_KEYS, Namespace, Status
from kvfabric_client import Client, Room
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, counter, key, payload

SPACE = Namespace("default", b"f" * 32)
KEYS = [key(number) for number in range(6)]
SHARDS = [payload(number, 100_000) for number in range(6)]
DEADLINE_S = 20.0


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
    """The client's home, and another that holds the last four of six shards."""
    home, other = start("n0", manager=manager.address), start("n1", manager=manager.address)
    with kvfabric_client.connect(address(home, "unix")) as client:
        client.open(SPACE).put(KEYS[:2], SHARDS[:2])
    with kvfabric_client.connect(address(other, "unix")) as client:
        client.open(SPACE).put(KEYS[2:], SHARDS[2:])
        _wait_for(client.open(SPACE), 6)
    return home, other


def _wait_for(room: Room, matched: int) -> None:
    """Heartbeats bring the directory up to date."""
    until_s = time.monotonic() + DEADLINE_S
    while room.match(KEYS).matched + room.match(KEYS[2:]).matched < matched:
        assert time.monotonic() < until_s, "the directory never learned of the shards"
        time.sleep(0.02)


@pytest.fixture(params=["unix", "tcp"])
def reader(request: pytest.FixtureRequest, nodes: tuple[Node, Node]) -> Iterator[Client]:
    with kvfabric_client.connect(address(nodes[0], request.param), timeout_s=20) as client:
        _wait_for(client.open(SPACE), 10)
        yield client


def test_a_match_goes_on_where_the_home_node_ends(reader: Client) -> None:
    match = reader.open(SPACE).match(KEYS)
    assert match.matched == 6
    assert [(run.count, run.node) for run in match.runs] == [(2, "n0"), (4, "n1")]
    assert reader.open(SPACE).match(KEYS, local_only=True).matched == 2


def test_a_get_reads_each_shard_from_its_node(reader: Client) -> None:
    copies = reader.open(SPACE).get(KEYS)
    for copy, shard in zip(copies, SHARDS, strict=True):
        assert copy is not None
        assert np.array_equal(copy, shard)


def test_a_view_has_copies_of_what_lies_elsewhere(reader: Client) -> None:
    with reader.open(SPACE).view(KEYS) as views:
        assert [bytes(view or b"") for view in views] == [shard.tobytes() for shard in SHARDS]


def test_a_node_that_is_gone_costs_only_its_own_shards(
    reader: Client, nodes: tuple[Node, Node]
) -> None:
    nodes[1].stop()
    targets = [np.zeros(100_000, np.uint8) for _ in KEYS]
    statuses = reader.open(SPACE).get_into(KEYS, targets, timeout_s=5)
    assert statuses == [Status.OK] * 2 + [Status.MISS] * 4


def test_a_node_that_asks_to_come_later_costs_only_its_own_shards(
    reader: Client, nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise Retry("busy; come later")

    monkeypatch.setattr(core_of(nodes[1]), "acquire", busy)
    copies = reader.open(SPACE).get(KEYS)
    assert [copy is not None for copy in copies] == [True] * 2 + [False] * 4


def test_a_manager_that_is_gone_costs_only_what_lies_elsewhere(
    reader: Client, manager: ManagerServer
) -> None:
    manager.stop()
    copies = reader.open(SPACE).get(KEYS, timeout_s=5)
    assert [copy is not None for copy in copies] == [True] * 2 + [False] * 4


def test_batches_over_the_limit_are_cut(start: Start) -> None:
    count = BATCH_KEYS + 3
    with kvfabric_client.connect(address(start(), "unix"), timeout_s=20) as client:
        room = client.open(SPACE)
        keys = [key(number) for number in range(count)]
        shards = [payload(0, 64)] * count
        parents = [None, *keys[:-1]]
        assert room.put(keys, shards, parents=parents) == [Status.OK] * count
        assert room.match(keys).matched == count
        assert [c is not None for c in room.get([*keys, key(count)])] == [True] * count + [False]
        assert counter(client, "kvfabric_node_commits_total") == count
        assert room.match([]).matched == 0
        assert room.put([], []) == []
        assert room.get([]) == []
