"""Spans of sequences that are written, cut, fenced off and ended by chance: what a span says lies
here is there, and what is held for a kernel stays as it was, or its answer is a conflict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.unit.nodes.test_sequences_twin import (
    BLOCK_BYTES,
    LAYERS,
    NUMBERS,
    SPACE,
    TOKENS,
    SequenceMachine,
    Twin,
    chained,
)

from kvfabric.attention.shape import attention_shape
from kvfabric.types import Format
from kvfabric_nodes.attention.desk import Opened
from kvfabric_nodes.attention.spans import Span, Spans
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Reading

SHAPE = replace(
    attention_shape(Format("float16", TOKENS, layers=LAYERS)), layer_bytes=BLOCK_BYTES // LAYERS
)


@dataclass(slots=True)
class Kernel:
    """What one reads: the extent and place of each token, and what is there."""

    opened: Opened
    reading: Reading
    layer: int
    expected: list[tuple[Extent, int, int]]


class SpanMachine(SequenceMachine):
    def __init__(self) -> None:
        super().__init__()
        self.spans = Spans(self.core, self.sequences, lambda segment: segment << 32)
        self.reader = self.core.open_session("a", "a")
        self.core.open_namespaces(self.reader, [SPACE])
        self.of: dict[int, Span] = {}
        self.kernels: list[Kernel] = []

    @precondition(lambda self: bool(self.writers()))
    @rule(n=NUMBERS, layer=st.integers(0, LAYERS - 1), hold=st.booleans())
    def attend(self, n: int, layer: int, hold: bool) -> None:
        twin = self._writer(n)
        opened = self.spans_of(twin)
        blocks = opened.blocks(0, layer)
        tokens, seen = twin.tokens(), twin.sealed + twin.reached[layer]
        here = [
            end
            for block, end in zip(twin.sequence.blocks, twin.sequence.ends, strict=True)
            if self.core.shards.get(SPACE, block.key) is not None
        ]
        starts = range(twin.sealed, seen, TOKENS)
        assert blocks.end.tolist() == here + [min(start + TOKENS, seen) for start in starts]
        places = [
            (extent, at - first, tokens[at])
            for extent, first, end in zip(blocks.extents, blocks.first, blocks.end, strict=True)
            for at in range(first, end)
        ]
        for extent, address in zip(blocks.extents, blocks.address, strict=True):
            assert address == (extent.segment << 32) + extent.offset
        self.compare(layer, places)
        if hold and len(self.kernels) < 3:
            reading = self.core.begin_reading(blocks.extents)
            self.kernels.append(Kernel(opened, reading, layer, places))

    @precondition(lambda self: bool(self.kernels))
    @rule(n=NUMBERS)
    def computed(self, n: int) -> None:
        kernel = self.kernels.pop(n % len(self.kernels))
        self.core.end_reading(kernel.reading)
        if all(sequence.open and sequence.cuts == cuts for sequence, cuts in kernel.opened._cuts):
            self.compare(kernel.layer, kernel.expected)

    # What chance alone would seldom do in a row ------------------------------------------

    @precondition(lambda self: bool(self.writers()))
    @rule(
        n=NUMBERS,
        layer=st.integers(0, LAYERS - 1),
        share=st.floats(0, 1),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8),
    )
    def written_anew(self, n: int, layer: int, share: float, tokens: list[int]) -> None:
        self.attend(n, layer, hold=True)
        self.truncate(n, share)
        self.grow(n, tokens, full=True)
        self.attend(n, layer, hold=False)
        self.computed_last()

    @precondition(lambda self: bool(self.writers()))
    @rule(n=NUMBERS, m=NUMBERS, layer=st.integers(0, LAYERS - 1))
    def fenced_off(self, n: int, m: int, layer: int) -> None:
        """Its old writer does not know of it, and goes on writing."""
        twin = self._writer(n)
        self.attend(n, layer, hold=True)
        self._resume(m, self.all.index(twin))
        self._scribbling(n, m)
        self.computed_last()

    @precondition(lambda self: bool(self.writers()))
    @rule(n=NUMBERS, m=NUMBERS, layer=st.integers(0, LAYERS - 1))
    def gone_and_back(self, n: int, m: int, layer: int) -> None:
        twin = self._writer(n)
        self.attend(n, layer, hold=True)
        self._purge(n, m)
        self.attend(n, layer, hold=False)
        for key, block in zip(chained(twin.blocks), twin.blocks, strict=True):
            reservation, _ = self.core.reserve(
                self.reader, SPACE, [key], [None], [BLOCK_BYTES], 1, 10.0, 0.0, self.now_s
            )
            if reservation is not None:
                cells = self._cells(reservation.items[0].extent)
                whole = enumerate(block)
                cells.update({(i, at): token for at, token in whole for i in range(LAYERS)})
                self.core.seal(reservation, 0, (1,), self.now_s)
        self.attend(n, layer, hold=False)
        self.computed_last()

    def computed_last(self) -> None:
        if self.kernels:
            self.computed(len(self.kernels) - 1)

    def compare(self, layer: int, places: list[tuple[Extent, int, int]]) -> None:
        assert [self._cells(extent)[layer, place] for extent, place, _ in places] == [
            token for _, _, token in places
        ]

    def spans_of(self, twin: Twin) -> Opened:
        """The same span as long as the sequence lives: what it remembers must not be stale."""
        number = twin.sequence.id
        if number not in self.of:
            span = self.spans.open_sequence(self.reader, SPACE, SHAPE, number, self.now_s)
            self.of[number] = span
        return Opened(self.spans, [(self.of[number], twin.sequence)])


TestSpans = SpanMachine.TestCase
TestSpans.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
