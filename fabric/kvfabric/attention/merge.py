"""The exact merge of attention over parts of a context (Infinite-LLM, section 4.2).

lse = logsumexp(lse_j) and o = sum o_j exp(lse_j - lse). In float32 the result differs from
attention in one piece by a few units of rounding, whatever the number of parts; the tests state
the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Refused

Floats = NDArray[np.float32]

_LEAST = np.finfo(np.float32).min


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some part of the keys: `o` [rows, heads, dim], `lse` [rows, heads]."""

    o: Floats
    lse: Floats


def combine(parts: Sequence[Partial]) -> Partial:
    """One partial of several over disjoint keys; rows that see no key at all stay empty."""
    if not parts:
        raise Refused("attention over no parts at all; name at least one")
    if len(parts) == 1:
        return parts[0]
    lses = np.array([part.lse for part in parts])
    most = lses.max(axis=0)
    weights = np.exp(lses - np.maximum(most, _LEAST))  # 0 for parts that are empty
    total = np.maximum(weights.sum(axis=0), 1)  # it is less only where nothing was seen
    weights /= total
    o = weights[0][..., None] * parts[0].o
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        o += weight[..., None] * part.o
    return Partial(o, most + np.log(total))


def merge(parts: Sequence[Partial]) -> Partial:
    """As `combine`, for the end result. Refused where a row sees no key in any part: softmax over
    nothing has no value."""
    merged = combine(parts)
    unseeing = merged.lse == -np.inf
    if unseeing.any():
        empty = np.flatnonzero(unseeing.any(axis=-1))
        raise Refused(
            f"query row {empty[0]} (of {len(empty)} such) sees no key in any part: its window, "
            "token set or visible length leaves nothing; attend at least its own token"
        )
    return merged
