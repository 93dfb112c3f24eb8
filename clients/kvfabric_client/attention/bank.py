"""A bank: KV, latents or plain vectors in shards at any nodes, searched and summed where they lie.

Made by `Room.bank`. It binds no shard: what is evicted or purged is missing, and says so.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfabric.attention.merge import Floats, merge
from kvfabric.errors import DeadlineExceeded, Refused
from kvfabric.types import Key
from kvfabric_client.attention.answers import Attended, Best, Traffic
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.exact import Attention
from kvfabric_client.attention.gather import Gather
from kvfabric_client.attention.parts import Options, Part
from kvfabric_client.attention.queries import positions_of, scale_of, shape_for, vectors_of
from kvfabric_client.attention.recall import best_of, reduced
from kvfabric_client.attention.route import HOME
from kvfabric_client.attention.runs import Runs, joined
from kvfabric_client.attention.summing import sum_of
from kvfabric_client.blocks import Array, BlockShape
from kvfabric_client.closing import Closing
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Sealed
from kvfabric_client.sequence_reads import Missing

if TYPE_CHECKING:
    from kvfabric_client.room import Room


class BankSource:
    """A `Source`: shards by their keys, at the home node or where the directory says."""

    sequence = 0

    def __init__(self, room: Room, shape: BlockShape, blocks: Sequence[Sealed]) -> None:
        self.room = room
        self.shape = shape
        self.blocks = sorted(blocks, key=lambda block: block.start)
        self.home = ""

    def take_cut(self) -> bool:
        return False

    def opened(
        self, runs: Runs, layer: int, patience: Callable[[], Deadline]
    ) -> Iterator[tuple[int, Array]]:
        return iter(())

    def named(self, indices: Sequence[int], deadline: Deadline) -> list[str | None]:
        places: list[str | None] = [HOME] * len(indices)
        keys = [self.blocks[index].key for index in indices]
        for address, positions in self.room.client.elsewhere(self.room.id, keys, deadline).items():
            for position in positions:
                places[position] = address
        return places


class Bank(Closing):
    """See the module. Thread-safe; a context manager that closes. `value_dim`: of latents the
    numbers that are values too, by default all."""

    def __init__(
        self, room: Room, shape: BlockShape, blocks: Sequence[Sealed], value_dim: int = 0
    ) -> None:
        latent = shape.kind == "mla"
        self.value_dim = value_dim or (shape.head_dim if latent else 0)
        self.shape = shape_for(shape, self.value_dim)
        self.source = BankSource(room, shape, blocks)
        self.context = Context(self.source)
        self.tokens: Runs = joined((block.start, block.end) for block in blocks)
        self._lock = threading.Lock()

    def top_k(
        self,
        queries: Any,
        k: int,
        *,
        layer: int = 0,
        page_tokens: int = 0,
        values: bool = False,
        timeout_s: float | None = None,
    ) -> list[Best]:
        """Per row of `queries` [rows, query heads, dim] the tokens with the greatest inner
        products, over all heads of the row; with `page_tokens` (a divisor of a block's tokens)
        pages, by the mean of their keys. `values`: of these instead of the keys."""
        with self._using(timeout_s) as deadline:
            return best_of(
                self.context,
                self.shape,
                queries,
                k,
                layer=layer,
                page_tokens=page_tokens,
                values=values,
                tokens=self.tokens,
                deadline=deadline,
            )

    def reduce(
        self,
        tokens: Any,
        weights: Any,
        *,
        layer: int = 0,
        values: bool = False,
        timeout_s: float | None = None,
    ) -> Floats:
        """The weighted sum of these tokens' keys, or values: [KV heads, dim]."""
        with self._using(timeout_s) as deadline:
            sums = [sum_of(tokens, weights)]
            total: Floats = reduced(
                self.context, self.shape, sums, layer=layer, values=values, deadline=deadline
            )[0]
            return total

    def attend(
        self,
        queries: Any,
        *,
        layer: int = 0,
        scale: float | None = None,
        timeout_s: float | None = None,
    ) -> Attended:
        """Attention of `queries` [rows, query heads, dim] over all of it."""
        with self._using(timeout_s) as deadline:
            vectors, dtype = vectors_of(queries, self.shape)
            self.shape.check_heads(vectors.shape[1])
            end = self.tokens[-1][1] if self.tokens else 0
            at = positions_of(None, len(vectors))
            part = Part(self.context, self.shape, vectors, dtype, end, at, self.tokens)
            traffic = Traffic()
            attention = Attention([part], Options(layer, scale_of(scale, self.shape)), traffic)
            gather = Gather(attention, self.value_dim, traffic, deadline)
            lost = joined(run for _, runs in gather.run(attention.items()) for run in runs)
            if lost:
                raise Missing([range(*run) for run in lost])
            whole = merge([attention.partial(part)])
            return Attended(whole.o, whole.lse, attention.gathered[part].tokens, traffic)

    def close(self) -> None:
        """The nodes may forget it; its shards stay. Safe to repeat."""
        with self._lock:
            self.context.close()

    @contextmanager
    def _using(self, timeout_s: float | None) -> Iterator[Deadline]:
        client = self.source.room.client
        deadline = client.deadline(timeout_s)
        if not self._lock.acquire(timeout=deadline.left_s()):
            raise DeadlineExceeded("another call on this bank took until the deadline")
        try:
            self.source.home = client.at_home(lambda link: link.address, deadline)
            self.context.begin(deadline)
            yield deadline
        finally:
            self._lock.release()


def blocks_of(
    shape: BlockShape, keys: Sequence[Key], first_tokens: Any, tokens: Any
) -> list[Sealed]:
    """Shards as blocks at absolute positions. Refused where two overlap."""
    full = shape.block_tokens
    firsts = np.arange(len(keys)) * full if first_tokens is None else np.asarray(first_tokens)
    counts = np.full(len(keys), full) if tokens is None else np.asarray(tokens)
    if len(firsts) != len(keys) or len(counts) != len(keys):
        raise Refused(f"{len(keys)} keys with {len(firsts)} first tokens and {len(counts)} counts")
    blocks = [
        Sealed(key, b"", int(first), int(count))
        for key, first, count in zip(keys, firsts, counts, strict=True)
    ]
    ordered = sorted(blocks, key=lambda block: block.start)
    for before, after in itertools.pairwise(ordered):
        if before.end > after.start:
            raise Refused(f"two shards have token {after.start}; each position is in one of them")
    return ordered
