"""Sequences against plain lists of tokens, by chance: writers come, go and are fenced off.

The machine has a memory of its own, by extent, and does with it what clients and shells do:
appends write, cuts copy. Whatever a sequence says is visible must be there, token by token and
layer by layer, however its blocks are shared, and whatever fenced writers still scribble.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.sequences.core import SequenceLimits, Sequences
from kvfabric_nodes.sequences.sequence import Block, OpenSequence, Shape
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent, Extents
from kvfabric_nodes.store.promises import Limits, Session

BLOCK_BYTES = 1024
SEGMENTS, SEGMENT_BYTES = 3, 4096
TOKENS, LAYERS = 3, 2
SHAPE = Shape(BLOCK_BYTES, LAYERS, TOKENS)
SPACE = NamespaceId(b"a" * 32)
LIMITS = SequenceLimits(tails=4, forks=3, tentative_blocks=4)
IDLE_S = 20.0
JUNK = -1
DISTURBANCES = (
    "another_session",
    "cache",
    "close",
    "let_go",
    "purge",
    "resume",
    "scribbling",
    "session_dies",
    "wait",
)
NUMBERS = st.integers(0, 1 << 16)  # which of those there are

has_writers = precondition(lambda self: bool(self.writers()))

Cell = tuple[int, int, int]  # layer, and where in the block


def chained(blocks: list[list[int]]) -> list[Key]:
    """A key per block that says what it and all before it contain."""
    return [
        Key(hashlib.blake2s(repr(blocks[: end + 1]).encode()).digest())
        for end in range(len(blocks))
    ]


@dataclass(eq=False)
class Twin:
    """What its writer believes."""

    sequence: OpenSequence
    session: Session
    epoch: int
    blocks: list[list[int]] = field(default_factory=list)  # sealed, by tokens
    tail: list[int] = field(default_factory=list)  # behind them, in the layer that is furthest
    reached: list[int] = field(default_factory=lambda: [0] * LAYERS)  # of the tail, per layer
    root: Twin | None = None
    written: list[Extent] = field(default_factory=list)  # where it may still scribble

    @property
    def sealed(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def length(self) -> int:
        return self.sealed + min(self.reached)

    @property
    def writes(self) -> bool:
        """Still the one writer."""
        s = self.sequence
        return s.open and s.session is self.session and s.epoch == self.epoch

    def tokens(self) -> list[int]:
        return [token for block in self.blocks for token in block] + self.tail


class SequenceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES), Limits(deadline_s=50.0))
        self.sequences = Sequences(self.core, LIMITS)
        self.now_s = 0.0
        self.memory: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self.contents: dict[Key, list[int]] = {}
        self.sessions: list[Session] = []
        self.all: list[Twin] = []
        self.filled = 0

    # Sessions and time ----------------------------------------------------------------

    @initialize()
    def first_session(self) -> None:
        self._session(shares_memory=True)

    @rule(n=NUMBERS, m=NUMBERS, what=st.sampled_from(DISTURBANCES))
    def disturb(self, n: int, m: int, what: str) -> None:
        """What happens beside the writing: one rule, so that writing is not drowned by it."""
        getattr(self, f"_{what}")(n, m)

    def _another_session(self, n: int, m: int) -> None:
        if len(self.sessions) < 4:
            self._session(shares_memory=n % 2 == 0)

    def _session(self, *, shares_memory: bool) -> None:
        session = self.core.open_session("a", "a", shares_memory=shares_memory)
        self.core.open_namespaces(session, [SPACE])
        self.sessions.append(session)

    def _session_dies(self, n: int, m: int) -> None:
        if len(self.sessions) < 2:
            return
        session = self.sessions.pop(n % len(self.sessions))
        for twin in self.all:
            if twin.session is session:
                twin.written.clear()
        self.core.close_session(session, self.now_s)

    def _wait(self, n: int, m: int) -> None:
        self.now_s += (0.1, 1.0, 12.0)[n % 3]
        self.core.tick(self.now_s)
        self.sequences.tick(self.now_s)

    # Begin and end --------------------------------------------------------------------

    @precondition(lambda self: len(self.writers()) < 8)
    @rule(n=NUMBERS, like=NUMBERS, blocks=st.integers(0, 4))
    def open_sequence(self, n: int, like: int, blocks: int) -> None:
        """One that begins as another did, as far as its blocks are here."""
        session = self.sessions[n % len(self.sessions)]
        prefix = self.all[like % len(self.all)].blocks[:blocks] if self.all else []
        found: list[Block] = []
        for key, tokens in zip(chained(prefix), prefix, strict=True):
            if self.core.shards.get(SPACE, key) is None:
                break
            found.append(Block(key, len(tokens)))
        first, rest = found[: n % 5], found[n % 5 :]  # in one call or in two
        sequence = self.sequences.open(session, SPACE, SHAPE, first, IDLE_S, self.now_s)
        self.sequences.go_on(session, sequence.id, rest, self.now_s)
        self._twin(Twin(sequence, session, 1, [list(b) for b in prefix[: len(found)]]))

    def _resume(self, n: int, m: int) -> None:
        session = self.sessions[n % len(self.sessions)]
        sequence = self.all[m % len(self.all)].sequence if self.all else None
        if sequence and sequence.open and not sequence.root:
            self.sequences.resume(session, sequence.id, IDLE_S, self.now_s)
            blocks = [list(self.contents[block.key]) for block in sequence.blocks]
            self._twin(Twin(sequence, session, sequence.epoch, blocks))

    def _close(self, n: int, m: int) -> None:
        if len(self.writers()) < 4:
            return
        twin, drop = self._writer(n), m % 2 == 0
        for other in self.writers():
            if other.sequence.root is twin.sequence:
                other.written.clear()
        twin.written.clear()
        self.sequences.end(twin.sequence, self.now_s, let_go=True, drop=drop)

    def _let_go(self, n: int, m: int) -> None:
        """A fenced writer learns of it and stops."""
        if not self.all:
            return
        twin = self.all[n % len(self.all)]
        same = [t for t in self.all if t.session is twin.session]
        if not any(t.writes and t.sequence is twin.sequence for t in same):
            for t in same:
                if t.sequence is twin.sequence:
                    t.written.clear()
            self.sequences.let_go(twin.session, twin.sequence.id)

    # Writing --------------------------------------------------------------------------

    @has_writers
    @rule(n=NUMBERS, blocks=st.integers(0, 5))
    def extend(self, n: int, blocks: int) -> None:
        self._extend(self._writer(n), blocks)

    def _extend(self, twin: Twin, blocks: int) -> None:
        before = len(twin.sequence.tails)
        lacking, reason = self.sequences.extend(twin.sequence, blocks, self.now_s)
        open_now = len(twin.sequence.tails)
        assert before <= open_now <= max(before, min(blocks, LIMITS.tails))
        assert bool(reason) == (open_now < blocks)
        assert lacking <= max(0, blocks - open_now)
        self._own(twin)

    @has_writers
    @rule(n=NUMBERS, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), full=st.booleans())
    def grow(self, n: int, tokens: list[int], full: bool) -> None:
        """What most writers do most of the time."""
        twin = self._writer(n)
        start = min(twin.reached)
        self._extend(twin, -(-(start + len(tokens)) // TOKENS))
        self._append(twin, tokens, (0, LAYERS), 0)
        if full:
            self._seal(twin, len(tokens), short=False)

    @has_writers
    @rule(
        n=NUMBERS,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        layers=st.sampled_from([(0, 2), (0, 1), (1, 1)]),
        back=st.integers(0, 2),
    )
    def append(self, n: int, tokens: list[int], layers: tuple[int, int], back: int) -> None:
        self._append(self._writer(n), tokens, layers, back)

    def _append(self, twin: Twin, tokens: list[int], layers: tuple[int, int], back: int) -> None:
        """From where the layers are, or from a little before: a repetition."""
        first, count = layers
        which = range(first, first + count)
        reached = min(twin.reached[layer] for layer in which)
        start = max(0, reached - back)
        room = twin.sequence.room - twin.sealed
        # What is decided already is repeated as it was, what is new comes behind it.
        known = twin.tail[start : start + len(tokens)]
        tokens = (known + tokens[len(known) :])[: max(0, room - start)]
        told = (twin.sealed + start, len(tokens), first, count)
        late = twin.sequence.repeats(*told)
        twin.sequence.append(*told)
        end = start + len(tokens)
        twin.tail += tokens[len(twin.tail) - start :]
        for layer in which:
            twin.reached[layer] = max(twin.reached[layer], end)
            for at in range(start, end if not late else start):
                tail = twin.sequence.tails[at // TOKENS]
                self._cells(tail.extent)[layer, at % TOKENS] = twin.tail[at]
        twin.sequence.show(first, count)

    @has_writers
    @rule(n=NUMBERS, blocks=st.integers(1, 3), short=st.booleans())
    def seal(self, n: int, blocks: int, short: bool) -> None:
        self._seal(self._writer(n), blocks, short=short)

    def _seal(self, twin: Twin, blocks: int, *, short: bool) -> None:
        visible = min(twin.reached)
        if twin.root:
            return
        counts = [TOKENS] * min(blocks, visible // TOKENS)
        rest = visible - sum(counts)
        if short and 0 < rest < TOKENS and max(twin.reached) == visible:
            counts.append(rest)
        for count in counts:
            block = twin.tail[:count]
            key = chained([*twin.blocks, block])[-1]
            (tokens,) = self.sequences.sealable(twin.sequence, [key], [count])
            extent = twin.sequence.tails[0].extent
            grant = self.sequences.seal(twin.sequence, key, tokens, (1,), self.now_s)
            assert grant.status in (Status.OK, Status.EXISTS)
            twin.written = [e for e in twin.written if e is not extent]
            twin.blocks.append(block)
            del twin.tail[:count]
            twin.reached = [n - count for n in twin.reached]
            self.contents[key] = block

    # Cuts -----------------------------------------------------------------------------

    @precondition(lambda self: 0 < len(self.writers()) < 8)
    @rule(n=NUMBERS, share=st.floats(0, 1), tentative=st.booleans())
    def fork(self, n: int, share: float, tentative: bool) -> None:
        twin = self._writer(n)
        parent = twin.sequence
        tentative = tentative or parent.root is not None
        if tentative and len((parent.root or parent).forks) >= LIMITS.forks:
            return
        tokens = round(share * twin.length)
        cut = parent.cut(tokens)
        source = self._source(parent, tokens)
        if cut.rest and (source is None or cut.rest > TOKENS):
            return
        fork = self.sequences.fork(
            twin.session, parent, cut.blocks, IDLE_S, self.now_s, tentative=tentative
        )
        blocks = [list(block) for block in twin.blocks[: cut.blocks]]
        copy = Twin(fork, twin.session, 1, blocks, root=twin if tentative else None)
        if cut.rest:
            self.sequences.extend(fork, 1, self.now_s)
            if not fork.tails:
                self.sequences.end(fork, self.now_s, let_go=True)
                return
            assert source is not None
            self._copy(source, fork.tails[0].extent)
            fork.append(cut.start, cut.rest, 0, LAYERS)
            copy.tail = twin.tokens()[cut.start : tokens]
            copy.reached = [cut.rest] * LAYERS
        self._twin(copy)

    @has_writers
    @rule(n=NUMBERS, share=st.floats(0, 1))
    def truncate(self, n: int, share: float) -> None:
        twin = self._writer(n)
        sequence = twin.sequence
        tokens = round(share * twin.length)
        cut = sequence.cut(tokens)
        if cut.block is not None:
            source = self._source(sequence, tokens)
            self.sequences.extend(sequence, 1, self.now_s)
            if source is None or not sequence.tails:
                self._own(twin)
                return
            sequence.show_cut()
            self._copy(source, sequence.tails[0].extent)
        self.sequences.truncate(sequence, tokens, self.now_s)
        kept = twin.tokens()[cut.start : tokens]
        del twin.blocks[cut.blocks :]
        twin.tail, twin.reached = kept, [cut.rest] * LAYERS
        self._own(twin)

    @precondition(lambda self: any(twin.root for twin in self.writers()))
    @rule(n=NUMBERS, which=st.integers(0, 3), share=st.floats(0, 1))
    def accept(self, n: int, which: int, share: float) -> None:
        roots = [twin.sequence.root for twin in self.writers() if twin.root]
        root = roots[n % len(roots)]
        (twin,) = (twin for twin in self.writers() if twin.sequence is root)
        family = [other for other in self.writers() if other.sequence.root is root]
        taken = ([twin, *family])[which % (1 + len(family))]
        tokens = taken.sealed + round(share * min(taken.reached))
        fork_id = taken.sequence.id if taken is not twin else 0
        self.sequences.accept(twin.sequence, fork_id, tokens, self.now_s)
        twin.blocks = [list(block) for block in taken.blocks]
        twin.tail = taken.tail[: tokens - taken.sealed]
        twin.reached = [len(twin.tail)] * LAYERS
        for other in family:
            assert not other.sequence.open
            other.written.clear()
        self._own(twin)

    # What others do -------------------------------------------------------------------

    def _purge(self, n: int, m: int) -> None:
        twin = self._writer(n) if self.writers() else None
        keys = chained(twin.blocks) if twin else []
        if twin and keys:
            key = keys[m % len(keys)]
            self.core.purge(twin.session, SPACE, [key], "", self.now_s)

    def _cache(self, n: int, m: int) -> None:
        """Other shards fill the node, as far as there is room."""
        count = 1 + m % 4
        session = self.sessions[n % len(self.sessions)]
        keys = [Key((self.filled + n).to_bytes(32, "little")) for n in range(count)]
        self.filled += count
        reservation, _ = self.core.reserve(
            session, SPACE, keys, [None] * count, [BLOCK_BYTES] * count, 1, 10.0, 0.0, self.now_s
        )
        for index, item in list(reservation.items.items()) if reservation else ():
            assert reservation is not None
            self._scribble(item.extent)
            self.core.seal(reservation, index, (1,), self.now_s)

    def _scribbling(self, n: int, m: int) -> None:
        """Writers that share memory and do not know yet that they were fenced off."""
        for twin in self.all:
            if not twin.writes and twin.session.shares_memory:
                for extent in twin.written:
                    self._scribble(extent)

    # What must hold -------------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        self.core.check()
        self.sequences.check()
        claims = self.sequences.sharing.claims()
        assert sum(claims.values()) == sum(self.core.shards._claims.values())
        stored = self.core.books().held_bytes
        assert stored == BLOCK_BYTES * self.core.books().shards  # one copy, however many share

    @invariant()
    def what_is_visible_is_there(self) -> None:
        for twin in self.all:
            if not twin.writes:
                continue
            sequence = twin.sequence
            assert [block.key for block in sequence.blocks] == chained(twin.blocks)
            assert sequence.length == twin.length
            for layer in range(LAYERS):
                assert sequence.visible(layer) == twin.sealed + twin.reached[layer]
            for block, tokens in zip(sequence.blocks, twin.blocks, strict=True):
                shard = self.core.shards.get(SPACE, block.key)
                if shard is not None:
                    cells = self._cells(shard.extent)
                    for layer in range(LAYERS):
                        assert [cells[layer, at] for at in range(len(tokens))] == tokens
            for layer, reached in enumerate(twin.reached):
                for at in range(reached):
                    cells = self._cells(sequence.tails[at // TOKENS].extent)
                    assert cells[layer, at % TOKENS] == twin.tail[at]

    # Inside ---------------------------------------------------------------------------

    def writers(self) -> list[Twin]:
        return [twin for twin in self.all if twin.writes]

    def _writer(self, n: int) -> Twin:
        writers = self.writers()
        twin = writers[n % len(writers)]
        self.sequences.writer(twin.session, twin.sequence.id, twin.epoch, self.now_s)
        return twin

    def _twin(self, twin: Twin) -> None:
        self.all.append(twin)
        self._own(twin)

    def _own(self, twin: Twin) -> None:
        twin.written = [tail.extent for tail in twin.sequence.tails]

    def _cells(self, extent: Extent) -> dict[tuple[int, int], int]:
        return self.memory.setdefault((extent.segment, extent.offset), {})

    def _copy(self, source: Extent, target: Extent) -> None:
        self.memory[target.segment, target.offset] = dict(self._cells(source))

    def _scribble(self, extent: Extent) -> None:
        cells = self._cells(extent)
        cells.update({(layer, at): JUNK for layer in range(LAYERS) for at in range(TOKENS)})

    def _source(self, sequence: OpenSequence, tokens: int) -> Extent | None:
        """Where the bytes lie that a cut copies; None: there is no such cut, or they are gone."""
        cut = sequence.cut(tokens)
        if not cut.rest:
            return None
        if cut.block is None:
            return sequence.tails[0].extent
        shard = self.core.shards.get(SPACE, cut.block.key)
        return shard.extent if shard is not None else None


TestSequences = SequenceMachine.TestCase
TestSequences.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
