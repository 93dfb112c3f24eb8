"""What threads read of sequences without asking, by chance: what was looked up lies there until it
is freed, or until the sequence's board says that it was cut."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, rule
from tests.unit.nodes.test_sequences_twin import (
    LAYERS,
    NUMBERS,
    SPACE,
    TOKENS,
    SequenceMachine,
    Twin,
    has_writers,
)

from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.store.extents import Extent


@dataclass(eq=False)
class Looked:
    """Where all of a sequence lies, the open blocks' room included, and how often it was cut."""

    sequence: OpenSequence
    places: list[tuple[Extent, int]]  # by position: of which block, and where in it
    cuts: int

    @property
    def stands(self) -> bool:
        return int(self.sequence.watched()[-1]) == self.cuts


class BoardMachine(SequenceMachine):
    def __init__(self) -> None:
        super().__init__()
        self.looked: list[Looked] = []
        self.core.on_freeing.append(self._freed)

    def _freed(self, extent: Extent) -> None:
        self.looked = [one for one in self.looked if all(e is not extent for e, _ in one.places)]

    @has_writers
    @rule(n=NUMBERS)
    def look(self, n: int) -> None:
        sequence = self._writer(n).sequence
        places: list[tuple[Extent, int]] = []
        for block in sequence.blocks:
            shard = self.core.shards.get(SPACE, block.key)
            if shard is None:
                return
            places += [(shard.extent, at) for at in range(block.tokens)]
        places += [(tail.extent, at) for tail in sequence.tails for at in range(TOKENS)]
        self.looked.append(Looked(sequence, places, int(sequence.watched()[-1])))

    @invariant()
    def what_stands_is_there(self) -> None:
        self.looked = [one for one in self.looked if one.stands]
        twins = {twin.sequence: twin for twin in self.writers()}
        for one in self.looked:
            self._check(one, twins[one.sequence])

    def _check(self, one: Looked, twin: Twin) -> None:
        tokens = twin.tokens()
        for layer in range(LAYERS):
            for at in range(min(int(one.sequence.watched()[layer]), len(one.places))):
                extent, place = one.places[at]
                assert self._cells(extent)[layer, place] == tokens[at]


TestBoards = BoardMachine.TestCase
TestBoards.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
