"""What lies on other nodes: a sequence that outgrows its home, and shards brought home."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import kvfabric_client
from kvfabric.keys import namespace_id
from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings
from kvfabric.types import Format, Key, Namespace
from kvfabric_nodes.node import Node

from .conftest import Start, address, core_of, key, payload

SPACE = Namespace("default", b"f" * 32)
BLOCK_TOKENS = 16
FORM = Format("float32", block_tokens=BLOCK_TOKENS, layers=4, kv_heads=4, head_dim=64)
BLOCK_BYTES = 4 * 2 * 4 * BLOCK_TOKENS * 64 * 4  # 128 KiB
SEGMENT_BYTES = 512 << 10
HOME_BYTES = 8 * SEGMENT_BYTES
BLOCKS = 4 * HOME_BYTES // BLOCK_BYTES  # four times what the home can hold
DEADLINE_S = 30.0

Floats = NDArray[np.float32]


@pytest.fixture
def manager(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagerServer]:
    settings = ManagerSettings(
        listen="127.0.0.1:0", runtime_dir=str(runtime_dir), heartbeat_ms=50, silence_ms=3000
    )
    server = ManagerServer(settings)
    server.start()
    monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
    yield server
    server.stop()


@pytest.fixture
def nodes(start: Start, manager: ManagerServer) -> tuple[Node, Node]:
    """The home, and a creditor."""
    home = start("home", memory=HOME_BYTES, segment=SEGMENT_BYTES, manager=manager.address)
    creditor = start("creditor", memory=16 * HOME_BYTES, manager=manager.address)
    wait_connected(home, creditor)
    return home, creditor


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def wait_connected(*nodes: Node) -> None:
    """Until each of them can ask its manager."""
    for node in nodes:
        assert node.neighbours.heartbeat is not None
        inquiries = node.neighbours.heartbeat.inquiries
        wait_for(lambda inquiries=inquiries: inquiries.connected)  # type: ignore[misc]


def kv(number: int) -> Floats:
    shape = (FORM.layers, 2, FORM.kv_heads, BLOCK_TOKENS, FORM.head_dim)
    return np.random.default_rng(number).random(shape, dtype=np.float32)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_sequence_many_times_its_homes_memory_grows_stays_and_is_read_back(
    nodes: tuple[Node, Node], kind: str
) -> None:
    home, creditor = nodes
    with kvfabric_client.connect(address(home, kind), timeout_s=DEADLINE_S) as client:
        room = client.open(SPACE)
        with room.sequence(FORM) as sequence:
            for number in range(BLOCKS):
                tokens = range(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
                assert sequence.append(tokens, kv(number)) == tokens.stop
            for number in range(BLOCKS):
                read = sequence.read(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
                assert np.array_equal(read, kv(number))
            lent, borrowed = creditor.neighbours.lending, home.neighbours.lending
            assert borrowed.borrowed_bytes >= 3 * HOME_BYTES
            wait_for(lambda: lent.lent_bytes == borrowed.borrowed_bytes)
            home.check()
            creditor.check()
    wait_for(lambda: lent.lent_bytes == borrowed.borrowed_bytes == 0)
    wait_for(lambda: core_of(creditor).books().reserved_bytes == 0)


def fetch_home(node: Node, keys: list[Key]) -> list[bool]:
    assert node._loop is not None
    work = node.neighbours.homing.fetch_home(namespace_id(SPACE), keys)
    return asyncio.run_coroutine_threadsafe(work, node._loop).result(DEADLINE_S)


def put(node: Node, numbers: range) -> None:
    with kvfabric_client.connect(address(node, "unix")) as client:
        client.open(SPACE).put([key(n) for n in numbers], [payload(n, 10_000) for n in numbers])


def test_shards_are_brought_home_from_where_the_manager_says(nodes: tuple[Node, Node]) -> None:
    home, other = nodes
    put(home, range(2))
    put(other, range(2, 6))
    keys = [key(number) for number in range(7)]
    wait_for(lambda: fetch_home(home, keys) == [True] * 6 + [False])
    with kvfabric_client.connect(address(home, "unix")) as client:
        for number, copy in enumerate(client.open(SPACE).get(keys[:6])):
            assert copy is not None
            assert np.array_equal(copy, payload(number, 10_000))


def test_what_lies_on_a_dead_node_does_not_come(nodes: tuple[Node, Node]) -> None:
    home, other = nodes
    put(home, range(1))
    put(other, range(1, 2))
    heartbeat = home.neighbours.heartbeat
    assert heartbeat is not None
    assert home._loop is not None
    loop = home._loop

    def seen() -> bool:
        places = heartbeat.inquiries.places(namespace_id(SPACE), [key(1)])
        return asyncio.run_coroutine_threadsafe(places, loop).result(DEADLINE_S) == [("creditor",)]

    wait_for(seen)
    other.stop()
    assert fetch_home(home, [key(0), key(1)]) == [True, False]
