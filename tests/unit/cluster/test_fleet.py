"""Which Ray nodes lack their rManager."""

from __future__ import annotations

from typing import Any

from kvfabric.manager.fleet import NODE_LABEL, NODE_RESOURCE, MemoryNode, lacking, memory_nodes


def ray_node(ray_id: str, name: str = "", *, alive: bool = True, memory: float = 1) -> Any:
    return {
        "NodeID": ray_id,
        "Alive": alive,
        "Resources": {NODE_RESOURCE: memory} if memory else {},
        "Labels": {NODE_LABEL: name} if name else {},
    }


def test_a_node_with_the_resource_and_without_an_rmanager_lacks_it() -> None:
    nodes = [ray_node("aa", "n0"), ray_node("bb", "n1")]

    assert lacking(nodes, {"rmanager-n0", "gmanager"}) == [MemoryNode("n1", "bb")]


def test_dead_nodes_and_nodes_without_the_resource_are_left_alone() -> None:
    assert memory_nodes([ray_node("aa", alive=False), ray_node("bb", memory=0)]) == []


def test_a_node_without_a_label_is_called_by_its_ray_id() -> None:
    (node,) = memory_nodes([ray_node("0123456789abcdef")])

    assert (node.name, node.actor) == ("ray-01234567", "rmanager-ray-01234567")


def test_of_two_nodes_with_one_name_one_is_taken_and_always_the_same() -> None:
    nodes = [ray_node("bb", "n0"), ray_node("aa", "n0")]

    assert memory_nodes(nodes) == memory_nodes(nodes[::-1]) == [MemoryNode("n0", "aa")]
