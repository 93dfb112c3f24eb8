"""The models whose KV is attended, and how it lies in the bench's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvfabric.attention.shape import ITEM_BYTES
from kvfabric.types import Format

BLOCK_TOKENS: Final = 128
SHARD_BYTES: Final = 1 << 20  # of every shape: how many layers that are differs
KV_HEADS: Final = 8
SHORT: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LENGTHS: Final = {"16k": 16 << 10, "128k": 128 << 10}


@dataclass(frozen=True, slots=True)
class Shape:
    """`group`: query heads of one KV head."""

    dtype: str
    head_dim: int
    group: int

    @property
    def text(self) -> str:
        return f"{SHORT[self.dtype]}_d{self.head_dim}_g{self.group}"

    @property
    def query_heads(self) -> int:
        return KV_HEADS * self.group

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer: keys and values."""
        return 2 * KV_HEADS * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def layers(self) -> int:
        """Of a shard."""
        return SHARD_BYTES // (BLOCK_TOKENS * self.token_bytes)

    @property
    def query_bytes(self) -> int:
        """Of one row, as it is sent: in the dtype of the KV."""
        return self.query_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def format(self) -> Format:
        return Format(
            dtype=self.dtype,
            block_tokens=BLOCK_TOKENS,
            packing="plain",
            layers=self.layers,
            kv_heads=KV_HEADS,
            head_dim=self.head_dim,
            kind="kv",
        )

    def moved_bytes(self, parts: int, rows: int = 1) -> int:
        """By the formula, of one layer and step: queries to each part, outputs with their lse
        back in float32, and the new tokens' keys and values once."""
        back = 4 * self.query_heads * (self.head_dim + 1)
        return rows * (parts * (self.query_bytes + back) + self.token_bytes)


MAIN: Final = Shape("bfloat16", 128, 4)
MAIN_FP32: Final = Shape("float32", 128, 4)
SHAPES: Final = (
    MAIN,
    Shape("bfloat16", 64, 3),
    Shape("bfloat16", 64, 8),
    Shape("bfloat16", 128, 8),
    MAIN_FP32,
    Shape("float32", 64, 3),
    Shape("float32", 64, 8),
    Shape("float32", 128, 8),
    Shape("float16", 128, 4),
)
