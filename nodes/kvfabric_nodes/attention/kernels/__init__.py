"""The contract of attention kernels: one call over pieces of blocks that lie scattered in memory.

A kernel computes; it neither decides what is attended nor keeps anything. Its caller sees to it
that the memory stays as it is until the call returns, and calls it in a thread that may take its
time: kernels release the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.masks import Sight
from kvfabric.attention.merge import Partial
from kvfabric.attention.shape import AttentionShape

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel call computes: every query row over every piece, as far as it sees it.

    `keys`, `values`: int64 addresses of the first token's K and V of KV head 0, per piece;
    `tokens`: int32, how many tokens follow there, by the shape's strides; `first`: int64, the
    absolute position of the first. `queries` [rows, query heads, key dim] as `STORED[dtype]` of
    `query_dtype`, which is the KV's dtype or float32; contiguous. `scale` comes before `softcap`
    (0: none): softcap * tanh(scale * q.k / softcap).
    """

    shape: AttentionShape
    keys: NDArray[np.int64]
    values: NDArray[np.int64]
    tokens: NDArray[np.int32]
    first: NDArray[np.int64]
    queries: Array
    query_dtype: str
    sight: Sight
    scale: float
    softcap: float = 0.0

    @property
    def rows(self) -> int:
        return int(self.queries.shape[0])

    @property
    def query_heads(self) -> int:
        return int(self.queries.shape[1])

    @property
    def read_bytes(self) -> int:
        """Of KV, each once, as far as pieces are whole."""
        shape = self.shape
        token = shape.key_dim + (shape.value_dim if shape.value_offset else 0)
        return int(self.tokens.sum()) * shape.kv_heads * token * shape.item_bytes


class Kernel(Protocol):
    """One way to compute a `Work`."""

    name: str

    def refuses(self, work: Work) -> str:
        """Why it cannot compute this; empty: it can. Cheap: asked for every call."""

    def attend(self, work: Work) -> Partial:
        """o [rows, query heads, value dim] and lse [rows, query heads], contiguous float32.

        A row that sees nothing has o = 0 and lse = -inf. Against the oracle over the same
        rounded numbers: what the kernel's own tests state.
        """
