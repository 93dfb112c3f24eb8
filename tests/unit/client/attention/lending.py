"""Three nodes, and a sequence that lies on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.client.test_outgrown import wait_for

import kvfabric_client
from kvfabric.manager.service import ManagerServer
from kvfabric.types import Format, Namespace
from kvfabric_client import Client, Sequence
from kvfabric_client.attention.runs import joined
from kvfabric_nodes.node import Node

from .numbers import Array, check, expected, fill, random_queries

SPACE = Namespace("default", b"f" * 32)
FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=32)
SEGMENT_BYTES = 256 << 10
HOME_BYTES = 8 * SEGMENT_BYTES  # 128 blocks
BLOCKS = 300
TOKENS = BLOCKS * 16 - 5

Nodes = dict[str, Node]


@pytest.fixture
def nodes(start: Start, manager: ManagerServer) -> Nodes:
    """A small home, and two creditors of which none can lend enough alone."""
    given: dict[str, Any] = {"segment": SEGMENT_BYTES, "manager": manager.address}
    sizes = {"home": (HOME_BYTES, 0), "east": (8 * HOME_BYTES, HOME_BYTES)}
    sizes["west"] = sizes["east"]
    nodes = {
        name: start(name, memory=memory, lend=lend, **given)
        for name, (memory, lend) in sizes.items()
    }
    for node in nodes.values():
        heartbeat = node.neighbours.heartbeat
        assert heartbeat is not None
        wait_for(lambda asked=heartbeat.inquiries: asked.connected)  # type: ignore[misc]
    return nodes


@pytest.fixture
def client(nodes: Nodes) -> Iterator[Client]:
    with kvfabric_client.connect(address(nodes["home"], "unix"), timeout_s=60) as client:
        yield client


@pytest.fixture
def kv(client: Client) -> Array:
    sizes = (FORM.layers, 2, FORM.kv_heads, TOKENS + 100, FORM.head_dim)
    return np.random.default_rng(5).normal(size=sizes).astype(np.float32)


@pytest.fixture
def lent(client: Client, kv: Array) -> Iterator[Sequence]:
    """More than twice what its home can hold."""
    with client.open(SPACE).sequence(FORM) as sequence:
        fill(sequence, kv[..., :TOKENS, :])
        yield sequence


QUERIES = random_queries(2, 4, 32)


def right(
    sequence: Sequence, kv: Array, layer: int = 0, timeout_s: float = 60, **options: Any
) -> dict[str, int]:
    """Attends; answers who attended how many tokens."""
    known = kv[..., : sequence.length, :]
    got = sequence.attend(QUERIES, layer=layer, timeout_s=timeout_s, **options)
    check(got, expected(sequence.shape, known, layer, QUERIES, **options))
    return got.tokens


def at(sequence: Sequence, node: str) -> list[range]:
    """Where its tokens at a node are."""
    found = [(p.tokens.start, p.tokens.stop) for p in sequence.blocks() if p.node == node]
    return [range(*run) for run in joined(found)]


def give_back(sequence: Sequence, kv: Array, lost: list[range]) -> None:
    """What an engine has computed again."""
    for tokens in lost:
        sequence.restore(tokens.start, kv[..., tokens.start : tokens.stop, :])
    for layer in range(2):
        right(sequence, kv, layer)
