"""Reading a sequence: as arrays of KV, as blocks, under a lease, piece by piece.

Sealed blocks are read beside the writer; open ones from its own memory, in turn with its calls.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfabric.errors import DeadlineExceeded, FabricError, Refused, Retry, Unreachable
from kvfabric.types import Key, Status
from kvfabric_client.block_reader import Reader
from kvfabric_client.blocks import Array, BlockShape, Bytes, layer_range, source_of, target_of
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Piece, Sealed
from kvfabric_client.sequence_view import VIEW_LEASE_S, SequenceView, view_of
from kvfabric_client.sequence_writer import Writer

CHUNK_BYTES = 16 << 20
RESTORE_S = 0.1  # between two looks for room
STORED = (Status.OK, Status.EXISTS)


class Missing(FabricError):
    """Some of a sequence's blocks are nowhere any more: compute these tokens again, and append
    what lies behind the sequence's length."""

    def __init__(self, ranges: list[range]) -> None:
        super().__init__(f"the KV of tokens {_told(ranges)} is lost; compute it and call restore()")
        self.ranges = ranges


@dataclass(frozen=True, slots=True)
class Place:
    """Where one block of a sequence lies."""

    tokens: range
    key: Key | None  # None: it is open
    node: str  # empty: it is lost


class SequenceReads:
    """What a sequence can be asked. See the module."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.used_s = time.monotonic()
        self._lock = threading.RLock()
        self.closed = False

    @property
    def shape(self) -> BlockShape:
        return self.writer.shape

    def read(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        layers: range | None = None,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> Array:
        """The KV of these tokens, `[layers, 2, heads, tokens, head dim]`, in memory of its own.

        `layers`: a run of this sequence's. A dtype that numpy lacks comes as unsigned integers.
        Raises Missing, with the token ranges, where blocks are nowhere any more.
        """
        end = self.writer.outline.length if end is None else end
        self._look_inside()
        kv = self.shape.empty(max(0, end - start), len(layer_range(self.shape, layers)))
        missing = self.read_into(kv, start, end, layers=layers, verify=verify, timeout_s=timeout_s)
        if missing:
            raise Missing(missing)
        return kv

    def read_into(
        self,
        target: Any,
        start: int = 0,
        end: int | None = None,
        *,
        layers: range | None = None,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> list[range]:
        """As `read`, into an array or tensor of the caller's, with any strides.

        Answers the token ranges that are nowhere any more, where the target's content is
        undefined: an engine computes just these, and gives them back by `restore`.
        """
        self._look_inside()
        which = layer_range(self.shape, layers)
        with self.using(timeout_s) as deadline:
            outline = self.writer.outline
            tokens = self._range(start, end)
            bits = target_of(self.shape, target, len(tokens), len(which))
            pieces = outline.sealed_pieces(tokens.start, tokens.stop)
            blocks = [outline.blocks[piece.index] for piece in pieces]
            home = self.writer.home
            opened = list(outline.open_pieces(tokens.start, tokens.stop))

            def take_opened() -> None:
                for piece in opened:
                    block = home.tails.blocks[piece.index]
                    self._take(bits, block, piece, tokens.start, which)

            lost: list[range] = []
            if opened and home.tails.shared:
                try:
                    home.within(take_opened, deadline)
                except Unreachable:  # with its session: they may be anybody's by now
                    lost = [range(piece.start, piece.end) for piece in opened]
            else:
                take_opened()

        def deliver(index: int, block: Bytes) -> None:
            self._take(bits, block, pieces[index], tokens.start, which)

        numbers, keys = [piece.index for piece in pieces], [block.key for block in blocks]
        missing = Reader(home, which).read(numbers, keys, deliver, deadline, verify=verify)
        return _joined([range(pieces[i].start, pieces[i].end) for i in missing] + lost)

    def read_blocks(
        self, start: int = 0, end: int | None = None, *, timeout_s: float | None = None
    ) -> list[Bytes | None]:
        """Copies of the sealed blocks that hold these tokens, whole; None: it is nowhere."""
        with self.using(timeout_s) as deadline:
            pieces, blocks = self._sealed(start, end)
            home = self.writer.home
        numbers, keys = [piece.index for piece in pieces], [block.key for block in blocks]
        return Reader(home, range(self.shape.layers)).fetch(numbers, keys, deadline)

    def chunks(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        layers: range | None = None,
        max_bytes: int = CHUNK_BYTES,
        timeout_s: float | None = None,
    ) -> Iterator[tuple[range, Array]]:
        """As `read`, in pieces of about `max_bytes` at most, one after the other: (tokens, KV).

        Each has a timeout of its own.
        """
        shape = self.shape
        tokens = self._range(start, end)
        part = len(layer_range(shape, layers)) / shape.layers
        step = max(1, int(max_bytes / (shape.size_bytes * part))) * shape.block_tokens
        at = tokens.start
        while at < tokens.stop:
            until = min(tokens.stop, (at // step + 1) * step)
            yield range(at, until), self.read(at, until, layers=layers, timeout_s=timeout_s)
            at = until

    def view(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        lease_s: float = VIEW_LEASE_S,
        timeout_s: float | None = None,
    ) -> SequenceView:
        """The sealed blocks of these tokens under a lease, for a `with` statement.

        Without a copy where the home node shares its memory (these are not verified: that
        would cost what it saves), as verified copies what lies elsewhere.
        """
        with self.using(timeout_s) as deadline:
            pieces, blocks = self._sealed(start, end)
            home = self.writer.home
        return view_of(home, pieces, blocks, lease_s, deadline)

    def restore(self, start: int, kv: Any, *, timeout_s: float | None = None) -> None:
        """Stores the KV of sealed blocks that were lost, under their keys.

        For a range of tokens that `read_into` called missing, cut at blocks; all layers.
        Refused where it is not whole blocks, Retry where there is no room until the deadline;
        what was stored until then stays, and all of it may be given again.
        """
        self._look_inside()
        with self.using(timeout_s) as deadline:
            tokens = range(start, start + _tokens_of(kv))
            source = source_of(self.shape, kv, len(tokens), None)
            pieces, blocks = self._sealed(tokens.start, tokens.stop)
            if not blocks or (blocks[0].start, blocks[-1].end) != (tokens.start, tokens.stop):
                raise Refused(f"tokens {tokens.start} to {tokens.stop - 1} are not whole blocks")
            before = self.writer.outline.blocks
            parents = [before[p.index - 1].key if p.index else None for p in pieces]
            home = self.writer.home
        filled = [np.zeros(self.shape.size_bytes, dtype=np.uint8) for _ in blocks]
        for piece, memory in zip(pieces, filled, strict=True):
            source.place(self.shape, memory, 0, piece.hi, piece.start - start)
        lacking = list(range(len(blocks)))
        while lacking:
            statuses = home.room.put(
                [blocks[i].key for i in lacking],
                [filled[i] for i in lacking],
                parents=[parents[i] for i in lacking],
                layers=self.shape.layers,
                at=home.address,
                timeout_s=deadline.left_s(),
            )
            left = [i for i, s in zip(lacking, statuses, strict=True) if s not in STORED]
            if left and (Status.REFUSED in statuses or deadline.left_s() <= RESTORE_S):
                lost = _joined([range(blocks[i].start, blocks[i].end) for i in left])
                raise Retry(
                    f"the KV of tokens {_told(lost)} was not stored at node {home.node}: where "
                    "there is no room, close or truncate other sequences there, or give it more "
                    "memory; then restore it again"
                )
            if left:
                time.sleep(RESTORE_S)  # others may be lent out meanwhile
            lacking = left

    def blocks(self, *, timeout_s: float | None = None) -> list[Place]:
        """Where every block lies, in order."""
        with self.using(timeout_s) as deadline:
            home, outline = self.writer.home, self.writer.outline
            said = home.describe(deadline)
            found = [
                Place(range(block.start, block.end), block.key, node)
                for block, node in zip(outline.blocks, said.nodes, strict=False)
            ]
            opened = outline.open_pieces(outline.sealed, outline.length)
            return found + [Place(range(p.start, p.end), None, home.node) for p in opened]

    # Inside -------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, timeout_s: float | None) -> Iterator[Deadline]:
        """The deadline, while nobody else uses the writer's side."""
        deadline = self.writer.room.client.deadline(timeout_s)
        if not self._lock.acquire(timeout=deadline.left_s()):
            raise DeadlineExceeded("another call on this sequence took until the deadline")
        try:
            if self.closed:
                raise Refused("this sequence is closed")
            self.used_s = time.monotonic()
            yield deadline
        finally:
            self._lock.release()

    def _look_inside(self) -> None:
        if not self.shape.plain:
            raise Refused("blocks of a packing of one's own are read by read_blocks or view")

    def _range(self, start: int, end: int | None) -> range:
        length = self.writer.outline.length
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise Refused(f"tokens {start} to {end} of a sequence that has {length}")
        return range(start, end)

    def _sealed(self, start: int, end: int | None) -> tuple[list[Piece], list[Sealed]]:
        outline = self.writer.outline
        tokens = self._range(start, end)
        pieces = outline.sealed_pieces(tokens.start, tokens.stop)
        return pieces, [outline.blocks[piece.index] for piece in pieces]

    def _take(self, bits: Array, block: Bytes, piece: Piece, first: int, layers: range) -> None:
        """Copies a piece of a block to where it belongs."""
        inside = self.shape.look(block)[layers.start : layers.stop, ..., piece.lo : piece.hi, :]
        np.copyto(bits[..., piece.start - first : piece.end - first, :], inside)


def _told(ranges: list[range]) -> str:
    return ", ".join(f"{r.start} to {r.stop - 1}" for r in ranges)


def _joined(ranges: list[range]) -> list[range]:
    """Neighbours become one."""
    joined: list[range] = []
    for one in sorted(ranges, key=lambda r: r.start):
        if joined and joined[-1].stop == one.start:
            joined[-1] = range(joined[-1].start, one.stop)
        else:
            joined.append(one)
    return joined


def _tokens_of(kv: Any) -> int:
    """How many tokens the KV of all layers has."""
    while isinstance(kv, (list, tuple)):
        kv = kv[0]
    return int(kv.shape[-2])
