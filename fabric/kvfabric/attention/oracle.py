"""Attention in float64, in one piece and as plainly as the formula: what kernels are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.masks import Sight
from kvfabric.attention.merge import Partial

Array = NDArray[Any]


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    positions: Array,
    sight: Sight,
    scale: float,
    softcap: float = 0.0,
) -> Partial:
    """`queries` [rows, query heads, dim], `keys` [tokens, KV heads, dim], `values` [tokens, KV
    heads, value dim], `positions` [tokens] of the keys, in any order.

    A row that sees nothing has o = 0 and lse = -inf.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (queries, keys, values))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    logits = np.einsum("rhd,thd->rht", q, k) * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    at = np.asarray(positions)[None, :]
    seen = (at < sight.hi[:, None]) & ((at >= sight.lo[:, None]) | (at < sight.sinks))
    logits = np.where(seen[:, None, :], logits, -np.inf)
    most = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(most > -np.inf, most, 0))
    total = weights.sum(axis=-1)
    o = np.empty((*weights.shape[:2], v.shape[2]))
    for row, mine in enumerate(seen):  # 0 times a number that is none would be none, too
        o[row] = np.einsum("ht,thd->hd", weights[row][:, mine], v[mine])
    o /= np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        lse = most[..., 0] + np.log(total)
    return Partial(o.astype(np.float32), lse.astype(np.float32))
