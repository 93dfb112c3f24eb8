"""The one writer of a sequence: appends, seals, forks, and goes to another node when it must.

Every change is noted in the outline after the node has answered. After a call whose answer was
lost the node is asked how it stands; after a session that ended the sequence is opened again.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from kvfabric.checksums import checksums
from kvfabric.errors import Conflict, FabricError, Refused, Retry, Unreachable
from kvfabric.logs import guest_logger
from kvfabric.types import BATCH_KEYS
from kvfabric_client.block_reader import Reader
from kvfabric_client.blocks import Bytes, RawSource, Source
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Outline
from kvfabric_client.sequence_home import Home
from kvfabric_client.sequence_opening import Opening

if TYPE_CHECKING:
    from kvfabric_client.room import Room

log = guest_logger(__name__)

T = TypeVar("T")

OPEN_BYTES = 32 << 20  # of blocks that one append of all layers keeps open at once
KNOWN_WAIT_S = 3.0  # several heartbeats
KNOWN_LOOK_S = 0.02
STAY_S = 5.0  # before a node that is being drained is tried to be left again
MOST_OPEN = 1024
GRANTS_TO_GROW = 16
MAX_MOVES = 3  # to other nodes, within one call


class Writer:
    """See the module. For one thread at a time."""

    def __init__(
        self, room: Room, outline: Outline, home: Home, *, tentative: bool = False
    ) -> None:
        self.room = room
        self.tentative = tentative  # seals nothing before its parent has accepted it
        self.outline = outline
        self.shape = outline.shape
        self.home = home
        self.has_attempts = False  # tentative forks, which would end if it left its node
        self.unsure = False  # the last call's answer is not known
        self.most_open = MOST_OPEN  # blocks that the node had room for at once, lately
        self.granted = 0  # how often it had room for that many since
        self.stays_until_s = 0.0  # there was no other node to go to

    # Being ready --------------------------------------------------------------------

    def ready(self, deadline: Deadline) -> None:
        """Makes sure that the node is the sequence's and that both know the same.

        Opens it again where its session has ended: at the same node, which may still have it,
        else at another with the sealed blocks. Then the outline is shorter by what was lost.
        """
        if self.home.link.alive():
            if not self.unsure:
                return
            try:
                self._agree(deadline)
                return
            except (Unreachable, Refused) as error:
                log.debug("sequence_lost", node=self.home.node, why=str(error))
            with contextlib.suppress(FabricError):  # nothing of ours touches its open blocks
                self.home.close(deadline, drop=False)
        if self.tentative:
            raise Conflict("a tentative fork ended with its session; fork its parent again")
        before = self.outline.length
        opening = self._opening()
        try:
            self.home, _ = opening.at(self.home.address, deadline, resume=self.home.sequence)
            self._agree(deadline)
        except FabricError:
            deadline.check()
            lost = self.home.node
            self.home, length = self._opening().anywhere(deadline)
            self.outline.truncate(length)
            self.unsure = False
            if self.home.node != lost:
                self._give_up(lost, deadline)
        log.warning(
            "sequence_reopened",
            node=self.home.node,
            tokens=self.outline.length,
            lost=before - self.outline.length,
        )

    def _give_up(self, node: str, deadline: Deadline) -> None:
        """The directory may not know yet that this node has gone; what only it had is lost."""
        places = self.home.describe(deadline).nodes
        gone = next((i for i, place in enumerate(places) if place in (node, "")), len(places))
        if gone < len(places):
            self.truncate(self.outline.blocks[gone].start, deadline)

    def _opening(self) -> Opening:
        return Opening(self.room, self.shape, list(self.outline.blocks), self.home.idle_s)

    def _agree(self, deadline: Deadline) -> None:
        """Asks the node how it stands. What it took of an append whose answer was lost is taken
        back, for the caller repeats it. Conflict where somebody else has become the writer."""
        said = self.home.describe(deadline)
        if said.epoch != self.home.epoch:
            raise Conflict(
                f"another writer has taken sequence {self.home.sequence} over, in epoch "
                f"{said.epoch}; this one is in {self.home.epoch}: close it"
            )
        self.outline.align(said.keys, said.tokens)
        self.home.tails.update(said.tails, deadline)
        if said.length < self.outline.length:
            self.outline.truncate(said.length)
        if said.visible != self.outline.visible:
            # Layers of one append may be ahead of others; all that is told again starts where
            # every layer has it.
            length = min(self.outline.length, said.length)
            answer = self.home.truncate(length, deadline)
            self.outline.truncate(length)
            self.home.tails.update(answer.tails, deadline)
        self.unsure = False

    def certainly(self, call: Callable[[], T]) -> T:
        """What a call answers; where it fails the next one asks the node first how it stands."""
        self.unsure = True
        answer = call()
        self.unsure = False
        return answer

    def move(self, deadline: Deadline) -> None:
        """Seals what is open and goes on at another node, with the same blocks.

        Waits until the directory knows these: the other node has no other way to find them.
        """
        self.seal(deadline, short=True)
        old = self.home
        self._wait_until_known(deadline)
        home, length = self._opening().anywhere(deadline, but=old.node)
        if length < self.outline.length:
            log.warning("sequence_moved", node=home.node, lost=self.outline.length - length)
            self.outline.truncate(length)
        self.home = home
        try:
            old.close(deadline.extended(), drop=False)
        except FabricError as error:
            log.debug("not_closed", node=old.node, why=str(error), effect="ends when it is idle")

    def _wait_until_known(self, deadline: Deadline) -> None:
        """Retry where the directory does not learn of the sequence's blocks in time."""
        keys = [block.key for block in self.outline.blocks]
        until_s = min(deadline.at_s, time.monotonic() + KNOWN_WAIT_S)
        while keys:
            some = keys[-BATCH_KEYS:]
            names = self.room.client.manager().locate(self.room.id, some, deadline)
            if all(names):
                keys = keys[:-BATCH_KEYS]
            elif time.monotonic() < until_s:
                time.sleep(KNOWN_LOOK_S)
            else:
                raise Retry(
                    f"{names.count('')} blocks of the sequence are not in the directory after "
                    f"{KNOWN_WAIT_S:.0f} s, so that no other node could find them"
                )

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
        for piece in pieces:
            block = home.tails.blocks[piece.index]
            source.place(self.shape, block, piece.lo, piece.hi, piece.start - first)
            if whole and piece.hi - piece.lo == self.shape.block_tokens:  # in the cache now
                sums[piece.index] = checksums(block.data, self.shape.layers)
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

    def leaves(self, deadline: Deadline) -> bool:
        """Whether the node is being drained and another one has taken the sequence."""
        now_s = time.monotonic()
        bound = self.tentative or self.has_attempts
        if bound or not self.home.draining or now_s < self.stays_until_s:
            return False
        try:
            self.move(deadline)
        except Retry as error:
            deadline.check()
            self.stays_until_s = now_s + STAY_S
            log.warning("not_moved", node=self.home.node, why=str(error), effect="tried again")
            return False
        return True

    def _reach(self) -> int:
        """Where the open blocks end."""
        return self.outline.sealed + len(self.home.tails) * self.shape.block_tokens

    def seal(
        self,
        deadline: Deadline,
        *,
        short: bool = False,
        sums: Mapping[int, list[int]] | None = None,
    ) -> None:
        """Seals what is full in every layer, and the last block too if it may be `short`.

        `sums`: checksums of open blocks by their number, as far as they were taken already.
        """
        blocks = [] if self.tentative else self.outline.next_blocks(short=short)
        if not blocks:
            return
        if blocks[-1].tokens < self.shape.block_tokens:
            self.outline.start_of(None)  # a short block ends in every layer alike
            last = len(blocks) - 1
            self.home.blank(last, blocks[-1].tokens, self.outline.length, deadline)
        self.certainly(lambda: self.home.seal(blocks, sums or {}, deadline))
        self.outline.seal(blocks)

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
