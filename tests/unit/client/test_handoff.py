"""Hand-off: what one process has at its node another reads at once, known to a manager or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric.keys import namespace_id
from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings
from kvfabric.types import BATCH_KEYS, Namespace, Status
from kvfabric_client import Client, Room
from kvfabric_client.handoff import MAX_HOLDS, HandOff
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, key, payload
from .test_deadlines import eventually

SPACE = Namespace("default", b"f" * 32)
KEYS = [key(number) for number in range(4)]
SHARDS = [payload(number, 20_000) for number in range(4)]


@pytest.fixture
def manager(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagerServer]:
    """One that hears of new shards far too late."""
    settings = ManagerSettings(
        listen="127.0.0.1:0", runtime_dir=str(runtime_dir), heartbeat_ms=60_000, silence_ms=600_000
    )
    server = ManagerServer(settings)
    server.start()
    monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
    yield server
    server.stop()


@pytest.fixture
def nodes(start: Start, manager: ManagerServer) -> tuple[Node, Node]:
    both = start("n0", manager=manager.address), start("n1", manager=manager.address)
    with kvfabric_client.connect(address(both[0], "unix")) as client:
        # Their first reports are over; the next ones come in a minute.
        assert eventually(lambda: all(info.stats.node for info in client.nodes()))
    return both


@pytest.fixture(params=["unix", "tcp"])
def prefill(request: pytest.FixtureRequest, nodes: tuple[Node, Node]) -> Iterator[Client]:
    with kvfabric_client.connect(address(nodes[0], request.param), timeout_s=20) as client:
        yield client


@pytest.fixture
def decode(nodes: tuple[Node, Node]) -> Iterator[Room]:
    with kvfabric_client.connect(address(nodes[1], "unix"), timeout_s=20) as client:
        yield client.open(SPACE)


def test_the_other_side_reads_at_once_what_the_directory_does_not_know(
    prefill: Client, decode: Room
) -> None:
    room = prefill.open(SPACE)
    room.put(KEYS, SHARDS)
    given = json.loads(json.dumps(room.hand_off(KEYS)))
    assert given["node"] == "n0"
    assert decode.match(KEYS).matched == 0
    assert decode.get(KEYS) == [None] * 4
    targets = [np.zeros(20_000, np.uint8) for _ in KEYS]
    assert decode.take(given, targets) == [Status.OK] * 4
    assert all(np.array_equal(a, b) for a, b in zip(targets, SHARDS, strict=True))


def test_only_the_prefix_that_is_sealed_is_handed_off_and_stays_for_a_while(
    prefill: Client, decode: Room, nodes: tuple[Node, Node]
) -> None:
    room = prefill.open(SPACE)
    room.put([KEYS[0], KEYS[1], KEYS[3]], [SHARDS[0], SHARDS[1], SHARDS[3]])
    given = room.hand_off(KEYS, hold_s=60)
    assert given["keys"] == [KEYS[0].hex(), KEYS[1].hex()]
    assert core_of(nodes[0]).sessions
    assert len(prefill.holds) == 1
    stats = prefill.stats()
    assert stats.leases == 1
    for _ in range(MAX_HOLDS):
        room.hand_off(KEYS[:1], hold_s=60)
    assert len(prefill.holds) == MAX_HOLDS  # the first has been let go
    assert eventually(lambda: prefill.stats().leases == MAX_HOLDS)


def test_what_is_over_is_let_go_of_with_the_next(prefill: Client) -> None:
    room = prefill.open(SPACE)
    room.put(KEYS, SHARDS)
    room.hand_off(KEYS, hold_s=0.001)
    assert eventually(
        lambda: bool(room.hand_off(KEYS[:1], hold_s=0.001)) and len(prefill.holds) == 1
    )
    assert eventually(lambda: prefill.stats().leases <= 1)


def test_what_is_gone_meanwhile_is_a_miss(prefill: Client, decode: Room) -> None:
    room = prefill.open(SPACE)
    room.put(KEYS, SHARDS)
    given = room.hand_off(KEYS)
    room.purge(KEYS[2:3])
    targets = [np.zeros(20_000, np.uint8) for _ in KEYS]
    statuses = decode.take(given, targets)
    assert statuses == [Status.OK, Status.OK, Status.MISS, Status.OK]
    nowhere = given | {"node": "n7", "host": "", "unix_path": "", "tcp_address": "127.0.0.1:1"}
    assert decode.take(nowhere, targets, timeout_s=5) == [Status.MISS] * 4


def test_long_contexts_are_handed_off_whole(prefill: Client, decode: Room) -> None:
    room = prefill.open(SPACE)
    keys = [key(number) for number in range(BATCH_KEYS + 5)]
    shard = payload(0, 64)
    room.put(keys, [shard] * len(keys))
    given = room.hand_off(keys)
    assert len(given["keys"]) == len(keys)
    targets = [np.zeros(64, np.uint8) for _ in keys]
    assert set(decode.take(given, targets)) == {Status.OK}
    assert all(np.array_equal(target, shard) for target in targets)


OFFER = HandOff("n0", "", "", "127.0.0.1:1", namespace_id(SPACE), tuple(KEYS))


@pytest.mark.parametrize(
    "damage",
    [
        {"namespace": "00" * 32},
        {"namespace": 7},
        {"keys": ["zz"]},
        {"keys": ["00"]},
        {"keys": None},
        {"node": None},
    ],
)
def test_what_is_no_hand_off_of_this_namespace_is_refused(damage: dict[str, object]) -> None:
    assert HandOff.of(OFFER.as_dict(), OFFER.namespace) == OFFER
    with pytest.raises(Refused):
        HandOff.of(OFFER.as_dict() | damage, OFFER.namespace)


def test_at_names_the_node_that_is_written_and_asked_first(
    decode: Room, nodes: tuple[Node, Node]
) -> None:
    there = address(nodes[0], "tcp")
    assert decode.put(KEYS, SHARDS, at=there) == [Status.OK] * 4
    assert decode.match(KEYS, local_only=True).matched == 0
    assert [copy is not None for copy in decode.get(KEYS, at=there)] == [True] * 4
    assert [copy is not None for copy in decode.get(KEYS)] == [False] * 4
