"""A node with a native kernel, and a client that asks it again what it has prepared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.nodes.attention.asking import Asker, asker
from tests.unit.nodes.attention.prepared.again import Again

from kvfabric_nodes.attention import prepared
from kvfabric_nodes.attention.kernels import native
from kvfabric_nodes.node import Node


@pytest.fixture(autouse=True)
def _native_kernel() -> None:
    if not native.available():
        pytest.skip("no native kernel here")


@pytest.fixture(autouse=True)
def _long_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone is so for other reasons than a slow machine."""
    monkeypatch.setattr(prepared, "LIFE_S", 600.0)


@pytest.fixture
def node(start: Start) -> Node:
    return start(memory=4 << 20, segment=64 << 10)


@pytest.fixture(params=["unix", "tcp"])
def ask(request: pytest.FixtureRequest, node: Node) -> Iterator[Asker]:
    with asker(address(node, request.param)) as found:
        yield found


@pytest.fixture
def again(ask: Asker) -> Iterator[Again]:
    ask.client.stats()  # its link is there
    made = Again(ask)
    yield made
    made.connection.close()
