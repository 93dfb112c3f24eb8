"""Attention over the tokens that the engine has just computed, in its own memory, in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.masks import Sight
from kvfabric.attention.merge import Floats, Partial

LOGIT_BYTES = 16 << 20  # of the logits that are made at once


def attend_new(
    queries: Floats,
    keys: Floats,
    values: Floats,
    positions: NDArray[np.int64],
    sight: Sight,
    scale: float,
    softcap: float = 0.0,
) -> Partial:
    """`queries` [rows, query heads, dim], `keys` and `values` [KV heads, tokens, dim], as they are
    appended; `positions` [tokens]. A row that sees nothing has o = 0 and lse = -inf."""
    rows, heads, _ = queries.shape
    if rows == len(positions) == 1 and sight.sees(0, int(positions[0])):
        return _of_one(queries, keys, values, scale, softcap)
    step = max(1, LOGIT_BYTES // (4 * heads * max(1, len(positions))))
    parts = [
        _some(
            queries[at : at + step],
            keys,
            values,
            positions,
            Sight(sight.lo[at : at + step], sight.hi[at : at + step], sight.sinks),
            scale,
            softcap,
        )
        for at in range(0, rows, step)
    ]
    if len(parts) == 1:
        return parts[0]
    return Partial(
        np.concatenate([part.o for part in parts]), np.concatenate([part.lse for part in parts])
    )


def _of_one(queries: Floats, keys: Floats, values: Floats, scale: float, softcap: float) -> Partial:
    """Of one row over the one token that it sees, as in every step of a decode: all weight is on
    its value."""
    group = queries.shape[1] // len(keys)
    logits = _logits(queries.reshape(len(keys), group, -1), keys, scale, softcap).reshape(1, -1)
    o = np.repeat(values.transpose(1, 0, 2), group, axis=1)
    return Partial(o + (0 * logits)[..., None], logits)  # a logit that is no number leaves none


def _logits(folded: Floats, keys: Floats, scale: float, softcap: float) -> Floats:
    """Of rows [KV heads, rows, dim]: [KV heads, rows, tokens]."""
    logits: Floats = folded @ keys.transpose(0, 2, 1)
    logits *= np.float32(scale)
    if softcap:
        logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
    return logits


@np.errstate(divide="ignore", invalid="ignore")  # log 0: nothing was seen; keys that are no number
def _some(
    queries: Floats,
    keys: Floats,
    values: Floats,
    positions: NDArray[np.int64],
    sight: Sight,
    scale: float,
    softcap: float,
) -> Partial:
    rows, heads, dim = queries.shape
    group = heads // len(keys)
    folded = queries.reshape(rows, len(keys), group, dim).transpose(1, 0, 2, 3)
    logits = _logits(folded.reshape(len(keys), rows * group, dim), keys, scale, softcap)
    hidden: NDArray[np.bool_] = (positions >= sight.hi[:, None]) | (
        (positions < sight.lo[:, None]) & (positions >= sight.sinks)
    )
    logits[:, np.repeat(hidden, group, axis=0)] = -np.inf
    most = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(most > -np.inf, most, 0))
    total = weights.sum(axis=-1, keepdims=True)
    bad = np.asarray(~np.isfinite(values).all(axis=-1))  # [KV heads, tokens]
    if bad.any():  # 0 times such a number is none, too: only rows that see it shall have it
        values = np.where(bad[..., None], np.float32(0), values)
    o = (weights @ values) / np.where(total > 0, total, 1)
    if bad.any():
        spoiled = bad.astype(np.float32) @ ~hidden.T  # [KV heads, rows]
        o[np.repeat(spoiled > 0, group, axis=1)] = np.nan
    lse = most + np.log(total)
    return Partial(_unfolded(o, rows), _unfolded(lse, rows)[..., 0])


def _unfolded(folded: Floats, rows: int) -> Floats:
    """[KV heads, rows * group, n] as [rows, query heads, n]."""
    kv_heads, _, size = folded.shape
    return folded.reshape(kv_heads, rows, -1, size).transpose(1, 0, 2, 3).reshape(rows, -1, size)
