"""Where a sequence is written: keeping the place, losing it, and going to another one.

After a call whose answer was lost the node is asked how it stands; after a session that ended
the sequence is opened again, at the same node or with its sealed blocks at another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from kvfabric.errors import Conflict, FabricError, Refused, Retry, Unreachable
from kvfabric.logs import guest_logger
from kvfabric.types import BATCH_KEYS
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Outline
from kvfabric_client.sequence_home import Home
from kvfabric_client.sequence_opening import Opening

if TYPE_CHECKING:
    from kvfabric_client.room import Room

log = guest_logger(__name__)

T = TypeVar("T")

KNOWN_WAIT_S = 3.0  # several heartbeats
KNOWN_LOOK_S = 0.02
STAY_S = 5.0  # before a node that is being drained is tried to be left again


class Seat:
    """What a `Writer` stands on. For one thread at a time."""

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
        self.stays_until_s = 0.0  # there was no other node to go to

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
        try:
            self.home = self._opening().again(self.home, deadline)
            self._agree(deadline)
        except Conflict:
            raise
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
            start = self.outline.blocks[gone].start  # between two blocks: nothing is copied
            self.certainly(lambda: self.home.truncate(start, deadline))
            self.outline.truncate(start)

    def _opening(self) -> Opening:
        return Opening(self.room, self.shape, list(self.outline.blocks), self.home.idle_s)

    def _agree(self, deadline: Deadline) -> None:
        """Asks the node how it stands. What it took of an append whose answer was lost is taken
        back, for the caller repeats it. Conflict where somebody else has become the writer."""
        said = self.home.describe(deadline, settle=True)
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

    def move(self, deadline: Deadline, *, wait_s: float = KNOWN_WAIT_S) -> None:
        """Seals what is open and goes on at another node, with the same blocks.

        Waits until the directory knows these: the other node has no other way to find them.
        Retry where that, or any node that takes it, does not come about.
        """
        self.seal(deadline, short=True)
        old = self.home
        self._wait_until_known(deadline, wait_s)
        home, length = self._opening().anywhere(deadline, but=old.node)
        if length < self.outline.length:
            log.warning("sequence_moved", node=home.node, lost=self.outline.length - length)
            self.outline.truncate(length)
        self.home = home
        try:
            old.close(deadline.extended(), drop=False)
        except FabricError as error:
            log.debug("not_closed", node=old.node, why=str(error), effect="ends when it is idle")

    def _wait_until_known(self, deadline: Deadline, wait_s: float) -> None:
        """Retry where the directory does not learn of the sequence's blocks in time."""
        keys = [block.key for block in self.outline.blocks]
        until_s = min(deadline.at_s, time.monotonic() + wait_s)
        while keys:
            some = keys[-BATCH_KEYS:]
            names = self.room.client.manager().locate(self.room.id, some, deadline)
            if all(names):
                keys = keys[:-BATCH_KEYS]
            elif time.monotonic() < until_s:
                time.sleep(KNOWN_LOOK_S)
            else:
                raise Retry(
                    f"{names.count('')} blocks of the sequence are not in the directory, so that "
                    "no other node could find them"
                )

    def leaves(self, deadline: Deadline, *, wait_s: float = KNOWN_WAIT_S) -> bool:
        """Whether the node is being drained and another one has taken the sequence.

        Not while layers differ: an open block cannot be sealed then.
        """
        now_s = time.monotonic()
        bound = self.tentative or self.has_attempts or len(set(self.outline.visible)) > 1
        if bound or not self.home.draining or now_s < self.stays_until_s:
            return False
        try:
            self.move(deadline, wait_s=wait_s)
        except Retry as error:
            deadline.check()
            self.stays_until_s = now_s + (STAY_S if wait_s else 0.0)
            log.info("not_moved", node=self.home.node, why=str(error), effect="tried again")
            return False
        return True

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
