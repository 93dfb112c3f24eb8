"""What the auditor calls a hole: a miss of what the manager must know of."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from kvfabric.simulation.auditor import SETTLE_S, Auditor, Violation
from kvfabric.simulation.faults import Cluster
from kvfabric.simulation.nodes import Shape, Written, factory
from kvfabric.simulation.parameters import LINKS
from kvfabric.simulation.world import Plan, World

TOKENS = 4
SILENCE_S = 1.5


class Audit:
    """Two nodes, one of which has written a block that is read from the other."""

    def __init__(self) -> None:
        shape = Shape(4, 16 * 64, 64, TOKENS, 1, lending=True, call_timeout_s=1.0)
        self.world = World(Plan(2, shape, LINKS, SILENCE_S), 1, factory())
        cluster = Cluster(self.world, Random(1))
        cluster.lossy = True
        self.auditor = Auditor(self.world, cluster)
        self.pass_s(1.0)
        self.block = self._write()
        self.pass_s(1.0)

    def read(self) -> None:
        self.auditor.read(self.world.nodes["n0001"], self.block)

    def pass_s(self, seconds: float) -> None:
        self.world.simulation.run(self.world.simulation.now_s + seconds)

    def lose_messages(self, seconds: float) -> None:
        self.world.network.loss = 1.0
        self.pass_s(seconds)
        self.world.network.loss = 0.0

    def _write(self) -> Written:
        writer = self.world.nodes["n0000"]
        assert writer.open(1, TOKENS)
        assert writer.grow(1, TOKENS) == TOKENS
        (block,) = writer.sealed(1)
        return block


@pytest.fixture
def audit() -> Iterator[Audit]:
    made = Audit()
    yield made
    made.world.simulation.close()


def test_what_a_holder_could_not_tell_is_no_hole(audit: Audit) -> None:
    audit.read()
    assert audit.auditor.reads.found == 1
    audit.lose_messages(SILENCE_S + 2 * SETTLE_S)  # the holder is lost to the manager
    audit.read()
    assert audit.auditor.reads.missed == 1


def test_a_holder_that_is_heard_again_is_found(audit: Audit) -> None:
    audit.lose_messages(SILENCE_S + 2 * SETTLE_S)
    audit.pass_s(SETTLE_S)
    audit.read()
    assert audit.auditor.reads.found == 1


def test_what_a_holder_had_time_to_tell_is_a_hole(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Auditor, "_known", lambda *arguments: [])
    audit.lose_messages(1.0)
    audit.pass_s(SETTLE_S - 2.0)
    audit.read()
    audit.pass_s(2.0)
    with pytest.raises(Violation, match="a hole"):
        audit.read()
