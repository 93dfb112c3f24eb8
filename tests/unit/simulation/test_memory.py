"""A simulated node's memory, as its engine asks for it: whom a long prompt leaves room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvfabric.simulation.nodes import Node, Shape, factory
from kvfabric.simulation.parameters import LINKS
from kvfabric.simulation.world import Plan, World
from kvfabric_nodes.simulated.memory import KEPT_BLOCKS

BLOCKS, TOKENS = 64, 4
LONG, SHORT = 1, 2


@contextmanager
def node(*, lending: bool) -> Iterator[Node]:
    shape = Shape(4, 16 * 64, 64, TOKENS, 1, lending)
    world = World(Plan(1, shape, LINKS), 1, factory())
    yield world.nodes[world.names[0]]
    world.simulation.close()


def test_a_long_prompt_leaves_the_last_blocks_to_others() -> None:
    with node(lending=True) as memory:
        assert memory.open(LONG, 2 * BLOCKS * TOKENS)
        assert memory.grow(LONG, 2 * BLOCKS * TOKENS) == (BLOCKS - KEPT_BLOCKS) * TOKENS
        assert memory.room(1, owed=BLOCKS + KEPT_BLOCKS), "what is owed is for others to lend"
        assert memory.open(SHORT, TOKENS)
        assert memory.grow(SHORT, TOKENS) == TOKENS
        memory.check()


@pytest.mark.parametrize("tokens", [BLOCKS * TOKENS, TOKENS])
def test_without_lending_nothing_is_kept_and_what_is_owed_counts(tokens: int) -> None:
    with node(lending=False) as memory:
        assert memory.open(LONG, tokens)
        assert memory.grow(LONG, tokens) == tokens
        left = BLOCKS - tokens // TOKENS
        assert memory.room(left, owed=0)
        assert not memory.room(1, owed=left)
