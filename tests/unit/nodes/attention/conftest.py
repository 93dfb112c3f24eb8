"""Real nodes in this process, as the client's tests have them."""

from tests.unit.client.conftest import home, node, runtime_dir, start

__all__ = ["home", "node", "runtime_dir", "start"]
