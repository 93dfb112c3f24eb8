"""What lies on three nodes by the fixtures beside, and what is right of it."""

from __future__ import annotations

from typing import Any

from tests.unit.client.conftest import address, counter

import kvfabric_client
from kvfabric.types import Format, Namespace
from kvfabric_client import Sequence
from kvfabric_client.attention.runs import joined
from kvfabric_nodes.node import Node

from .numbers import Array, check, expected, random_queries

SPACE = Namespace("default", b"f" * 32)
FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=32)
SEGMENT_BYTES = 256 << 10
HOME_BYTES = 8 * SEGMENT_BYTES  # 128 blocks
BLOCKS = 300
TOKENS = BLOCKS * 16 - 5
QUERIES = random_queries(2, 4, 32)

Nodes = dict[str, Node]


def right(
    sequence: Sequence, kv: Array, layer: int = 0, timeout_s: float = 60, **options: Any
) -> dict[str, int]:
    """Attends; answers who attended how many tokens."""
    known = kv[..., : sequence.length, :]
    got = sequence.attend(QUERIES, layer=layer, timeout_s=timeout_s, **options)
    check(got, expected(sequence.shape, known, layer, QUERIES, **options))
    return got.tokens


def at(sequence: Sequence, node: str) -> list[range]:
    """Where its tokens at a node are."""
    found = [(p.tokens.start, p.tokens.stop) for p in sequence.blocks() if p.node == node]
    return [range(*run) for run in joined(found)]


def short(nodes: Nodes) -> int:
    """How many attends went by what these nodes had prepared."""
    count = 0
    for node in nodes.values():
        with kvfabric_client.connect(address(node, "unix")) as client:
            count += round(counter(client, "kvfabric_node_attends_prepared_total"))
    return count


def give_back(sequence: Sequence, kv: Array, lost: list[range]) -> None:
    """What an engine has computed again."""
    for tokens in lost:
        sequence.restore(tokens.start, kv[..., tokens.start : tokens.stop, :])
    for layer in range(2):
        right(sequence, kv, layer)
