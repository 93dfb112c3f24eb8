"""A context of random KV that is lent to two nodes, and what attention over it comes to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.faults.conftest import until
from tests.faults.loans.conftest import (
    BLOCK_TOKENS,
    FORMAT,
    GROW_S,
    HEAD_DIM,
    HEADS,
    HOME_BLOCKS,
    LAYERS,
    SPACE,
    lenders,
)

from kvfabric.attention import oracle
from kvfabric.attention.masks import sight
from kvfabric.attention.merge import Partial
from kvfabric.errors import Retry
from kvfabric_client import Client
from kvfabric_client.attention.answers import Attended

__all__ = ["lenders"]

QUERY_HEADS = 4
BLOCKS = 3 * HOME_BLOCKS
ERROR = 2e-5  # of o around 1 and of lse around 10, both float32
SCALE = HEAD_DIM**-0.5

Floats = NDArray[np.float32]


class Context:
    """A sequence at the home node, most of it lent, with a copy of its KV to compute from."""

    def __init__(
        self, client: Client, blocks: int = BLOCKS, seed: int = 1, idle_s: float = 60.0
    ) -> None:
        self.client = client
        self.sequence = client.open(SPACE).sequence(FORMAT, idle_s=idle_s)
        self.kv = np.zeros((LAYERS, 2, HEADS, 0, HEAD_DIM), np.float32)
        self._random = np.random.default_rng(seed)
        self.grow(blocks * BLOCK_TOKENS - 7)  # with an open tail

    def grow(self, tokens: int) -> None:
        """Appends, and goes on where there was no room for a moment."""
        size = (LAYERS, 2, HEADS, tokens, HEAD_DIM)
        self.kv = np.concatenate(
            [self.kv, self._random.normal(size=size).astype(np.float32)], axis=3
        )

        def grown() -> bool:
            start = self.sequence.length
            end = min(start + 2 * BLOCK_TOKENS, self.tokens)
            try:
                self.sequence.append(range(start, end), self.kv[..., start:end, :], start=start)
            except Retry:
                return False
            return self.sequence.length == self.tokens

        until(grown, "it grows", GROW_S)

    @property
    def tokens(self) -> int:
        return int(self.kv.shape[3])

    def queries(self, rows: int = 1) -> Floats:
        return self._random.normal(size=(rows, QUERY_HEADS, HEAD_DIM)).astype(np.float32)

    def attend(self, layer: int, queries: Floats, **options: Any) -> Attended:
        return self.sequence.attend(queries, layer=layer, scale=SCALE, **options)

    def expected(self, layer: int, queries: Floats, tokens: int = 0) -> Partial:
        tokens = tokens or self.tokens
        keys, values = self.kv[layer, :, :, :tokens].transpose(0, 2, 1, 3)
        seen = sight(len(queries), [], tokens)
        return oracle.attend(queries, keys, values, np.arange(tokens), seen, SCALE)

    def check(self, layer: int = 0, **options: Any) -> Attended:
        """One attend is right, over every token."""
        queries = self.queries()
        answer = self.attend(layer, queries, **options)
        assert_right(answer, self.expected(layer, queries))
        assert sum(answer.tokens.values()) == self.tokens
        return answer


def assert_right(answer: Attended, wanted: Partial) -> None:
    assert np.abs(answer.o - wanted.o).max() <= ERROR
    assert np.abs(answer.lse - wanted.lse).max() <= ERROR * 10
