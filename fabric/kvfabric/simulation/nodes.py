"""What the simulation wants of a node, and what a node may use of the simulation.

The fabric does not import the nodes: their factory is named by text, as that of their actors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from kvfabric.directory import Inventory
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import types_pb2
from kvfabric.simulation.engine import Simulation
from kvfabric.simulation.network import Network
from kvfabric.simulation.serving import Memory
from kvfabric.types import Key, NamespaceId

NODE_FACTORY = "kvfabric_nodes.simulated.node:SimulatedNode"
MANAGER = "manager"  # its name in the network


@dataclass(frozen=True, slots=True)
class Shape:
    """How a simulated node is made."""

    segments: int
    segment_bytes: int
    block_bytes: int
    block_tokens: int
    layers: int
    lending: bool
    cap_share: float = 0.5  # of its memory, lent at most
    loan_s: float = 30.0
    recall_s: float = 10.0
    heartbeat_s: float = 0.5
    call_timeout_s: float = 5.0

    @property
    def capacity_bytes(self) -> int:
        return self.segments * self.segment_bytes


class Ground(Protocol):
    """What a node stands on. `reach` is told of every step that a fault may hit."""

    simulation: Simulation
    network: Network

    def clock(self, node: str) -> float:
        """The node's own time: no two clocks agree."""

    def reach(self, point: str, node: str, other: str = "") -> None: ...

    def number(self, node: str) -> int:
        """A node's number in the cluster."""

    def unique(self) -> int:
        """Greater with every call: incarnations, streams."""

    def endpoints(self, node: str) -> types_pb2.Endpoints: ...

    def labels(self, node: str) -> dict[str, str]: ...

    def node(self, name: str) -> Node | None:
        """The present life of a node; None: it is dead."""


class Node(Memory, Protocol):
    """One life of a node: real cores under simulated shells."""

    name: str
    incarnation: int

    def start(self) -> None:
        """Joins the network and begins to report."""

    def stop(self) -> None:
        """As by a kill: nothing of it happens any more, and its memory is gone."""

    def tick(self) -> None:
        """Time has passed."""

    def handle(self, caller: str, name: str, request: Any) -> Any:
        """Answers another's call; None: not at all."""

    def sealed(self, request: int) -> list[Written]:
        """The blocks of a sequence that are shards, in order."""

    def inventory(self) -> Inventory:
        """What it holds, in brief."""

    def holds(self, namespace: NamespaceId, key: Key) -> bool: ...

    def payload(self, namespace: NamespaceId, key: Key) -> bytes | None:
        """What a reader would find here under this key; None: a miss."""

    def whereabouts(self, namespace: NamespaceId, key: Key) -> str | None: ...

    def copied_bytes(self) -> int:
        """What it has fetched from others."""

    def used_bytes(self) -> int: ...

    def cached_bytes(self) -> int:
        """Of sealed shards that nobody needs."""

    def lent_bytes(self) -> int: ...

    def borrowed_bytes(self) -> int: ...

    def leftovers(self) -> Iterable[str]:
        """What should not be there any more once nothing is open and every deadline passed."""

    def check(self) -> None:
        """Asserts the invariants of all cores."""


@dataclass(frozen=True, slots=True)
class Written:
    """A sealed block, and what was written into it."""

    namespace: NamespaceId
    key: Key
    payload: bytes


Factory = Callable[[str, Shape, Ground], Node]


def factory(name: str = NODE_FACTORY) -> Factory:
    """The class that is named "module:class". Refused where it is not installed."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Refused(
            f"{name} cannot be had ({error}): the simulator runs the node's own cores; "
            "install kvfabric[node]"
        ) from error
    made: Factory = found
    return made
