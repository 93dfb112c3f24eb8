"""Torch's fused attention ops over scattered pieces, on any device: what CPU and CUDA have alike.

K and V are gathered, some pieces at a time, so that they are still in the cache when the op reads
them; the query heads of a KV head are folded into the query length, so that each key is read once.
Pieces that every row sees whole go without a mask.

The ops multiply what a mask hides by zero, which a number that is none survives, and some round one
to a number. So where K and V have such, all is computed once more, without them, and the rows that
see them are told apart.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Work

Index = NDArray[np.intp]


def split(work: Work) -> tuple[Index, Index]:
    """The pieces of which every row sees all, and those of which some row sees some."""
    end = work.first + work.tokens
    sight = work.sight
    if not work.rows:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    behind = end <= sight.hi.min()
    whole = behind & ((work.first >= sight.lo.max()) | (end <= sight.sinks))
    some = (work.first < sight.hi.max()) & ((end > sight.lo.min()) | (work.first < sight.sinks))
    return np.flatnonzero(whole), np.flatnonzero(some & ~whole)


def chunks(index: Index, tokens: NDArray[np.int32], most: int) -> Iterator[list[int]]:
    """Neighbours with at most so many tokens together, or one piece."""
    turn = (np.cumsum(tokens[index]) - 1) // most
    for _, group in itertools.groupby(zip(turn.tolist(), index.tolist(), strict=True), _first):
        yield [number for _, number in group]


def _first(pair: tuple[int, int]) -> int:
    return pair[0]


class FusedKernel(abc.ABC):
    """See `Kernel`. Products and sums are the op's; what comes of a chunk is merged in float32."""

    name: str
    chunk_bytes: int  # of K and V, gathered

    @property
    @abc.abstractmethod
    def torch(self) -> Any: ...

    @abc.abstractmethod
    def refuses(self, work: Work) -> str: ...

    @abc.abstractmethod
    def over(
        self, address: int, kind: str, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Any:
        """A tensor over memory of the device; `strides` in bytes."""

    @abc.abstractmethod
    def fused(self, q: Any, k: Any, v: Any, mask: Any, scale: float) -> tuple[Any, Any]:
        """The op: output and lse."""

    @abc.abstractmethod
    def placed(self, tensor: Any) -> Any:
        """The tensor on the device."""

    def attend(self, work: Work) -> Partial:
        partial, total = self._merged(work, wary=False)
        return partial if math.isfinite(float(total)) else self._merged(work, wary=True)[0]

    def _merged(self, work: Work, *, wary: bool) -> tuple[Partial, Any]:
        """Over all pieces, and the sum of the numbers in them."""
        torch, shape = self.torch, work.shape
        folded = self._fold(work)
        o = self.placed(torch.zeros((*folded.shape[1:3], shape.value_dim)))
        lse = self.placed(torch.full(folded.shape[1:3], -torch.inf))
        token_bytes = 2 * shape.kv_heads * shape.key_dim * folded.element_size()
        most = max(1, self.chunk_bytes // token_bytes)
        total = self.placed(torch.zeros(()))
        for index, masked in zip(split(work), (False, True), strict=True):
            for chunk in chunks(index, work.tokens, most):
                k, v = self._planes(work, chunk, folded.dtype)
                seen = self._seen(work, chunk) if masked else None
                if wary:
                    part = self._wary(work, folded, k, v, seen)
                else:
                    total += k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)
                    part = self._attend(work, folded, k, v, seen)
                o, lse = self._merge(o, lse, *part)
        return Partial(self._unfold(work, o), self._unfold(work, lse)), total

    def _planes(self, work: Work, chunk: list[int], dtype: Any) -> tuple[Any, Any]:
        """K and V of these pieces."""
        shape = work.shape
        keys = (shape.key_token_stride, shape.key_head_stride)
        values = (shape.value_token_stride, shape.value_head_stride)
        k = self._gather(work, chunk, work.keys, keys, dtype)
        return k, self._gather(work, chunk, work.values, values, dtype) if shape.value_offset else k

    def _wary(self, work: Work, q: Any, k: Any, v: Any, seen: Any) -> tuple[Any, Any]:
        """As `_attend`; a row that sees a token with a number that is none has nothing else."""
        torch = self.torch
        bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))  # [1, KV heads, tokens]
        k, v = k.masked_fill(bad[..., None], 0), v.masked_fill(bad[..., None], 0)
        o, lse = self._attend(work, q, k, v, seen)
        rows = torch.ones(q.shape[2], k.shape[2]) if seen is None else seen.float()
        spoiled = (bad[0].float() @ self.placed(rows).T) > 0  # [KV heads, folded rows]
        return o.masked_fill(spoiled[..., None], torch.nan), lse.masked_fill(spoiled, torch.nan)

    def _attend(self, work: Work, q: Any, k: Any, v: Any, seen: Any) -> tuple[Any, Any]:
        torch, shape = self.torch, work.shape
        mask = None
        if seen is not None:
            zero = torch.zeros(seen.shape, dtype=q.dtype)
            mask = self.placed(zero.masked_fill_(~seen, -torch.inf))[None, None]
        o, lse = self.fused(q, k, v, mask, work.scale)
        o, lse = o[0, ..., : shape.value_dim].float(), lse[0].float()
        if seen is not None:  # softmax over nothing has no value
            some = self.placed(seen.any(-1))
            o, lse = o.where(some[:, None], 0), lse.where(some, -torch.inf)
        return o, lse

    def _gather(
        self, work: Work, chunk: list[int], addresses: Any, strides: tuple[int, int], dtype: Any
    ) -> Any:
        """[1, KV heads, tokens, key dim] of these pieces, in the queries' dtype."""
        shape = work.shape
        tokens = [int(work.tokens[i]) for i in chunk]
        sizes = (1, shape.kv_heads, sum(tokens), shape.key_dim)
        gathered = self.placed(self.torch.empty(sizes, dtype=dtype))
        at = 0
        for number, count in zip(chunk, tokens, strict=True):
            piece = self.over(
                int(addresses[number]),
                shape.dtype,
                (shape.kv_heads, count, shape.key_dim),
                (strides[1], strides[0], shape.item_bytes),
            )
            gathered[0, :, at : at + count].copy_(piece)
            at += count
        return gathered

    def _seen(self, work: Work, chunk: list[int]) -> Any:
        """bool [folded rows, tokens]"""
        parts = [np.arange(work.first[i], work.first[i] + work.tokens[i]) for i in chunk]
        at, sight = np.concatenate(parts), work.sight
        low = (at >= sight.lo[:, None]) | (at < sight.sinks)
        rows = low & (at < sight.hi[:, None])
        return self.torch.from_numpy(np.repeat(rows, work.query_heads // work.shape.kv_heads, 0))

    def _merge(self, o: Any, lse: Any, more: Any, more_lse: Any) -> tuple[Any, Any]:
        torch = self.torch
        both = torch.logaddexp(lse, more_lse)
        base = both.where(both > -torch.inf, 0)
        weights = ((lse - base).exp()[..., None], (more_lse - base).exp()[..., None])
        return o * weights[0] + more * weights[1], both

    def _fold(self, work: Work) -> Any:
        """[1, KV heads, rows * group, key dim]"""
        bits = np.ascontiguousarray(work.queries)
        kind = getattr(self.torch, work.query_dtype)
        q = self.torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(kind)
        q = q.view(work.rows, work.shape.kv_heads, -1, work.shape.key_dim)
        q = q.transpose(0, 1).reshape(1, work.shape.kv_heads, -1, work.shape.key_dim)
        return self.placed(q)

    def _unfold(self, work: Work, folded: Any) -> NDArray[np.float32]:
        heads = work.shape.kv_heads
        split = folded.cpu().numpy().reshape(heads, work.rows, -1, *folded.shape[2:])
        rows = np.moveaxis(split, 0, 1).reshape(work.rows, work.query_heads, *folded.shape[2:])
        return np.ascontiguousarray(rows)
