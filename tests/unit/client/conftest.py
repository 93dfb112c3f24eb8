"""Real nodes in this process, with little memory; their books are proven at the end."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvfabric_client
from kvfabric.types import Key, Namespace
from kvfabric_client import Client, Room
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

MEMORY_BYTES = 64 << 20
SEGMENT_BYTES = 4 << 20

Bytes = NDArray[np.uint8]


def key(number: int) -> Key:
    return Key(number.to_bytes(32, "big"))


def payload(number: int, size_bytes: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, size_bytes, dtype=np.uint8)


def counter(client: Client, name: str) -> float:
    """The sum of a node's counters whose names start so."""
    return sum(c.value for c in client.stats().counters if c.name.startswith(name))


def core_of(node: Node) -> Any:
    assert node._core is not None
    return node._core


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No fabric of this machine is found by these tests."""
    for name in ("KVFABRIC_HOME", "KVFABRIC_MANAGER", "KVFABRIC_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


Start = Callable[..., Node]


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Start]:
    """Starts nodes. At the end their books balance and, once their clients have gone,
    nothing is promised any more."""
    nodes: list[Node] = []

    def start_node(name: str = "n0", **options: Any) -> Node:
        given: dict[str, Any] = {"memory": MEMORY_BYTES, "segment": SEGMENT_BYTES, "grpc": ""}
        given |= options
        node = Node(NodeSettings(node=name, runtime_dir=runtime_dir, metrics="", **given))
        node.start()
        nodes.append(node)
        return node

    try:
        yield start_node
        for node in nodes:
            if not node.wait(0):
                node.check()
    finally:
        for node in nodes:
            node.stop()


@pytest.fixture
def node(start: Start) -> Node:
    return start()


def address(node: Node, kind: str) -> str:
    endpoints = node.endpoints
    return f"unix:{endpoints.unix_path}" if kind == "unix" else f"tcp:{endpoints.tcp_address}"


@pytest.fixture(params=["unix", "tcp"])
def home(request: pytest.FixtureRequest, node: Node) -> str:
    """The node's address by either transport."""
    return address(node, request.param)


@pytest.fixture
def client(home: str) -> Iterator[Client]:
    with contextlib.closing(kvfabric_client.connect(home, timeout_s=20)) as client:
        yield client


@pytest.fixture
def room(client: Client) -> Room:
    return client.open(Namespace("default", b"f" * 32))


@pytest.fixture
def vandal(node: Node) -> Iterator[Room]:
    """A client that maps the node's memory."""
    with contextlib.closing(kvfabric_client.connect(address(node, "unix"))) as client:
        yield client.open(Namespace("default", b"f" * 32))


def flip(vandal: Room, victim: Key, at: int) -> None:
    """Changes one bit of a sealed shard, where it lies."""
    with vandal.view([victim]) as views:
        assert views[0] is not None
        start = np.frombuffer(views[0], np.uint8).ctypes.data
        ctypes.c_ubyte.from_address(start + at).value ^= 0x10
