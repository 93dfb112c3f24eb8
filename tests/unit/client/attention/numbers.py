"""Sequences filled with numbers that are kept beside them, for the oracle."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import STORED, narrowed, widened
from kvfabric.attention.masks import sight
from kvfabric.attention.merge import Partial
from kvfabric.attention.oracle import attend as oracle
from kvfabric_client import Attended, Missing, Sequence
from kvfabric_client.blocks import BlockShape

Array = NDArray[Any]

# Kernels state their own bounds; over parts the merge adds some units of rounding.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def random_kv(shape: BlockShape, tokens: int, seed: int = 0) -> Array:
    """[layers, planes, heads, tokens, dim], in the blocks' own type."""
    sizes = (shape.layers, shape.planes, shape.heads, tokens, shape.head_dim)
    return narrowed(np.random.default_rng(seed).normal(size=sizes), shape.dtype)


def random_queries(rows: int, heads: int, dim: int, dtype: str = "float32", seed: int = 9) -> Array:
    return narrowed(np.random.default_rng(seed).normal(size=(rows, heads, dim)), dtype)


def expected(
    shape: BlockShape,
    kv: Array,
    layer: int,
    queries: Array,
    *,
    dtype: str = "float32",
    positions: Several[int] = (),
    visible: int | None = None,
    only: Several[range] | None = None,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    scale: float = 0.0,
    value_dim: int = 0,
) -> Partial:
    """Of attention in one piece, in float64, over the tokens of `kv` (or `only` some of them)."""
    tokens = kv.shape[-2] if visible is None else visible
    chosen = [t for r in (only if only is not None else [range(tokens)]) for t in r if t < tokens]
    at = np.array(chosen, np.int64)
    keys, values = (
        widened(kv[layer, plane].view(STORED[shape.dtype]), shape.dtype)[:, at].transpose(1, 0, 2)
        for plane in (0, -1)
    )
    return oracle(
        widened(queries, dtype),
        keys,
        values[..., :value_dim] if value_dim else values,
        at,
        sight(len(queries), positions, tokens, window, sinks),
        scale or shape.head_dim**-0.5,
        softcap,
    )


def check(got: Attended | Missing | Partial, wanted: Partial, dtype: str = "float32") -> None:
    bound = TOLERANCE[dtype] * max(1.0, float(np.abs(wanted.o).max()))
    assert not isinstance(got, Missing)
    assert got.o.shape == wanted.o.shape
    assert got.o.dtype == got.lse.dtype == np.float32
    assert np.abs(got.o - wanted.o).max() <= bound
    assert np.abs(got.lse - wanted.lse).max() <= TOLERANCE[dtype] * (1 + np.abs(wanted.lse).max())


def fill(sequence: Sequence, kv: Array, first_id: int = 0) -> None:
    """Appends all of it, where the sequence ends."""
    start = sequence.length
    ids = range(first_id + start, first_id + kv.shape[-2])
    sequence.append(ids, kv[..., start:, :])
