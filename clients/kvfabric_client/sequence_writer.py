"""The one writer of a sequence: appends, cuts, forks. Where it does so is its `Seat`'s business.

Every change is noted in the outline after the node has answered.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvfabric.checksums import checksums
from kvfabric.errors import Conflict, Refused, Retry, Unreachable
from kvfabric_client.block_reader import Reader
from kvfabric_client.blocks import Bytes, RawSource, Source
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Outline
from kvfabric_client.sequence_home import Home
from kvfabric_client.sequence_seat import Seat

if TYPE_CHECKING:
    from kvfabric_client.room import Room

OPEN_BYTES = 32 << 20  # of blocks that one append of all layers keeps open at once
MOST_OPEN = 1024
GRANTS_TO_GROW = 16
MAX_MOVES = 3  # to other nodes, within one call


class Writer(Seat):
    """See the module. For one thread at a time."""

    def __init__(
        self, room: Room, outline: Outline, home: Home, *, tentative: bool = False
    ) -> None:
        super().__init__(room, outline, home, tentative=tentative)
        self.most_open = MOST_OPEN  # blocks that the node had room for at once, lately
        self.granted = 0  # how often it had room for that many since

    # Appending ----------------------------------------------------------------------

    def append(
        self,
        first: int,
        ids: array[int],
        source: Source | RawSource,
        layer: int | None,
        deadline: Deadline,
    ) -> None:
        """Appends what of the tokens from position `first` on is not there yet."""
        end = first + len(ids)
        moves = 0
        while True:
            at = self.outline.start_of(layer)
            if at < first:
                raise Conflict(
                    f"tokens from {first} on, but on node {self.home.node} the sequence ends at "
                    f"{at}: append those between first, again if they were lost with a node"
                )
            self.outline.check_tokens(first, ids)
            if at >= end:
                return
            try:
                self._append_some(at, first, ids, source, layer, deadline)
            except (Unreachable, Refused, Conflict) as error:
                moves += 1
                if moves > MAX_MOVES:
                    raise
                before = self.home
                self.ready(deadline)
                # A node that has forgotten the sequence refuses it; else it knows why it refused.
                if self.home is before and not isinstance(error, Unreachable):
                    raise

    def _append_some(
        self,
        at: int,
        first: int,
        ids: array[int],
        source: Source | RawSource,
        layer: int | None,
        deadline: Deadline,
    ) -> None:
        """Appends as many tokens from `at` on as have room in open blocks, and seals."""
        end = self._open(at, first + len(ids), layer, deadline)
        if end <= at:
            return
        home = self.home
        pieces = list(self.outline.open_pieces(at, end))
        sums: dict[int, list[int]] = {}
        whole = layer is None and self.room.client.checksums

        def place() -> None:
            for piece in pieces:
                block = home.tails.blocks[piece.index]
                source.place(self.shape, block, piece.lo, piece.hi, piece.start - first)
                if whole and piece.hi - piece.lo == self.shape.block_tokens:  # in the cache now
                    sums[piece.index] = checksums(block.data, self.shape.layers)

        home.within(place, deadline)
        layers = range(self.shape.layers) if layer is None else range(layer, layer + 1)
        self.certainly(lambda: home.append(at, end - at, layers, pieces, deadline))
        self.outline.append(at, ids[at - first : end - first], layer)
        self.seal(deadline, sums=sums)

    def _open(self, at: int, end: int, layer: int | None, deadline: Deadline) -> int:
        """Has blocks open for tokens from `at` up to `end`; answers how far they reach, or `at`
        where the sequence has gone to another node: look again. Retry where there is no room."""
        wanted = self.outline.blocks_for(end)
        if layer is None:
            some = min(self.most_open, max(1, OPEN_BYTES // self.shape.size_bytes))
            wanted = min(wanted, self.outline.blocks_for(at + 1) + some - 1)
        if len(self.home.tails) < wanted:
            if self.leaves(deadline):
                return at
            reason = self.certainly(lambda: self.home.extend(wanted, deadline))
            self._learn_room(wanted)
            if self._reach() <= at:
                raise Retry(f"node {self.home.node} has no room for more tokens: {reason}")
        return min(end, self._reach())

    def _learn_room(self, wanted: int) -> None:
        """A node that had no room for all it was asked for is asked for less: it has sought room
        on other nodes until its time was over."""
        opened = len(self.home.tails)
        if opened < wanted:
            self.most_open, self.granted = max(1, opened), 0
        elif opened >= self.most_open:
            self.granted += 1
            if self.granted >= GRANTS_TO_GROW:
                self.most_open, self.granted = min(2 * self.most_open, MOST_OPEN), 0

    def _reach(self) -> int:
        """Where the open blocks end."""
        return self.outline.sealed + len(self.home.tails) * self.shape.block_tokens

    # Forking ------------------------------------------------------------------------

    def truncate(self, tokens: int, deadline: Deadline) -> None:
        cut = self.cut_blocks(tokens, deadline)
        answer = self.certainly(lambda: self.home.truncate(tokens, deadline))
        self.outline.truncate(tokens)
        self.home.tails.update(answer.tails, deadline)
        self.home.tails.restore(cut)

    def fork(self, tokens: int, idle_s: float, deadline: Deadline, *, tentative: bool) -> Writer:
        cut = self.cut_blocks(tokens, deadline)
        home, tails = self.home.fork(tokens, idle_s, deadline, tentative=tentative)
        home.tails.update(tails, deadline)
        home.tails.restore(cut)
        return Writer(self.room, self.outline.fork(tokens), home, tentative=tentative)

    def accept(self, fork: Writer | None, tokens: int, deadline: Deadline) -> None:
        """Takes a tentative fork's content over up to `tokens`; every one of them ends."""
        taken = fork or self
        cut = taken.cut_blocks(tokens, deadline)
        number = fork.home.sequence if fork else 0
        answer = self.certainly(lambda: self.home.accept(number, tokens, deadline))
        if fork is not None:
            self.home.tails.inherit(fork.home.tails)
            self.outline = fork.outline
            self.outline.cut = True  # the parent may have gone another way since the fork
        self.outline.truncate(tokens)
        self.home.tails.update(answer.tails, deadline)
        self.home.tails.restore(cut)
        self.seal(deadline)

    def cut_blocks(self, tokens: int, deadline: Deadline) -> list[Bytes]:
        """The content of the blocks that are open once a sequence is cut at `tokens`, where open
        blocks cannot be read from the node."""
        if self.home.tails.shared or tokens <= 0:
            return []
        pieces = self.outline.sealed_pieces(tokens - 1, tokens)
        if not pieces:
            count = self.outline.blocks_for(tokens)
            return [block.copy() for block in self.home.tails.blocks[:count]]
        block = self.outline.blocks[pieces[0].index]
        if block.end == tokens:
            return []
        (content,) = Reader(self.home, range(self.shape.layers)).fetch(
            [pieces[0].index], [block.key], deadline
        )
        if content is None:
            raise Refused(f"the block of token {tokens - 1} is lost; restore it first")
        return [content]
