"""A node's memory as a simulated engine uses it: real sequences, which borrow where need be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2
from kvfabric.simulation.nodes import Ground, Shape, Written
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.lending.core import Lending
from kvfabric_nodes.lending.room import Room
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.sequences.sequence import Shape as BlockShape
from kvfabric_nodes.simulated.pulls import Tags, checksum, payload_of
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.promises import Session
from kvfabric_nodes.store.shards import Shard

TENANT = "tenant"
NAMESPACE = NamespaceId(b"simulated namespace of one tenant"[:32])
IDLE_S = 600.0
SEEK_S = 10.0  # how long a search for room may take
FIRST_BLOCKS = 16  # of a long request: so many must fit before it is admitted
KEPT_BLOCKS = 16  # which a long prompt that comes in leaves to others: they need a few each
AHEAD_BLOCKS = 256  # of a prompt that is coming, room is sought for at a time
HEARD_S = 2.0  # what the manager said of others' memory is believed for so long
MARGIN = 0.7  # of that much


@dataclass(slots=True, eq=False)
class Held:
    """A sequence of the engine's."""

    sequence: OpenSequence
    tokens: int  # of its prompt, which it needs room for first
    keys: list[Key] = field(default_factory=list)


class SimulatedMemory:
    """See kvfabric.simulation.serving.Memory."""

    def __init__(
        self,
        shape: Shape,
        ground: Ground,
        name: str,
        core: NodeCore,
        sequences: Sequences,
        lending: Lending,
        tags: Tags,
    ) -> None:
        self.sought: Callable[[], None] = lambda: None  # told when room was sought
        self.asked: Callable[[int], None] = lambda size_bytes: None  # what have others?
        self._shape = shape
        self._ground = ground
        self._name = name
        self._core = core
        self._sequences = sequences
        self._lending = lending
        self._tags = tags
        self._blocks = BlockShape(shape.block_bytes, 1, shape.block_tokens)
        self._held: dict[int, Held] = {}
        self._session: Session = core.open_session(TENANT, TENANT, shares_memory=False)
        core.open_namespaces(self._session, [NAMESPACE])
        self._room: Room | None = None
        self._elsewhere_bytes = 0
        self._heard_s = float("-inf")
        self._steps = control_pb2.StepSums()
        self._lent: dict[int, int] = {}
        self._lent_version = -1
        self._capacity = shape.segments * (shape.segment_bytes // shape.block_bytes)
        core.on_dropped.append(self._changed)

    # The engine's calls -------------------------------------------------------------------

    def room(self, blocks: int, owed: int) -> bool:
        """Here, or for all but its first blocks at others, as the manager says."""
        free = self._free_blocks()
        if free >= blocks + owed:
            return True
        if not self._shape.lending:
            return False
        if free >= blocks and blocks <= FIRST_BLOCKS:
            return True  # what is owed is a long prompt's, for which others lend
        first = min(blocks, FIRST_BLOCKS)
        if free < first:
            if not self._seeking():
                self._seek(first - free)
            return False
        needed = (blocks + owed - free) * self._shape.block_bytes
        if self._now() - self._heard_s > HEARD_S:
            self.asked(needed)
            return False
        return needed <= self._elsewhere_bytes * MARGIN

    def open(self, request: int, tokens: int) -> bool:
        try:
            sequence = self._sequences.open(
                self._session, NAMESPACE, self._blocks, [], IDLE_S, self._now()
            )
        except FabricError:
            return False
        self._held[request] = Held(sequence, tokens)
        return True

    def grow(self, request: int, tokens: int) -> int:
        held, now_s = self._held[request], self._now()
        sequence = held.sequence
        self._sequences.touch(sequence, now_s)
        while True:
            wanted = -(-(tokens - sequence.sealed) // self._blocks.block_tokens)
            allowed = min(wanted, self._allowed(held))
            lacking, _ = self._sequences.extend(sequence, allowed, now_s)
            lacking += wanted - allowed
            end = min(tokens, sequence.room)
            if end > sequence.length:
                sequence.append(sequence.length, end - sequence.length, 0, 1)
            sealed = self._seal(request, held, now_s)
            if lacking or not sealed or sequence.room >= tokens:
                break
        if lacking and self._shape.lending and not self._seeking():
            ahead = (max(tokens, held.tokens) - sequence.room) // self._blocks.block_tokens
            self._seek(max(lacking, min(ahead, AHEAD_BLOCKS)))
        return sequence.room

    def close(self, request: int, *, drop: bool = True) -> None:
        held = self._held.pop(request, None)
        if held is None:
            return
        keys = held.keys
        if self._shape.lending and drop:
            self._lending.discard(NAMESPACE, keys)
        self._sequences.end(held.sequence, self._now(), let_go=True, drop=drop)

    def lent(self) -> Mapping[int, int]:
        borrowed = self._lending.borrowed_bytes
        if not borrowed:
            return {}
        if borrowed != self._lent_version:
            self._lent_version = borrowed
            loans = self._lending.loans()
            found: dict[int, int] = {}
            for debtor, creditor, size_bytes in zip(
                loans.debtor, loans.creditor, loans.size_bytes, strict=True
            ):
                if debtor == self._name:
                    number = self._ground.number(creditor)
                    found[number] = found.get(number, 0) + size_bytes
            self._lent = found
        return self._lent

    def stepped(self, batch: int, tokens: int, seconds: float, steps: float, waiting: int) -> None:
        """As `Steps.add` would sum so many equal steps."""
        sums = self._steps
        sums.waiting = waiting
        if not batch:
            return
        sums.steps += max(1, round(steps))
        sums.batch += batch * steps
        sums.tokens += tokens * steps
        sums.seconds += seconds * steps
        sums.batch_batch += batch * batch * steps
        sums.batch_tokens += batch * tokens * steps
        sums.tokens_tokens += tokens * tokens * steps
        sums.batch_seconds += batch * seconds * steps
        sums.tokens_seconds += tokens * seconds * steps
        sums.last_batch = batch

    # For the node's shells ------------------------------------------------------------------

    def take_steps(self) -> control_pb2.StepSums:
        taken = self._steps
        self._steps = control_pb2.StepSums(waiting=taken.waiting, last_batch=taken.last_batch)
        return taken

    def heard_of(self, free_bytes: int) -> None:
        """So much the manager says that others could lend."""
        self._elsewhere_bytes = free_bytes
        self._heard_s = self._now()

    def sealed(self, request: int) -> list[Written]:
        held = self._held.get(request)
        keys = held.keys if held else []
        return [Written(NAMESPACE, key, payload_of(NAMESPACE, key)) for key in keys]

    # Inside -----------------------------------------------------------------------------------

    def _seal(self, request: int, held: Held, now_s: float) -> int:
        """Full open blocks become shards; how many."""
        sequence, full = held.sequence, self._blocks.block_tokens
        count = (sequence.length - sequence.sealed) // full
        for _ in range(count):
            key = _key(request, sequence.id, len(held.keys))
            payload = payload_of(NAMESPACE, key)
            self._tags.write(sequence.tails[0].extent, payload)
            self._sequences.seal(sequence, key, full, (checksum(payload),), now_s)
            held.keys.append(key)
        return count

    def _allowed(self, held: Held) -> int:
        """The open blocks that a sequence may have, if there is room: with lending, a long
        prompt that comes in does not take the last ones."""
        sequence = held.sequence
        long = held.tokens > FIRST_BLOCKS * self._blocks.block_tokens
        if not (self._shape.lending and long and sequence.length < held.tokens):
            return self._capacity
        return len(sequence.tails) + max(0, self._free_blocks() - KEPT_BLOCKS)

    def _free_blocks(self) -> int:
        """Free ones, and cache that nobody needs: a reservation evicts it."""
        cached_bytes = self._core.shards.size_bytes - self._core.shards.claimed_bytes
        return (self._core.free_bytes + cached_bytes) // self._shape.block_bytes

    def _seeking(self) -> bool:
        return self._room is not None and self._room.waiting

    def _seek(self, blocks: int) -> None:
        self._room = self._lending.make_room(
            TENANT, self._shape.block_bytes, blocks, SEEK_S, self._now()
        )
        self.sought()

    def _changed(self, shard: Shard, what: str, now_s: float) -> None:
        self._lent_version = -1

    def _now(self) -> float:
        return self._ground.clock(self._name)


def _key(request: int, sequence: int, index: int) -> Key:
    """Of a block that nobody else has."""
    return Key(blake2b(b"%d %d %d" % (request, sequence, index), digest_size=32).digest())
