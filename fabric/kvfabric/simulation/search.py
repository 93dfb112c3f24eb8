"""One short run in which much fails, of a small cluster that is drawn from the seed.

Writers open sequences that outgrow their nodes, grow and close them; readers read; the
operator moves and drains; faults strike at the steps of it all. Then everything is mended,
every deadline passes, and nothing may be left over.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from kvfabric.errors import FabricError
from kvfabric.simulation.auditor import Auditor, Reads, Violation, place_of
from kvfabric.simulation.faults import ACTIONS, HARMLESS, Cluster, Injector, draw
from kvfabric.simulation.nodes import Factory, Node, Shape
from kvfabric.simulation.parameters import LINKS
from kvfabric.simulation.world import Plan, World
from kvfabric.types import NodeId

BLOCK_BYTES = 1 << 20
BLOCK_TOKENS = 16
RUN_S = 12.0
STEP_S = 0.05  # between what clients do
AUDIT_EVENTS = 150  # between two looks at all books
MEND_S = 60.0  # given to loans to settle, and again for everything to end
LOOK_S = 1.0


@dataclass(slots=True)
class Found:
    """What a run came to."""

    seed: int
    violation: str = ""  # empty: none
    history: list[str] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    reads: Reads = field(default_factory=Reads)
    digest: str = ""
    events: int = 0


@dataclass(slots=True)
class Writer:
    """One open sequence, and who writes it."""

    request: int
    node: Node
    goal: int  # tokens
    rate: int  # tokens at a step
    tokens: int = 0


class Scenario:
    """See the module."""

    def __init__(self, seed: int, make: Factory) -> None:
        self.random = Random(f"scenario {seed}")
        random = self.random
        blocks = random.choice((4, 8))
        shape = Shape(
            segments=random.randint(3, 6),
            segment_bytes=blocks * BLOCK_BYTES,
            block_bytes=BLOCK_BYTES,
            block_tokens=BLOCK_TOKENS,
            layers=1,
            lending=True,
            cap_share=random.choice((0.3, 0.5, 0.8)),
            loan_s=random.choice((3.0, 6.0)),
            recall_s=random.choice((1.0, 3.0)),
            heartbeat_s=0.25,
            call_timeout_s=1.0,
        )
        plan = Plan(
            random.randint(3, 6), shape, LINKS, silence_s=1.5, nodes_per_host=2, hosts_per_rack=2
        )
        self.world = World(plan, seed, make, reached=self._reached)
        network = self.world.network
        network.doubles = random.choice((0.0, 0.0, 0.05))
        network.disorder = random.choice((0.0, 0.0, 0.05))
        self.cluster = Cluster(self.world, random)
        actions = random.choice((tuple(ACTIONS), tuple(ACTIONS), HARMLESS))
        self.injector = Injector(self.cluster, draw(random, random.randint(0, 6), actions))
        self.auditor = Auditor(self.world, self.cluster)
        self.writers: list[Writer] = []
        self._requests = 0
        self._drained: NodeId | None = None
        self._since_audit = 0

    def run(self) -> None:
        """Raises Violation."""
        simulation = self.world.simulation
        simulation.every(STEP_S, self._step, 1.0)
        simulation.run(RUN_S, self._observe)
        self.injector.enabled = False
        self.cluster.restore()
        self._undrain()
        self._settle(self.auditor.quiet, "books that differ")
        for writer in self.writers:
            self._read(writer, all_of_it=True)
        for writer in list(self.writers):
            self._close(writer)
        self._settle(self.auditor.leftovers, "left over")
        self._settle(self.auditor.quiet, "books that differ at the end")

    # What clients do ---------------------------------------------------------------------

    def _step(self) -> None:
        if not self.injector.enabled:
            return
        self.writers = [each for each in self.writers if self._lives(each)]
        self.injector.reach("heartbeat", self.random.choice(self.world.names), "")
        chance = self.random.random()
        if chance < 0.25 and len(self.writers) < 2 * len(self.world.names):
            self._open()
        elif chance < 0.28 and self.writers:
            self._close(self.random.choice(self.writers))
        elif chance < 0.30:
            self._operate()
        for writer in list(self.writers):
            if writer.tokens < writer.goal:
                wanted = min(writer.goal, writer.tokens + writer.rate)
                writer.tokens = max(
                    writer.tokens, min(wanted, writer.node.grow(writer.request, wanted))
                )
            elif self.random.random() < 0.02:
                self._close(writer)
        if self.writers:
            self._read(self.random.choice(self.writers), all_of_it=False)

    def _open(self) -> None:
        node = self.world.nodes.get(self.random.choice(self.world.names))
        if node is None:
            return
        capacity = self.world.plan.shape.capacity_bytes // BLOCK_BYTES * BLOCK_TOKENS
        share = self.random.choice((0.1, 0.3, 0.8, 1.5, 2.5))
        goal = max(1, int(capacity * share * self.random.random()))
        self._requests += 1
        if node.open(self._requests, goal):
            rate = self.random.choice((1, 8, 40, 160))
            self.writers.append(Writer(self._requests, node, goal, rate))

    def _close(self, writer: Writer) -> None:
        self.writers.remove(writer)
        if self._lives(writer):
            writer.node.close(writer.request, drop=self.random.random() < 0.5)

    def _read(self, writer: Writer, *, all_of_it: bool) -> None:
        if not self._lives(writer):
            return
        written = writer.node.sealed(writer.request)
        chosen = written if all_of_it else self.random.sample(written, min(2, len(written)))
        for each in chosen:
            self.auditor.read(writer.node, each)

    def _operate(self) -> None:
        """The operator drains a node, lets it serve again, or moves one's shards."""
        manager = self.world.manager
        if manager is None:
            return
        node = NodeId(self.random.choice(self.world.names))
        try:
            if self._drained is not None:
                self._undrain()
            elif self.random.random() < 0.5:
                manager.drain(node)
                self._drained = node
            else:
                manager.migrate(node)
        except FabricError:
            return

    def _undrain(self) -> None:
        manager = self.world.manager
        if manager is not None and self._drained is not None:
            manager.serve(self._drained)
        self._drained = None

    # Inside --------------------------------------------------------------------------------

    def _lives(self, writer: Writer) -> bool:
        return self.world.nodes.get(writer.node.name) is writer.node

    def _reached(self, point: str, node: str, other: str) -> None:
        if point == "recall.asked":
            self.cluster.lossy = True  # where nobody else has room, what is recalled is given up
        self.injector.reach(point, node, other)

    def _observe(self) -> None:
        self._since_audit += 1
        if self._since_audit >= AUDIT_EVENTS:
            self._since_audit = 0
            self.auditor.books()

    def _settle(self, wrong: object, what: str) -> None:
        """Time passes until nothing is wrong any more; Violation if it never comes right."""
        assert callable(wrong)
        simulation = self.world.simulation
        end_s = simulation.now_s + MEND_S
        while True:
            simulation.run(simulation.now_s + LOOK_S, self._observe)
            found = wrong()
            if not found:
                return
            if simulation.now_s >= end_s:
                self.auditor.books()
                raise Violation(f"{what} {MEND_S:g} s after everything was mended: {found[:4]}")


def search(seed: int, make: Factory) -> Found:
    """One run."""
    found = Found(seed)
    scenario = Scenario(seed, make)
    try:
        scenario.run()
        scenario.auditor.books()
    except Violation as violation:
        found.violation = str(violation)
    except Exception as error:  # a core that raises is a violation, too
        found.violation = place_of(error)
    found.history = scenario.injector.happened
    found.reached = scenario.injector.reached
    found.reads = scenario.auditor.reads
    found.digest = scenario.world.simulation.digest()
    found.events = scenario.world.simulation.happened
    scenario.world.simulation.close()
    return found
