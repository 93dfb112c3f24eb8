"""Shards copied between real nodes of this process; their books are proven at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfabric_client
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, Namespace
from kvfabric_client import Room
from kvfabric_nodes.core import NodeCore
from kvfabric_nodes.node import Node
from kvfabric_nodes.pulls import Outcome, Pulled, PullOrder
from kvfabric_nodes.settings import NodeSettings

from .conftest import key

SPACE = Namespace("default", b"f" * 32)
SPACE_ID = namespace_id(SPACE)
SHARD_BYTES = 200_000
SEGMENT_BYTES = 1 << 20
DEADLINE_S = 30.0
TOKEN = b"p" * 32
KEYS = [key(number) for number in range(20)]

Start = Callable[..., Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    nodes: list[Node] = []

    def start_node(name: str, **options: Any) -> Node:
        given: dict[str, Any] = {"memory": 16 * SEGMENT_BYTES, "segment": SEGMENT_BYTES}
        given |= options
        node = Node(
            NodeSettings(node=name, runtime_dir=tmp_path / "run", grpc="", metrics="", **given)
        )
        node.start()
        node.neighbours.learn_peer_token(TOKEN)
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
def source(start: Start) -> Node:
    return start("source")


@pytest.fixture
def target(start: Start) -> Node:
    return start("target")


@contextlib.contextmanager
def room_of(node: Node) -> Iterator[Room]:
    address = f"unix:{node.endpoints.unix_path}"
    with kvfabric_client.connect(address, timeout_s=DEADLINE_S) as client:
        yield client.open(SPACE)


def payload(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, SHARD_BYTES, dtype=np.uint8)


def put(node: Node, keys: list[Key], **options: Any) -> None:
    with room_of(node) as room:
        parents = [None, *keys[:-1]]
        room.put(keys, [payload(k[0]) for k in keys], parents=parents, layers=4, **options)


def core_of(node: Node) -> NodeCore:
    assert node._core is not None
    return node._core


def endpoints_of(node: Node, kind: str) -> types_pb2.Endpoints:
    if kind == "unix":
        return node.endpoints
    return types_pb2.Endpoints(host="another", tcp_address=node.endpoints.tcp_address)


def pull(target: Node, source: Node, keys: list[Key], kind: str = "unix", **options: Any) -> Pulled:
    order = PullOrder(
        1, SPACE_ID, tuple(keys), source.settings.node, endpoints_of(source, kind), **options
    )
    assert target._loop is not None
    return asyncio.run_coroutine_threadsafe(
        target.neighbours.puller.pull(order), target._loop
    ).result(DEADLINE_S)


def outcomes(pulled: Pulled) -> list[Outcome]:
    return list(pulled.outcomes.values())


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_pull_copies_shards_with_all_that_belongs_to_them(
    source: Node, target: Node, kind: str
) -> None:
    put(source, KEYS, ttl_s=500.0)

    pulled = pull(target, source, KEYS, kind)

    assert outcomes(pulled) == [Outcome.COPIED] * len(KEYS)
    assert pulled.size_bytes == len(KEYS) * SHARD_BYTES
    with room_of(target) as room:
        for number, copy in enumerate(room.get(KEYS)):
            assert copy is not None
            assert np.array_equal(copy, payload(number))
    here, there = core_of(target).shards, core_of(source).shards
    for each in KEYS:
        copied, original = here.get(SPACE_ID, each), there.get(SPACE_ID, each)
        assert copied is not None
        assert original is not None
        for name in ("parent", "owner", "layers", "checksums", "pool"):
            assert getattr(copied, name) == getattr(original, name)
        assert copied.expires_s == pytest.approx(original.expires_s, abs=20)
