"""A context whose every byte can be told from its position: what is read is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfabric.types import Format

LAYERS = 8
HEADS = 4
HEAD_DIM = 64
BLOCK_TOKENS = 64
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 4
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES

FORMAT = Format(
    dtype="float32",
    block_tokens=BLOCK_TOKENS,
    layers=LAYERS,
    kv_heads=HEADS,
    head_dim=HEAD_DIM,
)


@dataclass(frozen=True, slots=True)
class Context:
    """`seed` makes another one of every number."""

    seed: int

    def token_ids(self, start: int, end: int) -> list[int]:
        return [(position * 7919 + self.seed) % 32_000 for position in range(start, end)]

    def kv(self, start: int, end: int) -> npt.NDArray[np.float32]:
        """`[layers, 2, heads, tokens, head dim]`: a hash of where each number stands."""
        tokens = np.arange(start, end, dtype=np.uint32) * np.uint32(2_654_435_761)
        lanes = np.arange(LAYERS * 2 * HEADS * HEAD_DIM, dtype=np.uint32) * np.uint32(40_503)
        mixed = (tokens[:, None] ^ lanes[None, :]) + np.uint32(self.seed)
        shaped = mixed.reshape(end - start, LAYERS, 2, HEADS, HEAD_DIM)
        return np.ascontiguousarray(shaped.transpose(1, 2, 3, 0, 4)).astype(np.float32)
