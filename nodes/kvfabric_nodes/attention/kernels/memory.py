"""KV as arrays over the memory in which it lies, for what is computed with numpy and torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import STORED, widened
from kvfabric.attention.shape import AttentionShape


def over(address: int, kind: Any, sizes: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[Any]:
    """An array over memory that is somebody else's; `strides` in bytes."""
    item = np.dtype(kind)
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    memory = (ctypes.c_ubyte * (span + item.itemsize)).from_address(address)
    return np.ndarray(sizes, item, memoryview(memory), strides=strides)


def tokens_at(shape: AttentionShape, address: int, count: int, *, values: bool) -> NDArray[Any]:
    """The keys or values of so many tokens, [tokens, KV heads, dim], as they are stored."""
    dim = shape.value_dim if values else shape.key_dim
    token = shape.value_token_stride if values else shape.key_token_stride
    head = shape.value_head_stride if values else shape.key_head_stride
    sizes = (count, shape.kv_heads, dim)
    return over(address, STORED[shape.dtype], sizes, (token, head, shape.item_bytes))


def gathered(
    shape: AttentionShape,
    addresses: NDArray[np.int64],
    tokens: NDArray[np.int32],
    *,
    values: bool,
) -> NDArray[np.float32]:
    """Copies of what lies there, [tokens of all, KV heads, dim]."""
    dim = shape.value_dim if values else shape.key_dim
    pieces = [np.empty((0, shape.kv_heads, dim), STORED[shape.dtype])]
    for address, count in zip(addresses.tolist(), tokens.tolist(), strict=True):
        pieces.append(tokens_at(shape, address, count, values=values))
    return widened(np.concatenate(pieces), shape.dtype)
