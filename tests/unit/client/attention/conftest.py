"""Real nodes in this process, and a manager, as the client's other tests have them; and a sequence
that lies on three of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.client.test_outgrown import manager, wait_connected

import kvfabric_client
from kvfabric.manager.service import ManagerServer
from kvfabric_client import Client, Sequence

from .lending import FORM, HOME_BYTES, SEGMENT_BYTES, SPACE, TOKENS, Nodes
from .numbers import Array, fill

__all__ = ["manager"]


@pytest.fixture
def mute() -> tuple[str, ...]:
    """Names of the nodes that compute no attention."""
    return ()


@pytest.fixture
def nodes(start: Start, manager: ManagerServer, mute: tuple[str, ...]) -> Nodes:
    """A small home, and two creditors of which none can lend enough alone."""
    given: dict[str, Any] = {"segment": SEGMENT_BYTES, "manager": manager.address}
    silent = {"attention_threads": 0}
    sizes = {"home": (HOME_BYTES, 0), "east": (8 * HOME_BYTES, HOME_BYTES)}
    sizes["west"] = sizes["east"]
    nodes = {
        name: start(name, memory=memory, lend=lend, **given, **(silent if name in mute else {}))
        for name, (memory, lend) in sizes.items()
    }
    wait_connected(*nodes.values())
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
