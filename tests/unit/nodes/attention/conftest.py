"""Real nodes in this process, as the client's tests have them."""

from tests.unit.client.conftest import home, node, runtime_dir, start
from tests.unit.nodes.attention.slow import gate

__all__ = ["gate", "home", "node", "runtime_dir", "start"]
