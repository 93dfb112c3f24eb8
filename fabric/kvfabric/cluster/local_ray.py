"""A Ray of our own on this machine, and nobody else's: what `kvfabric up` starts.

By default Ray rewrites 127.0.0.1 to the machine's outward address and its servers listen on
every interface: anybody who reaches a port may run code. `ray start` offers no way out for a
second Ray node, but its own `Node` class does: with `node_ip_address="127.0.0.1"` every server
of Ray 2.60 (GCS, raylets, workers, agents) binds to loopback only, for root and for ordinary
users alike, without a network namespace. That is why this file, and no other, uses
`ray._private`, and why the package pins Ray's minor version. Ray's drivers would still rewrite
the address that they connect to, unless Ray believes that it runs on a system without clusters
(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0). What is left on loopback is open to other users of the
machine: so token authentication is switched on at both sides (RAY_AUTH_MODE, never left to
Ray's default), with a token of this `up` in a file that only its user can read.

The price: a Ray node of another machine cannot join such a Ray. A cluster starts Ray by its own
means, and `kvfabric up --address` then starts the fabric in it.
"""

from __future__ import annotations

from ray._private.node import Node as RayNode
from ray._private.parameter import RayParams

from kvfabric.cluster.plan import LocalPlan
from kvfabric.manager.fleet import NODE_LABEL, NODE_RESOURCE

LOOPBACK = "127.0.0.1"
# Nothing of the fabric goes through Ray's object store: the least that Ray accepts.
OBJECT_STORE_BYTES = 80 * 1024 * 1024


class LocalRay:
    """A Ray of our own: a head, which is the first memory node, and one raylet per further one."""

    def __init__(self, plan: LocalPlan) -> None:
        self._plan = plan
        self._nodes: list[RayNode] = []

    @property
    def address(self) -> str:
        return str(self._nodes[0].gcs_address)

    def start_node(self, name: str) -> None:
        """The first call starts the head. Must run in the main thread: Ray's processes end with
        the thread that started them."""
        head = not self._nodes
        parameters = RayParams(
            node_ip_address=LOOPBACK,
            # Ray opens its directory to everybody: so it is one inside of ours.
            temp_dir=f"{self._plan.scratch}/ray",
            object_store_memory=OBJECT_STORE_BYTES,
            num_cpus=0,
            num_gpus=0,
            resources={NODE_RESOURCE: 1},
            labels={NODE_LABEL: name},
            include_log_monitor=False,  # type: ignore[arg-type]  # a flag, in spite of its hint
            include_dashboard=False,
            no_monitor=True,
            gcs_server_port=0 if head else None,
            gcs_address=None if head else self.address,
        )
        self._nodes.append(
            RayNode(parameters, head=head, shutdown_at_exit=False, spawn_reaper=True)
        )

    def dead(self) -> list[str]:
        """The kinds of Ray processes that died on their own."""
        return [kind for node in self._nodes for kind, _ in node.dead_processes()]

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
