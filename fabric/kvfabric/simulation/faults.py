"""What may fail in a simulated cluster, and when: at random times, and at every named step.

A fault is an action by name. An `Injector` draws some of them from the seed, each for a
point and the time that it is reached for the n-th time, and undoes them after a while.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kvfabric.simulation.nodes import MANAGER
from kvfabric.simulation.world import World

# Every step of borrowing, recall, migration and drain that a run may stop at.
POINTS = (
    "borrow.asked",  # the manager named creditors
    "lend.reserved",  # the creditor set memory aside
    "borrow.reserved",  # the debtor heard of it
    "pull.started",
    "pull.reserved",
    "pull.sealed",
    "lend.sealed",  # the creditor's lending heard of it
    "borrow.seen",  # the manager told the debtor where replicas lie
    "dropped.lent",  # the debtor dropped its own copy
    "recall.asked",
    "recall.heard",
    "command.pull",
    "command.drop",
    "command.lend_out",
    "command.recall",
    "command.bring_home",
    "dropped.moved",
    "dropped.returned",
    "heartbeat",
)


class Cluster:
    """The actions. Each tells how it is undone."""

    def __init__(self, world: World, random: Random) -> None:
        self.world = world
        self.random = random
        self.lossy = False  # something happened that may lose the last copy of a shard
        self.troubled_s = float("-inf")  # when the last fault began or was undone

    def crash(self, node: str, other: str) -> Callable[[], None]:
        """A node dies with all it holds, and comes back empty."""
        return self._crash(node)

    def crash_other(self, node: str, other: str) -> Callable[[], None]:
        return self._crash(other if other in self.world.nodes else node)

    def crash_manager(self, node: str, other: str) -> Callable[[], None]:
        """The manager forgets all it knows."""
        self.world.stop_manager()
        return self.restore_manager

    def replace_manager(self, node: str, other: str) -> Callable[[], None]:
        """A newer manager takes over at once."""
        self.world.stop_manager()
        self.world.start_manager()
        return lambda: None

    def partition(self, node: str, other: str) -> Callable[[], None]:
        """Two nodes do not hear each other; the manager hears both."""
        self.lossy = True
        pair = frozenset((node, other or self._another(node)))
        self.world.network.cut.add(pair)
        return lambda: self.world.network.cut.discard(pair)

    def isolate(self, node: str, other: str) -> Callable[[], None]:
        """A node hears nobody."""
        self.lossy = True
        pairs = [frozenset((node, name)) for name in (*self.world.names, MANAGER) if name != node]
        self.world.network.cut.update(pairs)
        return lambda: self.world.network.cut.difference_update(pairs)

    def slow(self, node: str, other: str) -> Callable[[], None]:
        """A node's network card is a hundred times slower."""
        self.world.network.slow[node] = 100.0

        def undo() -> None:
            self.world.network.slow.pop(node, None)

        return undo

    def lose_messages(self, node: str, other: str) -> Callable[[], None]:
        """Every third message is lost."""
        self.lossy = True
        network, before = self.world.network, self.world.network.loss
        network.loss = 0.33

        def undo() -> None:
            network.loss = before

        return undo

    def double_messages(self, node: str, other: str) -> Callable[[], None]:
        """Every third message comes twice, every third out of order."""
        network = self.world.network
        before = network.doubles, network.disorder
        network.doubles = network.disorder = 0.33

        def undo() -> None:
            network.doubles, network.disorder = before

        return undo

    def skew(self, node: str, other: str) -> Callable[[], None]:
        """A node's clock jumps ahead and goes 10 % wrong."""
        self.lossy = True
        rate = self.random.choice((0.9, 1.1))
        self.world.drift(node, self.random.random() * 3.0, rate)
        return lambda: self.world.drift(node, 0.0, 1.0)

    def store_away(self, node: str, other: str) -> Callable[[], None]:
        """The MetadataStore answers nobody; a manager that starts meanwhile has to wait."""
        self.world.store.away = True

        def undo() -> None:
            self.world.store.away = False
            self.restore_manager()

        return undo

    def restore(self) -> None:
        """All nodes and the manager live; the network is whole."""
        network = self.world.network
        self.world.store.away = False
        network.cut.clear()
        network.slow.clear()
        network.loss = network.doubles = network.disorder = 0.0
        self.restore_manager()
        for name in self.world.names:
            if name not in self.world.nodes:
                self.world.start_node(name)
            if name in self.world.skews:
                self.world.drift(name, 0.0, 1.0)
        self.troubled_s = self.world.simulation.now_s

    def restore_manager(self) -> None:
        if self.world.manager is None:
            self.world.start_manager()

    def _crash(self, node: str) -> Callable[[], None]:
        self.lossy = True
        self.world.stop_node(node)

        def undo() -> None:
            if node not in self.world.nodes:
                self.world.start_node(node)

        return undo

    def _another(self, node: str) -> str:
        return self.random.choice([name for name in self.world.names if name != node])


Action = Callable[[Cluster, str, str], Callable[[], None]]
ACTIONS: dict[str, Action] = {
    "crash": Cluster.crash,
    "crash other": Cluster.crash_other,
    "crash manager": Cluster.crash_manager,
    "replace manager": Cluster.replace_manager,
    "partition": Cluster.partition,
    "isolate": Cluster.isolate,
    "slow": Cluster.slow,
    "lose messages": Cluster.lose_messages,
    "double messages": Cluster.double_messages,
    "skew": Cluster.skew,
    "store away": Cluster.store_away,
}
HARMLESS = (
    "crash manager",
    "replace manager",
    "slow",
    "double messages",
    "store away",
)  # they lose nothing


@dataclass(slots=True)
class Fault:
    """To happen when `point` is reached for the n-th time."""

    point: str
    left: int
    action: str
    lasts_s: float


class Injector:
    """See the module. Its `reached` is the world's."""

    def __init__(self, cluster: Cluster, faults: Sequence[Fault]) -> None:
        self.reached: Counter[str] = Counter()
        self.happened: list[str] = []
        self.enabled = True
        self._cluster = cluster
        self._waiting: dict[str, list[Fault]] = {}
        for fault in faults:
            self._waiting.setdefault(fault.point, []).append(fault)

    def reach(self, point: str, node: str, other: str) -> None:
        self.reached[point] += 1
        for fault in list(self._waiting.get(point, ())) if self.enabled else ():
            fault.left -= 1
            if fault.left <= 0:
                self._waiting[point].remove(fault)
                # In an event of its own: who reached the point is in the middle of something.
                self._cluster.world.simulation.after(0.0, self._strike, fault, node, other)

    def _strike(self, fault: Fault, node: str, other: str) -> None:
        cluster = self._cluster
        simulation = cluster.world.simulation
        if not self.enabled or node not in cluster.world.nodes:
            return
        line = f"{simulation.now_s:8.3f} s {fault.point} at {node}: {fault.action}"
        self.happened.append(f"{line}, for {fault.lasts_s:.2f} s")
        simulation.note(line)
        undo = ACTIONS[fault.action](cluster, node, other if other != MANAGER else "")
        cluster.troubled_s = simulation.now_s

        def end() -> None:
            if self.enabled:
                undo()
                cluster.troubled_s = simulation.now_s

        simulation.after(fault.lasts_s, end)


def draw(random: Random, count: int, actions: Sequence[str]) -> list[Fault]:
    """Faults at points drawn alike, early or late, short or longer than any deadline."""
    return [
        Fault(
            random.choice(POINTS),
            int(random.paretovariate(0.8)),
            random.choice(actions),
            random.choice((0.05, 0.5, 2.0, 8.0)),
        )
        for _ in range(count)
    ]
