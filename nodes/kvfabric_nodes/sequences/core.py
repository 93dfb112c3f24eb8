"""All open sequences of a node: who writes them, what they keep, and when they end.

A sequence claims its blocks' keys, so that they stay, here or on loan, however many
sequences share them. Its open blocks are extents of the writer's session. Nothing here
touches bytes: a caller copies what a fork or a truncation cuts, and verifies what it seals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.sequences import views as sequence_views
from kvfabric_nodes.sequences.idle import Idle
from kvfabric_nodes.sequences.sequence import Block, OpenSequence, Shape, Tail
from kvfabric_nodes.sequences.sharing import Sharing
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Pool
from kvfabric_nodes.store.promises import Grant, Session
from kvfabric_nodes.store.shards import Shard


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """Every limit of sequences, by name."""

    sequences: int = 65536  # on a node
    sequences_of_session: int = 4096
    tails: int = 256  # open blocks of a sequence
    forks: int = 64  # tentative ones of a sequence
    tentative_blocks: int = 256  # open blocks of all tentative forks of a sequence
    blocks: int = 1 << 20  # sealed ones of a sequence


class Sequences:
    """See the module. All times are seconds of one monotonic clock.

    `first_id`: sequences are numbered from here on; a node that starts anew must not give
    a number again that somebody still remembers.
    """

    def __init__(
        self, core: NodeCore, limits: SequenceLimits | None = None, first_id: int = 1
    ) -> None:
        self.core = core
        self.limits = limits or SequenceLimits()
        self.all: dict[int, OpenSequence] = {}
        self.sharing = Sharing(core)
        self._of_session: dict[int, dict[int, OpenSequence]] = {}
        self._idle = Idle(self.all)
        self._next_id = first_id
        core.on_closed.append(self._session_ended)

    # Begin and end ------------------------------------------------------------------

    def open(
        self,
        session: Session,
        namespace: NamespaceId,
        shape: Shape,
        blocks: Sequence[Block],
        idle_s: float,
        now_s: float,
    ) -> OpenSequence:
        """A sequence that begins with these blocks; the session is its writer."""
        self.core.admit(session, namespace, 0)
        if shape.size_bytes > self.core.extents.segment_bytes:
            raise Refused(
                f"blocks of {shape.size_bytes} bytes do not fit into a segment of "
                f"{self.core.extents.segment_bytes}; give the node larger segments"
            )
        self._check_blocks(namespace, shape, (), blocks)
        sequence = self._begin(session, namespace, shape, idle_s, now_s, None)
        self._take(sequence, blocks)
        return sequence

    def go_on(
        self, session: Session, sequence_id: int, blocks: Sequence[Block], now_s: float
    ) -> OpenSequence:
        """A sequence that has nothing open begins with further blocks; for its writer."""
        sequence = self.find(session, sequence_id, now_s)
        if sequence.session is not session:
            raise Conflict(
                f"this is not the writer of sequence {sequence_id}: resume it without keys first"
            )
        if sequence.tails or sequence.forks or sequence.root is not None:
            raise Refused(
                f"sequence {sequence_id} has open blocks or forks, or is one: nothing that is "
                "sealed comes behind these; append it"
            )
        self._check_blocks(sequence.namespace, sequence.shape, sequence.blocks, blocks)
        self._take(sequence, blocks)
        return sequence

    def _take(self, sequence: OpenSequence, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self.sharing.take(sequence, block)
        sequence.length = sequence.sealed
        sequence.show(0, sequence.shape.layers)

    def _check_blocks(
        self,
        namespace: NamespaceId,
        shape: Shape,
        before: Sequence[Block],
        blocks: Sequence[Block],
    ) -> None:
        """Refuses what a sequence with some blocks already cannot go on with."""
        if self.core.draining:
            raise Retry("this node is being drained; open the sequence on another one")
        if len(before) + len(blocks) > self.limits.blocks:
            raise Refused(f"a sequence has at most {self.limits.blocks} sealed blocks")
        if len({block.key for block in (*before, *blocks)}) < len(before) + len(blocks):
            raise Refused("a sequence has every block once; a key is named twice")
        for block in blocks:
            if not 0 < block.tokens <= shape.block_tokens:
                raise Refused(
                    f"a block of {block.tokens} tokens in a sequence whose full blocks have "
                    f"{shape.block_tokens}"
                )
            self._check_size(namespace, block.key, shape)

    def _check_size(self, namespace: NamespaceId, key: Key, shape: Shape) -> None:
        shard = self.core.shards.get(namespace, key)
        if shard is not None and shard.size_bytes != shape.size_bytes:
            raise Refused(
                f"shard {key.hex()[:16]} has {shard.size_bytes} bytes, the sequence's blocks have "
                f"{shape.size_bytes}"
            )

    def _begin(
        self,
        session: Session,
        namespace: NamespaceId,
        shape: Shape,
        idle_s: float,
        now_s: float,
        root: OpenSequence | None,
    ) -> OpenSequence:
        if len(self.all) >= self.limits.sequences:
            raise Retry(f"{len(self.all)} sequences are open on this node; close some, or wait")
        self._room_for_writer(session)
        idle_s = self.core.bounded(idle_s)
        sequence = OpenSequence(
            self._next_id, namespace, shape, session, idle_s, now_s + idle_s, root
        )
        self._next_id += 1
        self.all[sequence.id] = sequence
        self._of_session.setdefault(session.id, {})[sequence.id] = sequence
        self._idle.watch(sequence)
        if root is not None:
            root.forks[sequence.id] = sequence
        return sequence

    def resume(
        self, session: Session, sequence_id: int, idle_s: float, now_s: float
    ) -> OpenSequence:
        """The session becomes the writer; the old one is fenced off, its open blocks are lost."""
        sequence = self.find(session, sequence_id, now_s)
        if sequence.root is not None:
            raise Refused(f"sequence {sequence_id} is a tentative fork and ends with its writer")
        self._room_for_writer(session)
        self._lose_writer(sequence, now_s)
        sequence.epoch += 1
        sequence.session = session
        sequence.idle_s = self.core.bounded(idle_s) if idle_s else sequence.idle_s
        self.touch(sequence, now_s)
        self._idle.watch(sequence)
        self._of_session.setdefault(session.id, {})[sequence.id] = sequence
        return sequence

    def find(self, session: Session, sequence_id: int, now_s: float) -> OpenSequence:
        """A sequence in a namespace of this session; it is in use."""
        sequence = self.all.get(sequence_id)
        if sequence is None:
            raise Refused(
                f"no sequence {sequence_id} here: it was closed, or idle for too long; open one "
                "that begins with its keys"
            )
        self.core.admit(session, sequence.namespace, 0)
        self.touch(sequence, now_s)
        return sequence

    def writer(self, session: Session, sequence_id: int, epoch: int, now_s: float) -> OpenSequence:
        """The same, for its one writer. Conflict for everybody else."""
        sequence = self.find(session, sequence_id, now_s)
        if sequence.epoch != epoch or sequence.session is not session:
            raise Conflict(
                f"sequence {sequence_id} is in epoch {sequence.epoch} and this is not its writer: "
                "resume it to become the writer, or let go of it"
            )
        return sequence

    def settle(self, session: Session, sequence: OpenSequence, epoch: int) -> bool:
        """Ends the writer's epoch, and begins its next one: calls that it gave up waiting for may
        still come, and would give open blocks back to which it writes. False: not its writer.
        """
        if sequence.session is not session:
            return False
        if sequence.epoch == epoch:
            sequence.settled, sequence.epoch = epoch, epoch + 1
        return (sequence.settled, sequence.epoch) == (epoch, epoch + 1)  # maybe before

    def touch(self, sequence: OpenSequence, now_s: float) -> None:
        sequence.deadline_s = now_s + sequence.idle_s
        if sequence.root is not None:
            sequence.root.deadline_s = now_s + sequence.root.idle_s

    def end(
        self, sequence: OpenSequence, now_s: float, *, let_go: bool, drop: bool = False
    ) -> None:
        """`let_go`: its writer touches the open blocks no more. `drop`: erase the sealed ones,
        as far as nobody else keeps them."""
        if not sequence.open:
            return
        sequence.open = False
        sequence.show_cut()
        for fork in list(sequence.forks.values()):
            self.end(fork, now_s, let_go=let_go)
        self._shed(sequence, 0, let_go=let_go)
        keys = [block.key for block in sequence.blocks]
        self.sharing.leave(sequence, 0, now_s)
        if sequence.root is not None:
            del sequence.root.forks[sequence.id]
        del self.all[sequence.id]
        self._forget_writer(sequence)
        for key in reversed(keys) if drop else ():
            shard = self.core.shards.get(sequence.namespace, key)
            if shard is not None and not shard.pinned and not self.core.shards.claimed(shard):
                self.core.drop(shard, "dropped", "its sequence was closed", now_s)

    def let_go(self, session: Session, sequence_id: int) -> None:
        """The session's client no longer touches open blocks that it lost."""
        for reservation in list(session.tails.values()):
            if reservation.sequence == sequence_id and reservation.expired:
                self.core.abort(reservation)

    def tick(self, now_s: float) -> None:
        """Ends what was idle for too long."""
        for sequence in self._idle.due(now_s):
            if sequence.calls:
                self.touch(sequence, now_s)
                self._idle.watch(sequence)
            else:
                self.end(sequence, now_s, let_go=False)

    # Writing ------------------------------------------------------------------------

    def extend(self, sequence: OpenSequence, blocks: int, now_s: float) -> tuple[int, str]:
        """Opens blocks until there are so many: (how many it lacks room for, why not more)."""
        assert sequence.session is not None
        wanted, limit = min(blocks, self.limits.tails), ""
        if wanted < blocks:
            limit = f"a sequence has at most {self.limits.tails} open blocks"
        lacking = wanted - len(sequence.tails)
        if sequence.root is not None:
            forks = sequence.root.forks.values()
            left = self.limits.tentative_blocks - sum(len(fork.tails) for fork in forks)
            if lacking > left:
                lacking = left
                limit = (
                    f"the tentative forks of a sequence have at most "
                    f"{self.limits.tentative_blocks} open blocks"
                )
        if lacking <= 0:
            return 0, limit
        shape = sequence.shape
        reservation, reason = self.core.reserve_tails(
            sequence.session,
            sequence.namespace,
            sequence.id,
            lacking,
            shape.size_bytes,
            shape.layers,
            now_s,
        )
        if reservation is not None:
            sequence.tails += [Tail(reservation, index) for index in sorted(reservation.items)]
            lacking -= len(reservation.items)
        return lacking, reason or limit

    def sealable(
        self, sequence: OpenSequence, keys: Sequence[Key], tokens: Sequence[int]
    ) -> list[int]:
        """The tokens of the first open blocks, if they may be sealed under these keys."""
        if sequence.root is not None:
            raise Refused("a tentative fork seals nothing; have its parent accept it first")
        counts = sequence.sealable(keys, tokens)
        for key in keys:
            if self.sharing.has(sequence, key):
                raise Refused(f"the sequence has key {key.hex()[:16]} already")
            self._check_size(sequence.namespace, key, sequence.shape)
        if len(sequence.blocks) + len(keys) > self.limits.blocks:
            raise Refused(f"a sequence has at most {self.limits.blocks} sealed blocks")
        return counts

    def seal(
        self,
        sequence: OpenSequence,
        key: Key,
        tokens: int,
        checksums: Sequence[int],
        now_s: float,
    ) -> Grant:
        """The first open block, verified, becomes a shard; EXISTS: one that was there is shared."""
        tail = sequence.tails[0]
        parent = sequence.blocks[-1].key if sequence.blocks else None
        self.core.name_tail(tail.reservation, tail.index, key, parent)
        grant = self.core.seal(tail.reservation, tail.index, checksums, now_s)
        assert grant.status in (Status.OK, Status.EXISTS)
        del sequence.tails[0]
        self.sharing.take(sequence, Block(key, tokens))
        if tokens < sequence.shape.block_tokens:
            sequence.show_cut()  # what follows it comes to lie elsewhere
        return grant

    # Forks --------------------------------------------------------------------------

    def fork(
        self,
        session: Session,
        parent: OpenSequence,
        blocks: int,
        idle_s: float,
        now_s: float,
        *,
        tentative: bool,
    ) -> OpenSequence:
        """A sequence that shares the parent's first sealed blocks."""
        root = None
        if tentative:
            root = parent.root or parent
            if root.session is not session:
                raise Conflict(f"only the writer of sequence {root.id} makes tentative forks of it")
            if len(root.forks) >= self.limits.forks:
                raise Refused(
                    f"sequence {root.id} has {len(root.forks)} tentative forks; accept one, or "
                    "close some first"
                )
        elif parent.root is not None:
            raise Refused("a fork of a tentative fork is tentative")
        fork = self._begin(session, parent.namespace, parent.shape, idle_s, now_s, root)
        self.sharing.share(fork, parent, blocks)
        fork.length = fork.sealed
        return fork

    def accept(self, parent: OpenSequence, fork_id: int, tokens: int, now_s: float) -> None:
        """The parent's content is the fork's, up to `tokens`; all its tentative forks end."""
        fork = parent.forks.get(fork_id) if fork_id else parent
        if fork is None:
            raise Refused(f"sequence {parent.id} has no tentative fork {fork_id}")
        if not fork.sealed <= tokens <= fork.length:
            raise Refused(
                f"{tokens} tokens of an attempt that can be seen from {fork.sealed} to "
                f"{fork.length}; truncate the sequence for fewer"
            )
        for other in list(parent.forks.values()):
            if other is not fork:
                self.end(other, now_s, let_go=True)
        if fork is not parent:
            self._adopt(parent, fork, now_s)
            self.end(fork, now_s, let_go=True)
        self.truncate(parent, tokens, now_s)

    def _adopt(self, parent: OpenSequence, fork: OpenSequence, now_s: float) -> None:
        self._shed(parent, 0, let_go=True)
        common = fork.through_root
        for ours, theirs in zip(parent.blocks[common:], fork.blocks[common:], strict=False):
            if ours.key != theirs.key:
                break
            common += 1
        self.sharing.leave(parent, common, now_s)
        for block in fork.blocks[common:]:
            self.sharing.take(parent, block)
        parent.tails, fork.tails = fork.tails, []
        for tail in parent.tails:
            tail.reservation.sequence = parent.id
        parent.length, parent.ahead = fork.length, fork.ahead
        fork.length, fork.ahead = fork.sealed, {}

    def truncate(self, sequence: OpenSequence, tokens: int, now_s: float) -> None:
        """Forgets what lies behind `tokens`, in every layer, with all blocks that begin there.

        A sealed block that is cut must lie, copied, in the first open block.
        """
        cut = sequence.cut(tokens)
        sequence.cuts += tokens < max([sequence.length, *sequence.ahead.values()])
        self.sharing.leave(sequence, cut.blocks, now_s)
        self._shed(sequence, -(-cut.rest // sequence.shape.block_tokens), let_go=True)
        sequence.length, sequence.ahead = tokens, {}
        sequence.show_cut()

    # For lending and the manager -------------------------------------------------------

    def victims(
        self,
        pool: Pool | None,
        size_bytes: int,
        skip: Callable[[Shard], bool] = lambda shard: False,
        sequence_id: int = 0,
    ) -> list[Shard]:
        """Blocks to lend out, of one sequence or of all; see sequence_views."""
        one = self.all.get(sequence_id)
        chosen: Iterable[OpenSequence]
        chosen = self._roots() if not sequence_id else [one.root or one] if one else []
        return sequence_views.victims(
            chosen, self.sharing.sharers, self.core.shards, pool, size_bytes, skip
        )

    def columns(self) -> control_pb2.Sequences:
        return sequence_views.columns(self._roots())

    def _roots(self) -> Iterator[OpenSequence]:
        """All but tentative forks, whose blocks are their roots'."""
        return (sequence for sequence in self.all.values() if sequence.root is None)

    # What happens elsewhere ---------------------------------------------------------

    def _session_ended(self, session: Session, now_s: float) -> None:
        for sequence in list(self._of_session.get(session.id, {}).values()):
            if sequence.root is not None:
                self.end(sequence, now_s, let_go=True)
            else:
                self._lose_writer(sequence, now_s, let_go=True)

    def _lose_writer(self, sequence: OpenSequence, now_s: float, *, let_go: bool = False) -> None:
        """The sealed part stays, for whoever resumes it."""
        for fork in list(sequence.forks.values()):
            self.end(fork, now_s, let_go=let_go)
        sequence.cuts += bool(sequence.tails)
        self._shed(sequence, 0, let_go=let_go)
        sequence.length, sequence.ahead = sequence.sealed, {}
        sequence.show_cut()
        self._forget_writer(sequence)

    def _forget_writer(self, sequence: OpenSequence) -> None:
        if sequence.session is None:
            return
        own = self._of_session[sequence.session.id]
        del own[sequence.id]
        if not own:
            del self._of_session[sequence.session.id]
        sequence.session = None

    def _room_for_writer(self, session: Session) -> None:
        if len(self._of_session.get(session.id, ())) >= self.limits.sequences_of_session:
            raise Refused(
                f"this session writes {self.limits.sequences_of_session} sequences; close some"
            )

    # Inside -------------------------------------------------------------------------

    def _shed(self, sequence: OpenSequence, kept: int, *, let_go: bool) -> None:
        """Only the first open blocks stay the sequence's."""
        gone = sequence.tails[kept:]
        del sequence.tails[kept:]
        for tail in gone:
            if let_go:
                self.core.abort(tail.reservation, [tail.index])
            else:
                assert not kept, "a promise ends for all open blocks"
                self.core.end_tails(tail.reservation)

    def check(self) -> None:
        """Asserts that sequences, claims and reservations agree."""
        self.sharing.check(self.all.values())
        tails: set[tuple[int, int]] = set()
        for sequence_id, sequence in self.all.items():
            assert sequence.id == sequence_id
            sequence.check()
            for tail in sequence.tails:
                assert (tail.reservation.id, tail.index) not in tails
                tails.add((tail.reservation.id, tail.index))
            if sequence.session is not None:
                assert self._of_session[sequence.session.id][sequence_id] is sequence
            if sequence.root is not None:
                assert sequence.root.forks[sequence_id] is sequence
                assert sequence.root.session is sequence.session
            assert len(sequence.forks) <= self.limits.forks
            held = sum(len(fork.tails) for fork in sequence.forks.values())
            assert held <= self.limits.tentative_blocks
        assert tails == {
            (reservation.id, index)
            for session in self.core.sessions.values()
            for reservation in session.tails.values()
            if not reservation.expired
            for index in reservation.items
        }
        written = {i for own in self._of_session.values() for i in own}
        assert written == {i for i, s in self.all.items() if s.session is not None}
        self._idle.check()
