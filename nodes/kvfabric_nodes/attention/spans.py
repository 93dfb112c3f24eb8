"""Spans: what of one context a session attends here. A table; it binds no block.

What lies where is looked up when it is asked for, and remembered as long as nothing of it
came or went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvfabric.attention.shape import AttentionShape
from kvfabric.errors import Refused
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.attention.pieces import Blocks, Range, Row, blocks_of, joined
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.sequence import Block, OpenSequence
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Session
from kvfabric_nodes.store.shards import Shard

MAX_POSITION = 1 << 48
USED_S = 1.0  # so often blocks that are attended count as used


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """Every limit of spans, by name."""

    spans_of_session: int = 4096
    blocks: int = 65536  # of a span of keys


@dataclass(frozen=True, slots=True)
class Placed:
    """A sealed block, and the absolute position of its first token."""

    key: Key
    first_token: int
    tokens: int

    @property
    def end(self) -> int:
        return self.first_token + self.tokens


@dataclass(slots=True, eq=False)
class _Known:
    """What of a span's sealed blocks lay here when it was looked at last."""

    blocks: Blocks
    shards: list[Shard]
    missing: list[Key]
    last: Block | None  # of the sequence, and how many it had
    count: int
    came: int  # shards that had come here, and gone, in all
    went: int
    tail: list[Row] = field(default_factory=list)  # of open blocks
    whole: Blocks | None = None  # with these; None: not joined yet


@dataclass(slots=True, eq=False)
class Span:
    """Of a sequence, or of keys (`sequence` is 0), by ascending position."""

    id: int
    namespace: NamespaceId
    shape: AttentionShape
    sequence: int
    placed: list[Placed] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)  # of these, neighbours joined
    known: _Known | None = None
    used_s: float = -USED_S


class Spans:
    """See the module. `address`: of a segment's first byte."""

    def __init__(
        self,
        core: NodeCore,
        sequences: Sequences,
        address: Callable[[int], int],
        limits: SpanLimits | None = None,
    ) -> None:
        self.core = core
        self.sequences = sequences
        self.limits = limits or SpanLimits()
        self._address = address
        self._of_session: dict[int, dict[int, Span]] = {}
        self._ids = 0
        self._came = 0
        self._went = 0
        core.on_sealed.append(self._on_sealed)
        core.on_dropped.append(self._on_dropped)
        core.on_closed.append(self._on_closed)

    @property
    def count(self) -> int:
        return sum(map(len, self._of_session.values()))

    def open_sequence(
        self,
        session: Session,
        namespace: NamespaceId,
        shape: AttentionShape,
        sequence_id: int,
        now_s: float,
    ) -> Span:
        """What lies here of a sequence of this node, its open blocks included."""
        self.core.admit(session, namespace, 0)
        sequence = self.sequences.find(session, sequence_id, now_s)
        if sequence.namespace != namespace:
            raise Refused(f"sequence {sequence_id} is not one of the namespace that is named")
        theirs = sequence.shape
        ours = (shape.size_bytes, shape.layers, shape.block_tokens)
        if ours != (theirs.size_bytes, theirs.layers, theirs.block_tokens):
            raise Refused(
                f"a format of {ours[0]} bytes, {ours[1]} layers and {ours[2]} tokens, but the "
                f"blocks of sequence {sequence_id} have {theirs.size_bytes}, {theirs.layers} and "
                f"{theirs.block_tokens}: layers and KV heads are those that one block has"
            )
        return self._add(session, Span(self._next_id(), namespace, shape, sequence_id))

    def open_keys(
        self,
        session: Session,
        namespace: NamespaceId,
        shape: AttentionShape,
        placed: Sequence[Placed],
    ) -> Span:
        """What lies here, or comes here, of these shards."""
        span = Span(0, namespace, shape, 0)
        self._extend(session, span, placed)
        span.id = self._next_id()
        return self._add(session, span)

    def extend(self, session: Session, span_id: int, placed: Sequence[Placed]) -> Span:
        """Further shards for a span of keys."""
        span = self.find(session, span_id)
        if span.sequence:
            raise Refused(f"span {span_id} is of sequence {span.sequence}, not of keys")
        self._extend(session, span, placed)
        return span

    def _extend(self, session: Session, span: Span, placed: Sequence[Placed]) -> None:
        self.core.admit(session, span.namespace, len(placed))
        for block in placed:
            if not 0 < block.tokens <= span.shape.block_tokens:
                raise Refused(
                    f"a block of {block.tokens} tokens in a span whose full blocks have "
                    f"{span.shape.block_tokens}"
                )
            if block.first_token > MAX_POSITION:
                raise Refused(f"position {block.first_token}; the limit is {MAX_POSITION}")
        if len(span.placed) + len(placed) > self.limits.blocks:
            raise Refused(f"a span of keys has at most {self.limits.blocks} blocks; open another")
        merged = sorted([*span.placed, *placed], key=lambda block: block.first_token)
        ranges = _ranges(merged)
        self._shards(span, [block.key for block in placed])
        span.placed, span.ranges, span.known = merged, ranges, None

    def close(self, session: Session, span_ids: Iterable[int]) -> None:
        """Unknown ones are ignored, so that it is safe to repeat."""
        own = self._of_session.get(session.id, {})
        for span_id in span_ids:
            own.pop(span_id, None)

    def find(self, session: Session, span_id: int) -> Span:
        span = self._of_session.get(session.id, {}).get(span_id)
        if span is None:
            raise Refused(f"this session has no span {span_id}: it was closed; open it again")
        return span

    def sequence_of(self, session: Session, span: Span, now_s: float) -> OpenSequence | None:
        """The sequence of a span that has one; it is in use."""
        if not span.sequence:
            return None
        return self.sequences.find(session, span.sequence, now_s)

    def use(self, span: Span, now_s: float) -> None:
        """What is attended is not evicted before what lies about."""
        if span.known is not None and now_s - span.used_s >= USED_S:
            span.used_s = now_s
            use = self.core.shards.next_use()
            for shard in span.known.shards:
                shard.last_used = use

    def here(self, span: Span, keys: Sequence[Key]) -> list[bool]:
        """Which of these shards lie here now."""
        room = self.core.shards.room(span.namespace)
        return [key in room for key in keys]

    def blocks(self, span: Span, sequence: OpenSequence | None, layer: int) -> Blocks:
        """What lies here of a span, and can be seen in this layer."""
        known = self._known(span, sequence)
        if sequence is None:
            return known.blocks
        tail = self._tail(sequence, sequence.visible(layer))
        if known.whole is None or tail != known.tail:
            known.tail, known.whole = tail, joined(known.blocks, blocks_of(tail))
        return known.whole

    def blocks_ahead(self, span: Span, sequence: OpenSequence | None) -> Blocks:
        """The same with all of the open blocks, whatever of them can be seen."""
        sealed = self._known(span, sequence).blocks
        if sequence is None:
            return sealed
        return joined(sealed, blocks_of(self._tail(sequence, sequence.room)))

    def _known(self, span: Span, sequence: OpenSequence | None) -> _Known:
        known = span.known
        if known is None or not self._stands(span, known, sequence):
            known = span.known = self._look(span, sequence)
        return known

    def _tail(self, sequence: OpenSequence, end: int) -> list[Row]:
        """The open blocks' tokens before this one."""
        full = sequence.shape.block_tokens
        seen = sequence.tails[: max(0, -(-(end - sequence.sealed) // full))]
        firsts = range(sequence.sealed, end, full)
        return [
            (self._at(tail.extent), first, min(first + full, end), tail.extent)
            for tail, first in zip(seen, firsts, strict=True)
        ]

    def _look(self, span: Span, sequence: OpenSequence | None) -> _Known:
        placed = span.placed
        if sequence is not None:
            firsts = [0, *sequence.ends]
            placed = [
                Placed(block.key, first, block.tokens)
                for block, first in zip(sequence.blocks, firsts, strict=False)
            ]
        found = self._shards(span, [block.key for block in placed])
        rows = [
            (
                self._at(shard.extent),
                block.first_token,
                block.first_token + block.tokens,
                shard.extent,
            )
            for block, shard in zip(placed, found, strict=True)
            if shard is not None
        ]
        blocks = sequence.blocks if sequence is not None else []
        return _Known(
            blocks_of(rows),
            [shard for shard in found if shard is not None],
            [block.key for block, shard in zip(placed, found, strict=True) if shard is None],
            blocks[-1] if blocks else None,
            len(blocks),
            self._came,
            self._went,
        )

    def _shards(self, span: Span, keys: Sequence[Key]) -> list[Shard | None]:
        """Where they lie here. Refused where their size is not the format's."""
        room = self.core.shards.room(span.namespace)
        found = [room.get(key) for key in keys]
        for shard in found:
            if shard is not None and shard.size_bytes != span.shape.size_bytes:
                raise Refused(
                    f"shard {shard.key.hex()[:16]} has {shard.size_bytes} bytes, a block of the "
                    f"span's format {span.shape.size_bytes}"
                )
        return found

    def _stands(self, span: Span, known: _Known, sequence: OpenSequence | None) -> bool:
        """Whether what is known of it is still so."""
        if sequence is not None:
            # Blocks are objects made at a seal, and what has the same last one has the same first.
            last = sequence.blocks[-1] if sequence.blocks else None
            if last is not known.last or len(sequence.blocks) != known.count:
                return False
        if known.went != self._went:
            if not all(shard.present for shard in known.shards):
                return False
            known.went = self._went
        if known.came != self._came:
            if known.missing and any(self.here(span, known.missing)):
                return False
            known.came = self._came
        return True

    def _at(self, extent: Extent) -> int:
        return self._address(extent.segment) + extent.offset

    def _add(self, session: Session, span: Span) -> Span:
        own = self._of_session.setdefault(session.id, {})
        if len(own) >= self.limits.spans_of_session:
            self._forget_ended(own)
        if len(own) >= self.limits.spans_of_session:
            raise Refused(f"this session has {len(own)} spans; close some first")
        own[span.id] = span
        return span

    def _forget_ended(self, own: dict[int, Span]) -> None:
        """Sequences that nobody closed end by themselves, and nobody closes their spans."""
        going_on = self.sequences.all
        for span in list(own.values()):
            if span.sequence and span.sequence not in going_on:
                del own[span.id]

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def _on_sealed(self, shard: Shard, now_s: float) -> None:
        self._came += 1

    def _on_dropped(self, shard: Shard, what: str, now_s: float) -> None:
        self._went += 1

    def _on_closed(self, session: Session, now_s: float) -> None:
        self._of_session.pop(session.id, None)


def _ranges(placed: Sequence[Placed]) -> list[Range]:
    """What blocks by ascending position cover, neighbours joined. Refused where two overlap."""
    found: list[Range] = []
    for block in placed:
        first = block.first_token
        if found and first < found[-1][1]:
            raise Refused(f"two blocks at position {first}: every token counts once")
        if found and first == found[-1][1]:
            first = found.pop()[0]
        found.append((first, block.end))
    return found
