"""The plainest kernel: numpy, everywhere and for everything. Slow; the last choice."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention import oracle
from kvfabric.attention.floats import STORED, widened
from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Work


class ReferenceKernel:
    """The oracle over gathered pieces. See `Kernel`."""

    name = "reference"

    def refuses(self, work: Work) -> str:
        return ""

    def attend(self, work: Work) -> Partial:
        shape = work.shape
        keys = (shape.key_token_stride, shape.key_head_stride)
        values = (shape.value_token_stride, shape.value_head_stride)
        positions = [
            np.arange(first, first + count)
            for first, count in zip(work.first, work.tokens, strict=True)
        ]
        return oracle.attend(
            widened(work.queries, work.query_dtype),
            _gather(work, work.keys, shape.key_dim, keys),
            _gather(work, work.values, shape.value_dim, values),
            np.concatenate([np.empty(0, np.int64), *positions]),
            work.sight,
            work.scale,
            work.softcap,
        )


def _gather(
    work: Work, addresses: NDArray[np.int64], dim: int, strides: tuple[int, int]
) -> NDArray[np.float32]:
    """Copies as [tokens, KV heads, dim]; `strides`: in bytes, of a token and a head."""
    shape = work.shape
    kind = STORED[shape.dtype]
    pieces: list[NDArray[Any]] = [np.empty((0, shape.kv_heads, dim), kind)]
    for address, count in zip(addresses.tolist(), work.tokens.tolist(), strict=True):
        sizes = (count, shape.kv_heads, dim)
        pieces.append(_strided(address, kind, sizes, (*strides, shape.item_bytes)))
    return widened(np.concatenate(pieces), shape.dtype)


def _strided(
    address: int, kind: type[np.generic], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    """An array over memory that is somebody else's."""
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    memory = (ctypes.c_ubyte * (span + np.dtype(kind).itemsize)).from_address(address)
    return np.ndarray(sizes, np.dtype(kind), memoryview(memory), strides=strides)
