"""The fleet of rManagers on Ray: its names, and which Ray nodes lack theirs. No Ray in here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RAY_NAMESPACE = "kvfabric"
MANAGER_ACTOR = "gmanager"
NODE_ACTOR_PREFIX = "rmanager-"

# A Ray node that offers this resource is a memory node: it gets one rManager.
NODE_RESOURCE = "kvfabric_node"
# A memory node's Ray label with the name that the fabric calls it by.
NODE_LABEL = "kvfabric-node"
# What only Ray's head offers: the gManager stays where its address is.
HEAD_RESOURCE = "node:__internal_head__"
# The rManager's class, as text: the fabric does not import the nodes.
NODE_ACTOR_CLASS = "kvfabric_nodes.actor:NodeActor"

# Calls of our actors can be repeated; one that a restart interrupted is, this often.
ACTOR_CALL_RETRIES = 3


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """A Ray node that offers memory, and the name that the fabric calls it by."""

    name: str
    ray_node_id: str

    @property
    def actor(self) -> str:
        return NODE_ACTOR_PREFIX + self.name


def memory_nodes(ray_nodes: Sequence[Mapping[str, Any]]) -> list[MemoryNode]:
    """The living Ray nodes with our resource, by name; of two with one name, the first.

    `ray_nodes` is what `ray.nodes()` returns. A node is called by its label (at most 63 letters,
    digits, '-', '_' and '.': Ray sees to it), or else by the first digits of its Ray id, so
    that its name stays while its raylet lives.
    """
    named: dict[str, MemoryNode] = {}
    for node in sorted(ray_nodes, key=lambda node: str(node["NodeID"])):
        if node["Alive"] and node["Resources"].get(NODE_RESOURCE, 0) >= 1:
            ray_node_id = str(node["NodeID"])
            name = str(node.get("Labels", {}).get(NODE_LABEL, "")) or f"ray-{ray_node_id[:8]}"
            named.setdefault(name, MemoryNode(name, ray_node_id))
    return [named[name] for name in sorted(named)]


def lacking(
    ray_nodes: Sequence[Mapping[str, Any]], living_actors: Collection[str]
) -> list[MemoryNode]:
    """The memory nodes for which no rManager lives or is being started."""
    return [node for node in memory_nodes(ray_nodes) if node.actor not in living_actors]


def reason(error: Exception) -> str:
    """Why an actor did not start: the last line of Ray's report, without the error's type."""
    line = str(error).strip().splitlines()[-1]
    kind, _, text = line.partition(": ")
    return text if kind.replace(".", "").replace("_", "").isalnum() and text else line
