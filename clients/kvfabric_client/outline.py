"""What a sequence's writer knows of it: token ids, sealed blocks, what is visible per layer.

Books only: the bytes lie in a node, and calls are made by `sequence`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfabric.errors import Conflict, Refused
from kvfabric.keys import CHAIN_START, chain
from kvfabric.types import Key, NamespaceId
from kvfabric_client.blocks import BlockShape

MAX_TOKEN_ID = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Sealed:
    """A block that is a shard now."""

    key: Key
    link: bytes
    start: int  # absolute position of its first token
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `lo` to `hi` of one block, which are `start` and following of the sequence."""

    index: int  # of the sealed blocks, or of the open ones
    lo: int
    hi: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.hi - self.lo


class Outline:
    """See the module. The open blocks follow the sealed ones without a gap."""

    def __init__(self, namespace: NamespaceId, shape: BlockShape) -> None:
        self.namespace = namespace
        self.shape = shape
        self.tokens = array("I")  # ids of every token of which at least one layer is visible
        self.blocks: list[Sealed] = []
        self.visible = [0] * shape.layers
        self.cut = False  # a sealed block was, or was exchanged, since `take_cut`

    @property
    def length(self) -> int:
        """Tokens that are visible in every layer."""
        return min(self.visible)

    @property
    def sealed(self) -> int:
        """Tokens in sealed blocks; the first open block begins there."""
        return self.blocks[-1].end if self.blocks else 0

    @property
    def link(self) -> bytes:
        """The chain up to the last sealed block."""
        return self.blocks[-1].link if self.blocks else CHAIN_START

    def start_of(self, layer: int | None) -> int:
        """Where the next tokens of a layer (None: of all) begin. Refused where layers differ."""
        if layer is not None:
            return self.visible[layer]
        if self.length != max(self.visible):
            raise Refused(
                f"layers reach from token {self.length} to {max(self.visible)}; append the "
                "missing layers one by one before all at once"
            )
        return self.length

    def check_tokens(self, start: int, token_ids: Sequence[int]) -> None:
        """Refused where another layer has other tokens at these positions."""
        known = self.tokens[start : start + len(token_ids)]
        if known and known != array("I", token_ids[: len(known)]):
            raise Refused(
                f"other token ids than in the layers before, from token {start} on; a sequence's "
                "layers hold the same tokens"
            )

    def append(self, start: int, token_ids: Sequence[int], layer: int | None) -> None:
        """These tokens are visible now, in one layer or in all."""
        self.tokens.extend(token_ids[max(0, len(self.tokens) - start) :])
        end = start + len(token_ids)
        for index in range(self.shape.layers) if layer is None else (layer,):
            self.visible[index] = max(self.visible[index], end)

    def blocks_for(self, end: int) -> int:
        """Open blocks that hold everything up to `end`."""
        return -(-max(0, end - self.sealed) // self.shape.block_tokens)

    def open_pieces(self, start: int, end: int) -> Iterator[Piece]:
        """The open blocks' pieces of these tokens."""
        return _cut(self.sealed, self.shape.block_tokens, start, end)

    def sealed_pieces(self, start: int, end: int) -> list[Piece]:
        """The sealed blocks' pieces of these tokens."""
        first = bisect_right(self.blocks, start, key=lambda block: block.end)
        pieces: list[Piece] = []
        for index in range(first, len(self.blocks)):
            block = self.blocks[index]
            if block.start >= end:
                break
            lo, hi = max(start, block.start), min(end, block.end)
            pieces.append(Piece(index, lo - block.start, hi - block.start, lo))
        return pieces

    def next_blocks(self, *, short: bool = False) -> list[Sealed]:
        """What the open blocks that are full in every layer will be; the last may be `short`."""
        tokens = self.shape.block_tokens
        ends = list(range(self.sealed + tokens, self.length + 1, tokens))
        if short and self.length > (ends[-1] if ends else self.sealed):
            ends.append(self.length)
        return self._named(self.sealed, ends, self.link)

    def named(self, token_ids: Sequence[int]) -> list[Sealed]:
        """The full blocks of a context that begins with these tokens."""
        tokens = self.shape.block_tokens
        ends = list(range(tokens, len(token_ids) + 1, tokens))
        named = Outline(self.namespace, self.shape)
        named.tokens = array("I", token_ids)
        return named._named(0, ends, CHAIN_START)

    def _named(self, start: int, ends: list[int], link: bytes) -> list[Sealed]:
        starts = [start, *ends[:-1]]
        runs = (self.tokens[a:b] for a, b in zip(starts, ends, strict=False))
        return [
            Sealed(self.shape.key(self.namespace, one, a, b - a), one, a, b - a)
            for one, a, b in zip(chain(runs, link), starts, ends, strict=False)
        ]

    def seal(self, blocks: Iterable[Sealed]) -> None:
        """The first open blocks are shards now."""
        self.blocks.extend(blocks)

    def align(self, keys: Sequence[bytes], tokens: Sequence[int]) -> None:
        """Takes over which blocks are sealed, as the node has them: an answer may have been
        lost. Conflict where the node has other blocks than these tokens make.
        """
        known = [block.key for block in self.blocks]
        if list(keys[: len(known)]) != known[: len(keys)]:
            raise Conflict("the node's sequence holds other blocks; somebody else has written it")
        self.cut = self.cut or len(keys) < len(self.blocks)
        del self.blocks[len(keys) :]
        for key, count in zip(keys[len(self.blocks) :], tokens[len(self.blocks) :], strict=True):
            end = self.sealed + count
            named = self._named(self.sealed, [end], self.link) if end <= self.length else []
            if not named or named[0].key != key:
                raise Conflict("the node's sequence holds a block that was not written here")
            self.blocks += named

    def begin(self, blocks: Sequence[Sealed], token_ids: Sequence[int]) -> None:
        """Begins with sealed blocks, which hold exactly these tokens."""
        self.blocks = list(blocks)
        self.tokens = array("I", token_ids)
        self.visible = [len(self.tokens)] * self.shape.layers

    def truncate(self, length: int) -> None:
        """A sealed block that it cuts is open again."""
        self.cut = self.cut or length < self.sealed
        del self.tokens[length:]
        while self.blocks and self.blocks[-1].end > length:
            self.blocks.pop()
        self.visible = [min(visible, length) for visible in self.visible]

    def take_cut(self) -> bool:
        """Whether some sealed blocks are not those that they were when it was asked last."""
        cut, self.cut = self.cut, False
        return cut

    def fork(self, length: int) -> Outline:
        """A second one that has the same up to `length`."""
        other = Outline(self.namespace, self.shape)
        other.tokens = self.tokens[:]
        other.blocks = list(self.blocks)
        other.visible = list(self.visible)
        other.cut = self.cut
        other.truncate(length)
        return other

    def check(self) -> None:
        """Asserts every invariant."""
        assert len(self.visible) == self.shape.layers
        assert len(self.tokens) == max(self.visible)
        assert self.sealed <= self.length
        at = 0
        for block in self.blocks:
            assert block.start == at
            assert 0 < block.tokens <= self.shape.block_tokens
            at = block.end


def _cut(first: int, block_tokens: int, start: int, end: int) -> Iterator[Piece]:
    """Pieces of equal blocks, the first of which begins at `first`."""
    at = max(start, first)
    while at < end:
        index, lo = divmod(at - first, block_tokens)
        hi = min(block_tokens, lo + end - at)
        yield Piece(index, lo, hi, at)
        at += hi - lo


def checked_ids(token_ids: Any) -> array[int]:
    """Token ids as the chain has them. Refused where one is no 32-bit number."""
    ids = np.asarray(token_ids)
    if ids.size == 0:
        return array("I")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > MAX_TOKEN_ID:
        raise Refused(
            f"token ids of type {ids.dtype} and shape {list(ids.shape)}; give a list of whole "
            f"numbers from 0 to {MAX_TOKEN_ID}"
        )
    found = array("I")
    found.frombytes(np.ascontiguousarray(ids, dtype=np.uint32).tobytes())
    return found
