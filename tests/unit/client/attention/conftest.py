"""Real nodes in this process, and a manager, as the client's other tests have them."""

from tests.unit.client.conftest import home, node, runtime_dir, start
from tests.unit.client.test_outgrown import manager

__all__ = ["home", "manager", "node", "runtime_dir", "start"]
