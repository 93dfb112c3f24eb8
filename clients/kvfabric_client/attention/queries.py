"""What an engine asks: rows over sequences, and what these rows may be."""

from __future__ import annotations

import itertools
import math
from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfabric.attention.floats import STORED
from kvfabric.attention.masks import Positions
from kvfabric.attention.merge import Partial
from kvfabric.attention.shape import AttentionShape, attention_shape
from kvfabric.errors import Refused
from kvfabric_client.attention.runs import Runs, joined
from kvfabric_client.blocks import Array, BlockShape, strided_tensor

if TYPE_CHECKING:
    from kvfabric_client.sequence import Sequence

_NAMES = {np.dtype(stored): name for name, stored in STORED.items()}
_NOWHERE = np.empty(0, np.int64)

New = tuple[Any, Any, Any]
"""Token ids, keys and values [KV heads, tokens, head dim]; of MLA latents and None."""


@dataclass(frozen=True, slots=True)
class Query:
    """Rows that attend one context. See `Sequence.attend` for what each field is.

    `sequence`: or several that hold different KV heads of one context; `queries` and `new` have
    the heads of all of them then, and so has what is answered.
    """

    sequence: Sequence | abc.Sequence[Sequence]
    queries: Any
    positions: Any = None
    visible: int | None = None
    tokens: Iterable[range] | None = None
    new: New | None = None
    local: Partial | Callable[[], Partial] | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """By their first head."""
        given = self.sequence
        if not isinstance(given, abc.Sequence):
            return [given]
        return sorted(given, key=lambda sequence: sequence.shape.first_head)


@lru_cache(maxsize=256)
def shape_for(shape: BlockShape, value_dim: int) -> AttentionShape:
    """Refused where such blocks are not attended."""
    return attention_shape(shape.format, value_dim)


def scale_of(scale: float | None, shape: AttentionShape) -> float:
    return 1 / math.sqrt(shape.key_dim) if scale is None else scale


def vectors_of(given: Any, shape: AttentionShape, *, values: bool = False) -> tuple[Array, str]:
    """`given` as a contiguous array of `STORED[dtype]`, and its dtype. Refused unless it is
    [rows, query heads, dim] in float32 or in the KV's dtype; `values`: compared with these."""
    dim = shape.value_dim if values else shape.key_dim
    array = strided_tensor(given) if hasattr(given, "data_ptr") else np.asarray(given)
    dtype = _NAMES.get(array.dtype) or array.dtype.name
    if dtype not in ("float32", shape.dtype):
        raise Refused(
            f"queries of {array.dtype} over KV of {shape.dtype}; give either that or float32"
        )
    if array.ndim != 3 or array.shape[2] != dim or not array.shape[0]:
        raise Refused(f"queries of shape {list(array.shape)}; give [rows, query heads, {dim}]")
    return np.ascontiguousarray(array.view(STORED[dtype])), dtype


def positions_of(given: Any, rows: int) -> Positions:
    """Refused unless there is one per row, or none."""
    if given is None:
        return _NOWHERE
    at = np.asarray(given, dtype=np.int64)
    if at.ndim != 1 or len(at) not in (0, rows) or (len(at) and at.min() < 0):
        raise Refused(
            f"positions of shape {list(at.shape)} for {rows} rows; give one each, from 0, or none"
        )
    return at


def telling_positions(at: Positions, visible: int, window: int) -> Positions:
    """None where they say no more than that rows see what is before `visible`: of rows behind
    that and, under a window, of rows right behind it."""
    if len(at):
        low, high = int(at.min()), int(at.max())
        if low == high == visible or (low + 1 >= visible and not window):
            return _NOWHERE
    return at


def token_runs(tokens: Iterable[range] | None, visible: int) -> Runs:
    """A token set as runs. Refused where a range has steps."""
    if tokens is None:
        return [(0, visible)] if visible else []
    for each in tokens:
        if each.step != 1 or each.start < 0:
            raise Refused(f"tokens {each}; give ranges such as range(0, 128)")
    return joined((each.start, min(each.stop, visible)) for each in tokens)


@lru_cache(maxsize=256)
def heads_of(shapes: tuple[BlockShape, ...], query_heads: int) -> list[slice]:
    """The query heads that belong to the KV heads of each part. Refused where these are not the
    parts of one context, one behind the other."""
    ends = list(itertools.accumulate((shape.heads for shape in shapes), initial=0))
    first = shapes[0].first_head
    if [shape.first_head - first for shape in shapes] != ends[:-1]:
        raise Refused(
            f"sequences with KV heads from {[shape.first_head for shape in shapes]} on, of "
            f"{[shape.heads for shape in shapes]}; give parts that follow each other"
        )
    if query_heads <= 0 or query_heads % ends[-1]:
        raise Refused(
            f"{query_heads} query heads over {ends[-1]} KV heads: the first must be a multiple of "
            "the second"
        )
    group = query_heads // ends[-1]
    return [slice(a * group, b * group) for a, b in itertools.pairwise(ends)]
