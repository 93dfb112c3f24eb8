"""One open sequence as a value: sealed blocks, open blocks behind them, and what can be seen.

Positions are tokens from the sequence's begin. Who may change it, who else needs its
blocks and where they lie is somebody else's business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Conflict, Refused
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Reservation, Session

Fence = Callable[[], object]
"""What was written before it, all CPUs see before what is written after it."""


def no_fence() -> None:
    """Of whoever looks in the thread that writes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What all blocks of a sequence have in common."""

    size_bytes: int
    layers: int
    block_tokens: int  # of a full one


@dataclass(frozen=True, slots=True)
class Block:
    """A sealed block. A short one keeps the full one's layout."""

    key: Key
    tokens: int
    seen_at: str = ""  # the node that had it when the sequence began, where that was another


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """An open block: one extent, which its writer may fill."""

    reservation: Reservation
    index: int

    @property
    def extent(self) -> Extent:
        return self.reservation.items[self.index].extent


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a position falls: behind `blocks` sealed ones, `rest` tokens into what follows."""

    blocks: int
    start: int  # position of what follows
    rest: int
    block: Block | None  # the sealed block that is cut, if one is


@dataclass(slots=True, eq=False)
class OpenSequence:
    """See the module. Only `Sequences` changes it."""

    id: int
    namespace: NamespaceId
    shape: Shape
    session: Session | None  # its writer's; None: gone
    idle_s: float
    deadline_s: float  # ends by itself then
    root: OpenSequence | None = None  # of a tentative fork: what it is an attempt at
    epoch: int = 1  # of its writer
    settled: int = 0  # the epoch that a writer ended last, for a next one of its own
    blocks: list[Block] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of each block: the position behind it
    tails: list[Tail] = field(default_factory=list)
    length: int = 0  # tokens that are visible in every layer
    ahead: dict[int, int] = field(default_factory=dict)  # layers that are visible further
    forks: dict[int, OpenSequence] = field(default_factory=dict)  # tentative ones
    through_root: int = 0  # its first blocks, so many of which only its root claims
    away: int = 0  # blocks that it claims and that are not on this node
    lent_first: int = 0  # its first blocks, so many of which are known not to be here
    watched_s: float = 0.0  # when its deadline is looked at, at the latest
    calls: int = 0  # under way: such a sequence does not end by itself
    cuts: int = 0  # how often open blocks that were seen may have been written anew
    open: bool = True
    board: NDArray[np.int64] | None = None  # see `watched`
    fence: Fence = no_fence

    @property
    def sealed(self) -> int:
        """The position behind the sealed blocks, where the open ones begin."""
        return self.ends[-1] if self.ends else 0

    @property
    def room(self) -> int:
        """The position behind the open blocks."""
        return self.sealed + len(self.tails) * self.shape.block_tokens

    def visible(self, layer: int) -> int:
        return self.ahead.get(layer, self.length)

    def watched(self, fence: Fence = no_fence) -> NDArray[np.int64]:
        """What of each layer is visible and, behind them, how often that may have become other
        than it was: for threads that look without asking. `show` and `show_cut` keep it true."""
        if self.board is None:
            self.board, self.fence = np.zeros(self.shape.layers + 1, np.int64), fence
            self.show(0, self.shape.layers)
        return self.board

    def show(self, first_layer: int, layers: int) -> None:
        """Once the bytes of what is visible in these layers are there."""
        if self.board is not None:
            end = first_layer + layers
            self.fence()
            self.board[first_layer:end] = list(map(self.visible, range(first_layer, end)))

    def show_cut(self) -> None:
        """What was visible is no more, or is something else, or will be at once."""
        if self.board is not None:
            self.board[-1] += 1
            self.fence()
            self.show(0, self.shape.layers)

    def append(self, start: int, tokens: int, first_layer: int, layers: int) -> None:
        """Tokens from `start` on lie in the open blocks. What is visible already stays so."""
        end = start + tokens
        if first_layer + layers > self.shape.layers:
            raise Refused(
                f"layers {first_layer} to {first_layer + layers - 1} of a sequence whose blocks "
                f"have {self.shape.layers}"
            )
        which = range(first_layer, first_layer + layers)
        whole = layers == self.shape.layers
        reached = self.length if whole else min(map(self.visible, which))
        if start > reached:
            raise Conflict(
                f"tokens from {start} on, but {reached} are visible: append those between first"
            )
        if end > self.room:
            raise Refused(
                f"tokens up to {end} do not fit: the open blocks end at {self.room}; extend first"
            )
        if whole:
            self._see(max(end, self.length))
            return
        for layer in which:
            if end > self.visible(layer):
                self.ahead[layer] = end
        if len(self.ahead) == self.shape.layers:
            self._see(min(self.ahead.values()))

    def repeats(self, start: int, tokens: int, first_layer: int, layers: int) -> bool:
        """Whether an append tells nothing new: its bytes must not be written again.

        One without tokens only brings bytes; it is late once anything behind `start` is seen.
        """
        which = range(first_layer, min(first_layer + layers, self.shape.layers))
        reached = min(map(self.visible, which), default=self.length)
        return start + max(tokens, 1) <= reached

    def _see(self, length: int) -> None:
        self.length = length
        if self.ahead:
            self.ahead = {layer: n for layer, n in self.ahead.items() if n > length}

    def cut(self, tokens: int) -> Cut:
        """Where the position `tokens` falls. Refused beyond the length."""
        if tokens > self.length:
            raise Refused(f"{tokens} tokens of a sequence that has {self.length}")
        kept = bisect_right(self.ends, tokens)
        start = self.ends[kept - 1] if kept else 0
        rest = tokens - start
        return Cut(kept, start, rest, self.blocks[kept] if rest and kept < len(self.ends) else None)

    def sealable(self, keys: Sequence[Key], tokens: Sequence[int]) -> list[int]:
        """The tokens of the first open blocks, which are to be sealed under these keys."""
        full = self.shape.block_tokens
        counts = list(tokens) or [full] * len(keys)
        if not keys or len(counts) != len(keys) or len(keys) > len(self.tails):
            raise Refused(
                f"{len(keys)} keys and {len(tokens)} token counts to seal, of {len(self.tails)} "
                "open blocks; give one key per block, and no counts or one per block"
            )
        if any(n != full for n in counts[:-1]) or not 0 < counts[-1] <= full:
            raise Refused(f"only the last block may be short; a full one has {full} tokens")
        end = self.sealed + sum(counts)
        if end > self.length:
            raise Refused(
                f"blocks up to token {end}, but {self.length} are visible in every layer; append "
                "the rest, or seal the last block short"
            )
        if counts[-1] < full and (end < self.length or self.ahead):
            raise Refused(
                f"a short block must end where the sequence does, at {self.length} in every "
                "layer: append or truncate first"
            )
        if len(set(keys)) < len(keys):
            raise Refused("the same key for two blocks")
        return counts

    def check(self) -> None:
        """Asserts what is always true of it."""
        assert self.open
        assert len(self.ends) == len(self.blocks)
        at = 0
        for block, end in zip(self.blocks, self.ends, strict=True):
            assert 0 < block.tokens <= self.shape.block_tokens
            at += block.tokens
            assert end == at
        assert self.sealed <= self.length <= self.room
        assert all(self.length < n <= self.room for n in self.ahead.values())
        assert len(self.ahead) < max(self.shape.layers, 1) or not self.ahead
        assert 0 <= self.away <= len(self.blocks) - self.through_root
        if self.through_root:
            assert self.root is not None
            assert self.root.blocks[: self.through_root] == self.blocks[: self.through_root]
        for tail in self.tails:
            reservation = tail.reservation
            assert reservation.sequence == self.id
            assert not reservation.expired
            assert reservation.session is self.session
            assert tail.index in reservation.items
        assert len({id(tail.extent) for tail in self.tails}) == len(self.tails)
        if self.board is not None:
            assert self.board[:-1].tolist() == list(map(self.visible, range(self.shape.layers)))
