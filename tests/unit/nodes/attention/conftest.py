"""Real nodes in this process, as the client's tests have them."""

from collections.abc import Iterator

import pytest
from tests.unit.client.conftest import address, home, node, runtime_dir, start
from tests.unit.nodes.attention.asking import Asker, asker
from tests.unit.nodes.attention.slow import gate

from kvfabric_nodes.node import Node

__all__ = ["gate", "home", "node", "runtime_dir", "start"]


@pytest.fixture
def ask(node: Node) -> Iterator[Asker]:
    with asker(address(node, "unix")) as found:
        yield found
